"""From a model, its processor and examples to an adapter: all that :func:`train` does around a Trainer."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from mmicl_kernels.data import Demonstration, Record
from mmicl_kernels.integration import PromptBuilder, create
from mmicl_kernels.integration.prompts import builder_of
from mmicl_kernels.methods import Adapter, AIMConfig
from mmicl_kernels.training.collate import AggregationCollator, Collator, DrawnEpisodes, EpisodeCollator
from mmicl_kernels.training.module import TrainedModule
from mmicl_kernels.training.plot import plot_losses
from mmicl_kernels.training.recipes import RECIPES, Recipe
from mmicl_kernels.training.shots import Draw, Example, RandomShots, examples_of, key_of

if TYPE_CHECKING:  # importing the Trainer takes seconds
    from transformers import ProcessorMixin, TrainerCallback, TrainingArguments

    from mmicl_kernels.training.trainer import AdapterTrainer

CHECKPOINTS = 0.1  # of the updates, from one to the next


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
        config: of the method, ``MimICConfig`` for instance.
        out: folder of the adapter, of checkpoints while it is trained, of ``training.json``, which has the
            recipe, the prompts' settings and the log, and of ``training.png``, if matplotlib is installed.
            None keeps nothing.
        shots, steps: instead of the recipe's. ``recipe``: one of ``RECIPES`` or a Recipe; by default the
            method's own.
        validation: as ``records``, other examples: the checkpoint with the least cross-entropy of their
            answers is the result.
        draw: which demonstrations a query has (``training/shots.py``), instead of random ones.
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
    """

    model: nn.Module
    config: object
    recipe: Recipe
    builder: PromptBuilder
    examples: Sequence[Any]
    collator: Collator
    validation: Dataset | None
    seed: int

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
        chosen = _recipe(recipe, config, shots, steps)
        if chosen.template is not None and not isinstance(processor, PromptBuilder):
            processor = PromptBuilder(processor, chosen.template)
        answer_only = isinstance(config, AIMConfig) and config.positions == "answer"
        floating = model.dtype if model.dtype.is_floating_point else None
        builder = builder_of(processor, answer_only=answer_only, dtype=floating)
        builder.device = torch.device("cpu")  # a Trainer moves batches
        examples = _examples(records, "records", builder)
        collator = _collator(config, builder, examples, chosen, draw, seed)
        others = (
            None
            if validation is None
            else _FixedEpisodes(_examples(validation, "validation", builder), collator)
        )
        return cls(model, config, chosen, builder, examples, collator, others, seed)

    def description(self) -> dict[str, Any]:
        """What decides the adapter, for ``training.json``: a run with another one cannot be resumed."""
        return {
            "method": type(self.config).__name__.removesuffix("Config").lower(),
            "config": asdict(self.config),
            "recipe": self.recipe.description(),
            "prompt": self.builder.settings,
            "examples": len(self.examples),
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
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError("mmicl_kernels.train needs accelerate: pip install 'mmicl-kernels[train]'")
        with tempfile.TemporaryDirectory() as nowhere:
            folder = Path(nowhere if out is None else out)
            checkpoint = None if out is None else self._checkpoint(folder, resume)
            made = self._arguments(folder, out is not None, arguments or {}, progress)
            with self.module() as module:
                trainer = self._trainer(module, made, callbacks)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                trainer.description["log"] = trainer.state.log_history
                if out is not None:
                    trainer.save_model()
                    if trainer.args.should_save and importlib.util.find_spec("matplotlib") is not None:
                        plot_losses(trainer.state.log_history, folder / "training.png")
                trainer.accelerator.wait_for_everyone()  # before one reads the folder, or removes it
        return module.adapter.requires_grad_(False).eval()

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

    def _checkpoint(self, folder: Path, resume: bool) -> Path | None:
        """Where to go on. Raises ValueError: the folder has another run, or one that shall not go on."""
        from mmicl_kernels.training.trainer import DESCRIPTION_FILE, last_checkpoint

        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            return None
        if not resume:
            raise ValueError(
                f"out is {folder}, which has {checkpoint.name} of a training: expected resume=True, or "
                "another folder"
            )
        theirs, mine = json.loads((checkpoint / DESCRIPTION_FILE).read_text()), self.description()
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise ValueError(f"{checkpoint} was trained with {name} {theirs.get(name)}, expected {value}")
        return checkpoint

    def _arguments(
        self, folder: Path, kept: bool, arguments: Mapping[str, Any], progress: bool
    ) -> TrainingArguments:
        """The recipe's and, before them, ``arguments``. Raises ValueError: there is no such field."""
        from transformers import TrainingArguments

        mine = {"output_dir", "remove_unused_columns", "seed"}
        unknown = sorted(set(arguments) - set(TrainingArguments.__dataclass_fields__) | mine & set(arguments))
        if unknown:
            raise ValueError(
                f"arguments has {unknown}, expected fields of transformers.TrainingArguments, without "
                f"{sorted(mine)}"
            )
        options = _fields(self.recipe, kept, self.validation is not None)
        options |= {"seed": self.seed, "disable_tqdm": not progress, **arguments}
        return TrainingArguments(**{**options, "output_dir": str(folder), "remove_unused_columns": False})

    def _trainer(
        self, module: TrainedModule, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]
    ) -> AdapterTrainer:
        from transformers import PrinterCallback

        from mmicl_kernels.training.trainer import AdapterTrainer

        trainer = AdapterTrainer(
            module, arguments, self.collator, self.examples, self.validation,
            description=self.description(), callbacks=list(callbacks),
        )  # fmt: skip
        if arguments.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        return trainer


