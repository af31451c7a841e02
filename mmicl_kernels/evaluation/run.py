"""Zero-shot, k-shot and adapted answers to the same records, side by side."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin

from mmicl_kernels.data import Demonstration, Record, as_records
from mmicl_kernels.data.decoding import decode_image
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.data.shots import Draw, RandomShots, demonstration_of, examples_of, generator_of, key_of
from mmicl_kernels.evaluation.asking import Asker, bank_of, prompt_builder
from mmicl_kernels.evaluation.features import Embed, nearest_shots
from mmicl_kernels.evaluation.generation import GENERATIONS, Generation, YesNo
from mmicl_kernels.evaluation.predictions import (
    Prediction,
    PredictionFile,
    adapter_digest,
    digest_of,
    model_digest,
    processor_digest,
)
from mmicl_kernels.evaluation.report import Evaluation, evaluation_of
from mmicl_kernels.evaluation.scoring import Metric, Scorer
from mmicl_kernels.evaluation.systems import BANKS, FEATURES, System, systems_of
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.teaching import evaluating
from mmicl_kernels.models.anchors import UnsupportedModelError, unwrap
from mmicl_kernels.patch import attach, load
from mmicl_kernels.patch.patches import is_patched
from mmicl_kernels.store import DemonstrationBank


def evaluate(
    model: nn.Module,
    processor: ProcessorMixin | PromptBuilder,
    records: Any,
    *,
    adapters: Mapping[str, Adapter | str | os.PathLike] | None = None,
    bank: str | os.PathLike | None = None,
    shots: Sequence[int] = (0,),
    adapter_shots: Sequence[int] = (0,),
    demonstrations: Any = None,
    retrieval: str | Draw = "random",
    features: str | os.PathLike | Embed | None = None,
    metric: str | Metric = "exact",
    auroc: bool = False,
    generation: str | Generation | None = None,
    out: str | os.PathLike | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Ask ``model`` the records without demonstrations, after some, and with each adapter; print the result.

    The table has a row for each of ``shots``, one for each adapter with each of ``adapter_shots``, and for
    an AIM adapter one for each of ``shots`` above 0, which it fuses. Adapters are attached one after another;
    the model is plain at the end, also after an error. Answers are greedy or by beams, never sampled, and
    prompts are padded on the left, so that beyond rounding nothing depends on ``batch_size``.

    With ``out`` what was answered is kept there, one folder for each row, and a run that was ended goes on
    where it was; so does one with other adapters, more shots or another metric. It gets ``results.json``,
    ``table.md`` and, where matplotlib is installed, ``scores.png``.

    Args:
        processor: or a PromptBuilder, which says how prompts are written. By default as ``training.json`` in
            the folders has it that the adapters were loaded from, else as the processor's chat template, else
            plainly.
        records: what to ask: whatever ``as_records`` takes. limit: only so many of the first.
        adapters: by name, or what ``load`` takes: their folders.
        bank: the folder of an AIM adapter's; what it lacks is added, and it is made if it does not exist. By
            default it is in ``out``, or forgotten.
        demonstrations: the pool, as ``records``, or examples. What is drawn for a query depends on the seed,
            the query and the pool.
        retrieval: "random", each at most once and never the query, more shots begin with the same ones;
            "rices", those whose ``features`` are most similar, nearest last, so that more shots end with the
            same ones; or what draws.
        features: a safetensors file, or what embeds: see ``evaluation.features``, ``ClipImages`` there.
        metric: a name in ``METRICS``, or a function of texts and records that returns a ``Score``, of which
            a higher one is better.
        auroc: for "yes-no": also the area under the ROC curve of the probability of yes as first token.
        generation: a name in ``GENERATIONS``, by default that of the metric, or a ``Generation``.

    Raises:
        TypeError, ValueError: an argument is not as above, the model has adapters attached already, or
        predictions in ``out`` were made with other settings. CheckpointError: an adapter or a bank of another
        model. FileNotFoundError, BadRecord: of what is read.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size!r}, limit {limit!r}, expected at least 1")
    _check_plain(model)
    queries = _First(as_records(records), limit)
    settings = _generation(generation, metric)
    scorer = Scorer(metric, queries, with_auroc=auroc)
    chosen = _adapters(adapters or {}, model)
    systems = systems_of(chosen, shots, adapter_shots)
    if bank is not None and not any(system.fused for system in systems):
        raise ValueError("bank is given, expected an AIM adapter among the adapters, or no bank")
    folder, bank = (None if x is None else Path(x) for x in (out, bank))
    most = max(system.shots for system in systems)
    options = {"cache": folder and folder / FEATURES, "batch_size": batch_size, "progress": progress}
    pool, draw, drawn = _pool(queries, demonstrations, most, retrieval, features, options)
    builder = prompt_builder(processor, chosen, model)
    for query in queries:
        _check_text(builder, query)
    yes_no = YesNo.of(builder.processor.tokenizer) if auroc else None
    with tempfile.TemporaryDirectory() as temporary, evaluating(model):
        run = _Run(
            model, builder, queries, chosen, bank, folder, Path(temporary), pool, draw, drawn, seed, settings,
            yes_no, batch_size,
        )  # fmt: skip
        predictions = run.answers(systems, progress)
    common = {
        "model": str(getattr(model.config, "_name_or_path", "")),
        "prompt": builder.settings,
        "generation": asdict(settings),
        "seed": seed,
        "retrieval": drawn,
    }
    made = evaluation_of(predictions, scorer, settings.cut, builder.ending, common)
    if folder is not None:
        made.save(folder)
    return made


@dataclass
class _Run:
    """Answers of every system to every query, kept batch by batch."""

    model: nn.Module
    builder: PromptBuilder
    queries: Sequence[Record]
    adapters: Mapping[str, Adapter]
    bank: Path | None
    out: Path | None
    temporary: Path
    pool: Sequence[Any]
    draw: Draw
    drawn: str
    seed: int
    generation: Generation
    yes_no: YesNo | None
    batch_size: int

    def answers(self, systems: Sequence[System], progress: bool) -> dict[System, list[Prediction]]:
        common = self._common_settings()
        files = {x: self._file(x, common) for x in systems}
        ids, missing = [], {x: set() for x in systems}
        for query in self.queries:
            ids.append(query.id)
            asked = cache(partial(self._digest, query))  # rows with as many demonstrations ask the same
            for x in systems:
                if files[x].find(query.id, partial(asked, x.shots)) is None:
                    missing[x].add(query.id)
        total = len(systems) * len(ids)
        known = total - sum(map(len, missing.values()))
        with tqdm(total=total, initial=known, unit="query", disable=not progress) as bar:
            for system in systems:
                bar.set_description(system.name)
                self._answer(system, missing[system], files[system], bar)
        return {x: [files[x][id] for id in ids] for x in systems}

    def _answer(self, system: System, missing: Set[str], file: PredictionFile, bar: tqdm) -> None:
        if not missing:
            return
        device = self.builder.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with self._asker(system) as asker:
            # Batches begin where they would without an interruption, so rounding is the same, too.
            for start in range(0, len(self.queries), self.batch_size):
                places = range(len(self.queries))[start : start + self.batch_size]
                batch = [x for x in map(self.queries.__getitem__, places) if x.id in missing]
                if batch:
                    file.add(self._batch(asker, system, batch))
                    bar.update(len(batch))

    def _batch(self, asker: Asker, system: System, batch: Sequence[Record]) -> list[Prediction]:
        rows = [self._drawn(x, system.shots) for x in batch]
        try:
            queries = [x.demonstration() for x in batch]
            shots = [[demonstration_of(x) for x in row] for row in rows]
            made = asker(queries, shots, self.generation, self.yes_no)
        except ValueError as error:
            for x in (*batch, *(x for row in rows for x in row)):
                _check_images(x)
            raise ValueError(f"{system.name}, records {[x.id for x in batch]}: {error}") from error
        device = self.builder.device
        return [
            Prediction(
                id=record.id,
                asked=digest_of(record, shots[i]),
                text=made.texts[i],
                yes=None if made.yes is None else made.yes[i],
                demonstrations=[key_of(x) for x in rows[i]],
                prompt_tokens=made.prompt_tokens[i],
                image_tokens=made.image_tokens[i],
                batch_size=self.batch_size,
                seconds=made.seconds / len(batch),
                first_seconds=made.first_seconds,
                peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            )
            for i, record in enumerate(batch)
        ]

    def _digest(self, query: Record, shots: int) -> str:
        return digest_of(query, map(demonstration_of, self._drawn(query, shots)))

    def _drawn(self, query: Record, shots: int) -> list[Any]:
        if not shots:
            return []
        generator = generator_of(query, seed=self.seed)
        return [self.pool[i] for i in self.draw(self.pool, query, shots, generator)]

    @contextmanager
    def _asker(self, system: System) -> Iterator[Asker]:
        """With the system's adapter attached."""
        if system.adapter is None:
            yield Asker(self.model, self.builder)
            return
        adapter = self.adapters[system.adapter]
        bank = self._bank(system) if system.fused else None
        with attach(self.model, adapter, bank=bank) as handle:
            yield Asker(self.model, self.builder, handle)

    def _bank(self, system: System) -> DemonstrationBank:
        folder = self.bank or (self.out or self.temporary) / BANKS / system.adapter
        return bank_of(folder, self.adapters[system.adapter], self.builder, self.model.dtype)

    def _common_settings(self) -> dict[str, Any]:
        generation = asdict(self.generation)
        del generation["cut"]  # comes after
        return {
            "model": model_digest(unwrap(self.model)),
            "processor": processor_digest(self.builder.processor),
            "prompt": self.builder.settings,
            "generation": generation,
            "yes_no": self.yes_no is not None,
        }

    def _file(self, system: System, common: Mapping[str, Any]) -> PredictionFile:
        own = dict(common, shots=system.shots)
        if system.shots:
            own |= {"retrieval": self.drawn, "seed": self.seed}
        if system.adapter is not None:
            own["adapter"] = adapter_digest(self.adapters[system.adapter])
        if system.fused:
            own["bank"] = str(self._bank(system).dtype)
        return PredictionFile(None if self.out is None else self.out / system.folder, own)


