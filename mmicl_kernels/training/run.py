"""From a model, its processor and examples to an adapter: all that :func:`train` does around a Trainer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from mmicl_kernels.data import Demonstration, Record
from mmicl_kernels.data.batch import AggregationBatch
from mmicl_kernels.data.collate import AggregationCollator, Collator, DrawnEpisodes, EpisodeCollator
from mmicl_kernels.data.prompts.builder import PromptBuilder, builder_of
from mmicl_kernels.data.shots import Draw, Example, RandomShots, examples_of, key_of
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.base import CONFIG_FILE, DESCRIPTION_FILE
from mmicl_kernels.methods.teaching import new_cache
from mmicl_kernels.patch import create, load
from mmicl_kernels.patch.create import outline
from mmicl_kernels.training.arguments import deciding, training_arguments
from mmicl_kernels.training.module import TrainedModule, objective_of
from mmicl_kernels.training.plot import plot_losses
from mmicl_kernels.training.recipes import RECIPES, Recipe
from mmicl_kernels.training.unchanged import unchanged, undrawn

if TYPE_CHECKING:  # importing the Trainer takes seconds
    from transformers import ProcessorMixin, TrainerCallback, TrainingArguments

    from mmicl_kernels.training.trainer import AdapterTrainer


def train(
    model: nn.Module,
    processor: ProcessorMixin | PromptBuilder,
    records: Any,
    config: object,
    *,
    out: str | os.PathLike | None = None,
    shots: int | tuple[int, int] | None = None,
    steps: int | None = None,
    recipe: str | Recipe | None = None,
    validation: Any = None,
    draw: Draw | None = None,
    seed: int = 0,
    resume: bool = False,
    arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> Adapter:
    """An adapter that stands in for demonstrations of ``records``, trained by the Trainer of transformers.

    The model is left as it was, on the Trainer's device. The same call with ``resume`` goes on where a run
    was killed, to the same adapter, bit for bit on the same machine. Of several processes (``accelerate
    launch``) each calls this.

    Args:
        processor: of the model, whose chat template the prompts have if there is one; a PromptBuilder says
            how they are written.
        records: the queries, and the demonstrations of others: a path of JSON lines, ``Records``, rows as
            ``as_records`` takes them, examples that make a ``.demonstration()``, or ``DrawnEpisodes``.
        config: of the method.
        out: folder of the adapter, of checkpoints while it is trained, of ``training.json``, which has the
            recipe, the prompts' settings and the log, and of ``training.png``, if matplotlib is installed.
            None keeps nothing.
        shots, steps: instead of the recipe's. ``recipe``: one of ``RECIPES`` or a Recipe; by default the
            method's own.
        validation: as ``records``, other examples: the checkpoint with the least cross-entropy of their
            answers is the result.
        draw: which demonstrations a query has (``data/shots.py``), instead of random ones.
        arguments: fields of ``TrainingArguments``, which come before the recipe's: ``{"bf16": True}``,
            ``{"gradient_checkpointing": True}``, ``{"report_to": "wandb"}``.

    Raises:
        ImportError: accelerate is missing. TypeError, ValueError: an argument, a record without an answer,
        ``out`` has another run, or one and not ``resume``. UnsupportedModelError: as :func:`create`.
        FloatingPointError: the loss is not finite.
    """
    training = Training.of(
        model, processor, records, config, shots=shots, steps=steps, recipe=recipe,
        validation=validation, draw=draw, seed=seed,
    )  # fmt: skip
    return training.run(out, resume=resume, arguments=arguments, callbacks=callbacks, progress=progress)


@dataclass(frozen=True)
class Training:
    """What :func:`train` is about to do.

    Attributes:
        builder: of the prompts. ``examples``: the queries. ``collator``: makes batches of them.
        validation: pairs of a query and its demonstrations, drawn once, or None.
        digests: of the texts of both, by "records" and "validation".
    """

    model: nn.Module
    config: object
    method: str
    recipe: Recipe
    builder: PromptBuilder
    examples: Sequence[Any]
    collator: Collator
    validation: Dataset | None
    seed: int
    digests: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        processor: ProcessorMixin | PromptBuilder,
        records: Any,
        config: object,
        *,
        shots: int | tuple[int, int] | None = None,
        steps: int | None = None,
        recipe: str | Recipe | None = None,
        validation: Any = None,
        draw: Draw | None = None,
        seed: int = 0,
    ) -> Training:
        """Arguments and errors are those of :func:`train`."""
        adapter = outline(model, config)
        chosen = _recipe(recipe, adapter.method, shots, steps)
        if chosen.template is not None and not isinstance(processor, PromptBuilder):
            processor = PromptBuilder(processor, chosen.template)
        if chosen.shared_shots:
            new_cache(model)  # or the first batch would be refused
        positions = adapter.embedding_site.positions if adapter.fuses else "text"
        floating = model.dtype if model.dtype.is_floating_point else None
        builder = builder_of(processor, positions=positions, dtype=floating)
        builder.device = torch.device("cpu")  # a Trainer moves batches
        examples, digests = {}, {}
        for name, source in (("records", records), ("validation", validation)):
            if source is not None:
                examples[name], digests[name] = _examples(source, name, builder)
        collator = _collator(adapter, builder, examples["records"], chosen, draw, seed)
        others = _FixedEpisodes(examples["validation"], collator) if "validation" in examples else None
        return cls(
            model, config, adapter.method, chosen, builder, examples["records"], collator, others, seed,
            digests,
        )  # fmt: skip

    def description(self) -> dict[str, Any]:
        """What decides the adapter, for ``training.json``: a run with another one cannot be resumed."""
        return {
            "method": self.method,
            "config": asdict(self.config),
            "recipe": self.recipe.description(),
            "prompt": self.builder.settings,
            "examples": self.digests,
            "draw": _named(self.collator.draw),
            "seed": self.seed,
        }

    def run(
        self,
        out: str | os.PathLike | None = None,
        *,
        resume: bool = False,
        arguments: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        progress: bool = True,
    ) -> Adapter:
        """Arguments and errors are those of :func:`train`."""
        given = dict(arguments or {})
        with tempfile.TemporaryDirectory() as nowhere, undrawn(), torch.inference_mode(False):
            folder, kept = Path(nowhere if out is None else out), out is not None
            made = self.arguments(given, folder, kept=kept, progress=progress)
            description = {**self.description(), "arguments": deciding(given), "processes": made.world_size}
            known = _Known.of(folder, description, resume) if kept else _Known()
            if known.adapter is not None:
                return load(known.adapter, self.model).requires_grad_(False).eval()
            with self.module() as module, torch.enable_grad():
                trainer = self._trainer(module, made, description, callbacks)
                if known.is_finished:
                    trainer.restore(known.checkpoint)
                else:
                    trainer.train(resume_from_checkpoint=known.checkpoint and str(known.checkpoint))
                trainer.description["log"] = trainer.state.log_history
                if kept:
                    trainer.save_model()
                    if trainer.args.should_save:
                        _plot(trainer.state.log_history, folder / "training.png")
                trainer.accelerator.wait_for_everyone()  # before one reads the folder, or removes it
        return module.adapter.requires_grad_(False).eval()

    def arguments(
        self, given: Mapping[str, Any], folder: str | os.PathLike = "", *, kept: bool, progress: bool = True
    ) -> TrainingArguments:
        """As :func:`training_arguments`."""
        options = {"kept": kept, "validated": self.validation is not None, "seed": self.seed}
        return training_arguments(self.recipe, given, folder, progress=progress, **options)

    @contextmanager
    def module(self) -> Iterator[TrainedModule]:
        """The model with a new adapter, which the seed decides, within a ``with`` block."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            adapter = create(self.model, self.config)
        with unchanged(self.model):
            module = TrainedModule(self.model, adapter)
            try:
                yield module
            finally:
                module.handle.detach()

    def _trainer(
        self,
        module: TrainedModule,
        arguments: TrainingArguments,
        description: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback],
    ) -> AdapterTrainer:
        from transformers import PrinterCallback

        from mmicl_kernels.training.trainer import AdapterTrainer

        trainer = AdapterTrainer(
            module, arguments, self.collator, self.examples, self.validation,
            description=description, callbacks=list(callbacks),
        )  # fmt: skip
        if arguments.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        return trainer