def _fields(recipe: Recipe, kept: bool, validated: bool) -> dict[str, Any]:
    """The recipe as fields of ``TrainingArguments``."""
    return {
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup,
        "train_sampling_strategy": "random" if recipe.shuffle else "sequential",
        "save_strategy": "steps" if kept or validated else "no",
        "save_steps": CHECKPOINTS,
        "save_total_limit": 2,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": CHECKPOINTS,
        "load_best_model_at_end": validated,
        "metric_for_best_model": "ce",
        "greater_is_better": False,
        "logging_steps": 0.01,
        "use_cpu": not torch.accelerator.is_available(),  # or bf16 would be refused
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,  # there are none
        "report_to": "none",
    }


def _examples(source: Any, name: str, builder: PromptBuilder) -> Sequence[Any]:
    """Raises TypeError or ValueError, with ``name``: no examples, or a record that cannot be learnt.

    Found now, not when its batch is made; of the images only the number is looked at.
    """
    if isinstance(source, DrawnEpisodes):
        return source
    examples = examples_of(source)
    if len(examples) == 0:
        raise ValueError(f"{name} is empty, expected at least one example")
    for x in (examples[i] for i in range(len(examples))):
        if isinstance(x, Record):
            try:
                builder.check(Demonstration((b"",) * len(x.images), x.text, x.answer), answered=True)
            except ValueError as error:
                raise ValueError(f"{name}, {key_of(x)}: {error}") from error
    return examples


def _recipe(
    recipe: str | Recipe | None, config: object, shots: int | tuple[int, int] | None, steps: int | None
) -> Recipe:
    name = type(config).__name__.removesuffix("Config").lower() if recipe is None else recipe
    if isinstance(name, str):
        if name not in RECIPES and recipe is None:
            raise TypeError(f"config is a {type(config).__name__}, expected one of a method")
        if name not in RECIPES:
            raise ValueError(f"recipe is {name!r}, expected one of {', '.join(RECIPES)}")
        name = RECIPES[name]
    if not isinstance(name, Recipe):
        raise TypeError(f"recipe is a {type(name).__name__}, expected a Recipe or its name")
    given = {"shots": shots, "steps": steps}
    return replace(name, **{field: x for field, x in given.items() if x is not None})


def _collator(
    config: object,
    builder: PromptBuilder,
    examples: Sequence[Example],
    recipe: Recipe,
    draw: Draw | None,
    seed: int,
) -> Collator:
    options = {"draw": draw or RandomShots(replacement=recipe.replacement), "seed": seed}
    if isinstance(config, AIMConfig):
        return AggregationCollator(builder, examples, recipe.shots, **options)
    if isinstance(recipe.shots, tuple):
        raise ValueError(f"shots is {recipe.shots}, expected a number: pairs are AIM's")
    return EpisodeCollator(builder, examples, recipe.shots, shots_per_pass=recipe.shots_per_pass, **options)


class _FixedEpisodes(Dataset):
    """Queries with demonstrations as the first epoch draws them, so that evaluations compare."""

    def __init__(self, examples: Sequence[Any], collator: Collator) -> None:
        self.examples, self.collator = examples, collator

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, list[Any]]:
        example = self.examples[index]
        return example if isinstance(example, tuple) else (example, self.collator.drawn(example, epoch=0))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What a training changes in a model beside its weights is undone at the end of a ``with`` block.

    Which parameters ask for gradients, the modules' modes, gradient checkpointing, the cache.
    """
    gradients = {name: x.requires_grad for name, x in model.named_parameters()}
    modes = {name: x.training for name, x in model.named_modules()}
    checkpointing = {
        name: x.gradient_checkpointing
        for name, x in model.named_modules()
        if hasattr(x, "gradient_checkpointing")
    }
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        for name, x in model.named_parameters():
            x.requires_grad_(gradients.get(name, False))
        for name, x in model.named_modules():
            x.training = modes.get(name, False)
            if name in checkpointing:
                x.gradient_checkpointing = checkpointing[name]
        model.config.use_cache = use_cache