class _First(Sequence[Record]):
    """The first ``limit`` records, by default all, each made when it is asked for."""

    def __init__(self, records: Sequence[Record], limit: int | None) -> None:
        self._records, self._places = records, range(len(records))[:limit]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._places[index]]


def _check_text(builder: PromptBuilder, query: Record) -> None:
    """Raise ValueError, which names the record, unless a prompt can be made of it; images are not read."""
    try:
        builder.check(Demonstration((b"",) * len(query.images), query.text, "answer"))
    except ValueError as error:
        raise ValueError(f"{query.place or f'record {query.id!r}'}: {error}") from error


def _check_images(example: Any) -> None:
    """Raise ValueError, which names the record and the file, if one of its images cannot be decoded."""
    where = getattr(example, "place", "") or key_of(example)
    images = demonstration_of(example).images
    for source, data in zip(getattr(example, "images", images), images, strict=True):
        decode_image(data, f"{where}: {getattr(source, 'name', 'an image')}")


def _check_plain(model: nn.Module) -> None:
    """Raise ValueError if adapters are attached: the rows without one would have them."""
    try:
        patched = is_patched(unwrap(model))
    except UnsupportedModelError:  # it can be asked all the same
        return
    if patched:
        raise ValueError("the model has adapters attached, expected a plain one: mk.detach(model)")