@dataclass(frozen=True)
class _Known:
    """What a folder has of the same training: its adapter, or where to go on, or nothing."""

    adapter: Path | None = None
    checkpoint: Path | None = None
    is_finished: bool = False  # but for the adapter, which was not yet copied out of the last checkpoint

    @classmethod
    def of(cls, folder: Path, description: Mapping[str, Any], resume: bool) -> _Known:
        """Raises ValueError: the folder has another adapter or training, or one that shall not go on."""
        from mmicl_kernels.training.trainer import check_whole, is_finished, last_checkpoint

        last = last_checkpoint(folder)
        made, begun = _read(folder / DESCRIPTION_FILE), last and _read(last / DESCRIPTION_FILE)
        theirs = made or begun
        if last is None and made is None and not (folder / CONFIG_FILE).exists():
            return cls()
        if not resume:
            expected = "expected resume=True, or another folder"
            raise ValueError(f"out is {folder}, which has an adapter or a training already: {expected}")
        if theirs is None:
            raise ValueError(f"out is {folder}, which has no {DESCRIPTION_FILE} of a training to go on with")
        for name, value in description.items():
            if theirs.get(name) != value:
                raise ValueError(f"{folder} was trained with {name} {theirs.get(name)}, expected {value}")
        if made is not None:
            return cls(adapter=folder)
        check_whole(last)
        return cls(checkpoint=last, is_finished=is_finished(last))


