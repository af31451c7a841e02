"""The real model with what it has seen remembered, and labelled items to learn from."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sklearn
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import mmicl_kernels as mk
from benchmarks.experiments.smolvl import tasks
from benchmarks.experiments.smolvl.model import load_model, load_processor
from mmicl_kernels.training import RandomShots

# Tasks of other answers than those that the words mean.
RENAMED = {
    "feeling, renamed": ("feeling", {"positive": "river", "negative": "lamp"}),
    "kind, renamed": ("kind", {"animal": "glass", "food": "paper", "clothes": "stone", "vehicle": "music"}),
}
LAST_LETTER = "last letter"  # of a word
TASKS = (*tasks.TASKS, *RENAMED, LAST_LETTER)
PASSAGE = 200  # tokens of prose


@cache
def world(head: bool = True) -> tuple[nn.Module, mk.PromptBuilder]:
    """The model, which looks at each picture once, and how its prompts are written, with their first token or
    without."""
    processor = load_processor()
    return _model(), tasks.task_prompts(processor) if head else mk.PromptBuilder(processor, tasks.TEMPLATE)


@cache
def _model() -> nn.Module:
    model = load_model()
    model.model.vision_tower = Remembering(model.model.vision_tower)
    return model


class Remembering(nn.Module):
    """A frozen tower that gives what it gave when it is shown the same pixels again."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.config, self.dtype = tower, tower.config, tower.dtype
        self._seen: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        keys = [hashlib.sha256(x.contiguous().numpy()).digest() for x in pixel_values]
        new = [i for i, key in enumerate(keys) if key not in self._seen]
        if new:
            features = self.tower(pixel_values[new]).last_hidden_state
            self._seen.update((keys[i], x.clone()) for i, x in zip(new, features, strict=True))
        features = torch.stack([self._seen[key] for key in keys])
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


def unlabelled(task: str, count: int, seed: int, without: list[tasks.Row]) -> list[tasks.Row]:
    """So many other rows of the train split than ``without``, drawn whatever their answers are."""
    known = {row["id"] for row in without}
    rows = [row for row in records(task, "train") if row["id"] not in known]
    return random.Random(f"{task} {seed} unlabelled").sample(rows, min(count, len(rows)))


def records(task: str, split: str) -> list[tasks.Row]:
    """As ``tasks.records``, of ``TASKS``."""
    if task in RENAMED:
        named, names = RENAMED[task]
        return [{**row, "answer": names[row["answer"]]} for row in tasks.records(named, split)]
    if task == LAST_LETTER:
        return [{**row, "answer": row["text"][-1]} for row in tasks.records("past", split)]
    return tasks.records(task, split)


def labelled(task: str, count: int | None, seed: int) -> list[tasks.Row]:
    """So many rows of the train split, drawn by ``seed``, each answer as often as the others where there are
    few; None is all. A larger draw of the same seed has the smaller one. Of several tasks, "kind + past", so
    many of each, whose demonstrations :class:`OfTheTask` draws."""
    if " + " in task:
        return [
            {**row, "id": f"{name}: {row['id']}"}
            for name in task.split(" + ")
            for row in labelled(name, count, seed)
        ]
    rows = records(task, "train")
    mixed = random.Random(f"{task} {seed}").sample(rows, len(rows))
    by_answer: dict[str, list[tasks.Row]] = defaultdict(list)
    for row in mixed:
        by_answer[row["answer"]].append(row)
    deepest = max(map(len, by_answer.values()))
    turns = [own[i] for i in range(deepest) for own in by_answer.values() if i < len(own)]
    return turns[:count]


class OfTheTask(RandomShots):
    """Demonstrations of the query's task, of a pool that has several."""

    def for_all(
        self, pool: Sequence[Any], queries: Sequence[Any], shots: int, generator: torch.Generator
    ) -> Sequence[int]:
        (task,) = set(map(_task_of, queries))
        own = [i for i, x in enumerate(pool) if _task_of(x) == task]
        drawn = super().for_all([pool[i] for i in own], queries, shots, generator)
        return [own[i] for i in drawn]


def _task_of(example: Any) -> str:
    task, among_several, _ = example.id.partition(": ")
    return task if among_several else ""


@cache
def prose() -> tuple[str, ...]:
    """Descriptions of data sets, in plain English: what scikit-learn's package has."""
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