def _generation(generation: str | Generation | None, metric: str | Metric) -> Generation:
    if isinstance(generation, Generation):
        return generation
    if generation is None:
        return GENERATIONS.get(metric, Generation()) if isinstance(metric, str) else Generation()
    if generation not in GENERATIONS:
        expected = f"expected a Generation or one of {', '.join(GENERATIONS)}"
        raise ValueError(f"generation is {generation!r}, {expected}")
    return GENERATIONS[generation]


def _adapters(given: Mapping[str, Adapter | str | os.PathLike], model: nn.Module) -> dict[str, Adapter]:
    if not isinstance(given, Mapping):
        raise TypeError(f"adapters is a {type(given).__name__}, expected a dict of names and adapters")
    for name, x in given.items():
        if not isinstance(x, Adapter | str | os.PathLike):
            raise TypeError(f"adapter {name!r} is a {type(x).__name__}, expected an adapter or its folder")
    return {name: x if isinstance(x, Adapter) else load(x, model) for name, x in given.items()}


def _pool(
    queries: Sequence[Record],
    demonstrations: Any,
    most: int,
    retrieval: str | Draw,
    features: Any,
    options: Mapping[str, Any],
) -> tuple[Sequence[Any], Draw, str]:
    """Examples to draw from, what draws, and what that is called. Raises ValueError: there are too few."""
    if not callable(retrieval) and retrieval not in ("random", "rices"):
        raise ValueError(f"retrieval is {retrieval!r}, expected 'random', 'rices' or what draws")
    if (retrieval == "rices") != (features is not None):
        raise ValueError(f"retrieval is {retrieval!r}, features {features!r}, expected features for 'rices'")
    if most == 0:
        return (), RandomShots(), "none"
    if demonstrations is None:
        raise ValueError(f"demonstrations is None, expected examples for up to {most} shots")
    pool = examples_of(demonstrations)
    draw, name = RandomShots(), "random"
    if retrieval == "rices":
        draw, name = nearest_shots(queries, pool, features, **options), "rices"
    elif callable(retrieval):
        draw, name = retrieval, getattr(retrieval, "__qualname__", type(retrieval).__qualname__)
    draw(pool, queries[0], most, generator_of(queries[0], seed=0))  # or it would fail after other rows
    return pool, draw, name