def _read(path: Path) -> dict[str, Any] | None:
    """What a description has, if it is there: it is written after the adapter that it describes."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _plot(log: list[dict[str, Any]], path: Path) -> None:
    try:
        plot_losses(log, path)
    except ImportError as error:  # matplotlib is missing, or cannot be imported
        if importlib.util.find_spec("matplotlib") is not None:
            warnings.warn(f"no {path.name}: {error}", stacklevel=2)


def _named(draw: Draw) -> str:
    kind = getattr(draw, "__qualname__", None)
    if kind is not None:
        return kind
    plain = {name: x for name, x in vars(draw).items() if isinstance(x, bool | int | float | str)}
    return f"{type(draw).__qualname__} {plain}"


def _examples(source: Any, name: str, builder: PromptBuilder) -> tuple[Sequence[Any], str]:
    """Examples, and a digest of their ids and texts.

    Raises TypeError or ValueError, with ``name``: no examples, or one that cannot be learnt. That is found
    now, not when its batch is made; of the images only the number is looked at.
    """
    examples = source if isinstance(source, DrawnEpisodes) else examples_of(source)
    if len(examples) == 0:
        raise ValueError(f"{name} is empty, expected at least one example")
    digest = hashlib.sha256()
    for i in tqdm(range(len(examples)), desc=f"checking {name}", delay=2):
        x = examples[i]
        parts = [str(getattr(x, field, "")) for field in ("id", "text", "answer")]
        digest.update("\0".join(parts).encode() + b"\0\0")
        if isinstance(x, Record | Demonstration):
            try:
                builder.check(Demonstration((b"",) * len(x.images), x.text, x.answer), answered=True)
            except ValueError as error:
                raise ValueError(f"{name}, {key_of(x)}: {error}") from error
    return examples, f"{len(examples)}, {digest.hexdigest()}"


def _recipe(
    recipe: str | Recipe | None, method: str, shots: int | tuple[int, int] | None, steps: int | None
) -> Recipe:
    """The method's own by default; of a method that has none, a plain one."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    if recipe is None:
        recipe = RECIPES.get(method, Recipe())
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}, expected a Recipe or its name")
    given = {"shots": shots, "steps": steps}
    return replace(recipe, **{field: x for field, x in given.items() if x is not None})


def _collator(
    adapter: Adapter,
    builder: PromptBuilder,
    examples: Sequence[Example],
    recipe: Recipe,
    draw: Draw | None,
    seed: int,
) -> Collator:
    options = {"draw": draw or RandomShots(replacement=recipe.replacement), "seed": seed}
    aggregates = objective_of(type(adapter)).batch is AggregationBatch
    if recipe.shared_shots and (aggregates or isinstance(examples, DrawnEpisodes)):
        what = f"method {adapter.method!r}" if aggregates else "records are DrawnEpisodes"
        raise ValueError(
            f"shared_shots is True and {what}, expected demonstrations that are drawn for a teacher"
        )
    if aggregates:
        least = recipe.shots if isinstance(recipe.shots, int) else recipe.shots[0]
        if least < 1:
            raise ValueError(f"shots is {recipe.shots}, expected at least 1 for method {adapter.method!r}")
        return AggregationCollator(builder, examples, recipe.shots, **options)
    if isinstance(recipe.shots, tuple):
        raise ValueError(f"shots is {recipe.shots}, expected a number for method {adapter.method!r}")
    options |= {"shots_per_pass": recipe.shots_per_pass, "shared_shots": recipe.shared_shots}
    return EpisodeCollator(builder, examples, recipe.shots, **options)


class _FixedEpisodes(Dataset):
    """Queries with demonstrations as the first epoch draws them, so that evaluations compare."""

    def __init__(self, examples: Sequence[Any], collator: Collator) -> None:
        self.examples, self.collator = examples, collator

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, list[Any]]:
        example = self.examples[index]
        return example if isinstance(example, tuple) else (example, self.collator.drawn(example, epoch=0))
