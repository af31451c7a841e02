"""Adapters of the tiny LVLM: one per task, trained against the same model with demonstrations."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from mmicl_kernels.methods import Adapter
from mmicl_kernels.training import (
    AggregationBatch,
    AIMObjective,
    EpisodeBatch,
    LIVEObjective,
    M2IVObjective,
    ManyShotBatch,
    MimICObjective,
    TrainingConfig,
    train,
    trainable,
)

OBJECTIVES = {"mimic": MimICObjective, "live": LIVEObjective, "m2iv": M2IVObjective, "aim": AIMObjective}


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Attributes:
        steps, batch: updates, and queries in each.
        shots, passes: the teacher's demonstrations, split evenly over this many prompts.
    """

    steps: int = 300
    batch: int = 16
    shots: int = 8
    passes: int = 1
    learning_rate: float = 5e-3


def train_adapter(
    model: nn.Module,
    task: str,
    *,
    config: object,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Adapter:
    """An adapter for ``task`` of the method of ``config``, trained on the train split alone.

    The model is left as it was.
    """
    recipe = recipe or Recipe()
    drawn = batches(task, recipe, torch.Generator().manual_seed(seed))
    return fit(model, config, drawn, recipe.steps, seed, recipe.learning_rate, progress)


def fit(
    model: nn.Module,
    config: object,
    drawn: Iterator[EpisodeBatch | AggregationBatch],
    steps: int,
    seed: int,
    learning_rate: float = Recipe.learning_rate,
    progress: bool = True,
    weight_decay: float = TrainingConfig.weight_decay,
) -> Adapter:
    """A new adapter of the method of ``config``, trained for ``steps`` of the batches ``drawn``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = mk.create(model, config)
    with mk.attach(model, adapter) as handle:
        objective = OBJECTIVES[adapter.method](handle)
        settings = TrainingConfig(learning_rate=learning_rate, weight_decay=weight_decay)
        train(objective, trainable(adapter), drawn, steps, model=model, config=settings, progress=progress)
    return adapter.requires_grad_(False)


def batches(task: str, recipe: Recipe, generator: torch.Generator) -> Iterator[EpisodeBatch]:
    """Endless batches; queries and demonstrations are drawn anew for each."""
    while True:
        demonstrations, queries = data.draw_episodes(
            recipe.batch, recipe.shots, split="train", generator=generator, augment=True
        )
        student = data.episode_inputs(None, queries, task)
        teachers = [
            data.episode_inputs(demonstrations[:, part], queries, task)
            for part in torch.arange(demonstrations.shape[1]).tensor_split(recipe.passes)
        ]
        yield ManyShotBatch(
            student.inputs,
            teachers[0].inputs,
            student.query_mask,
            teachers[0].query_mask,
            student.labels,
            tuple((teacher.inputs, teacher.query_mask) for teacher in teachers[1:]),
        )
