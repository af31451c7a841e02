"""The real model with what it has seen remembered, and labelled items to learn from."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from functools import cache

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import mmicl_kernels as mk
from benchmarks.experiments.smolvl import tasks
from benchmarks.experiments.smolvl.model import load_model, load_processor


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
    rows = [row for row in tasks.records(task, "train") if row["id"] not in known]
    return random.Random(f"{task} {seed} unlabelled").sample(rows, min(count, len(rows)))


def labelled(task: str, count: int | None, seed: int) -> list[tasks.Row]:
    """So many rows of the train split, drawn by ``seed``, each answer as often as the others where there are
    few; None is all. A larger draw of the same seed has the smaller one."""
    rows = tasks.records(task, "train")
    mixed = random.Random(f"{task} {seed}").sample(rows, len(rows))
    by_answer: dict[str, list[tasks.Row]] = defaultdict(list)
    for row in mixed:
        by_answer[row["answer"]].append(row)
    deepest = max(map(len, by_answer.values()))
    turns = [own[i] for i in range(deepest) for own in by_answer.values() if i < len(own)]
    return turns[:count]
