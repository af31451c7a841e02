"""Adapters of the tiny LVLM: one per task, trained against the same model with demonstrations."""

from collections.abc import Sequence

import torch
from torch import nn

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.processor import DigitsPrompts
from mmicl_kernels.methods import Adapter

RECIPE = mk.Recipe(steps=300, batch_size=16, accumulate=1)
# Prompts are made while the model is busy; the bar is all that is shown.
ARGUMENTS = {"dataloader_num_workers": 1, "logging_strategy": "no"}


def train_adapter(
    model: nn.Module,
    task: str,
    *,
    config: object,
    recipe: mk.Recipe = RECIPE,
    seed: int = 0,
    progress: bool = True,
) -> Adapter:
    """An adapter for ``task`` of the method of ``config``, trained on the train split alone.

    The model is left as it was.
    """
    examples = training_examples((task,), recipe, seed)
    return mk.train(
        model, DigitsPrompts(), examples, config,
        recipe=recipe, draw=data.other_scans, seed=seed, arguments=ARGUMENTS, progress=progress,
    )  # fmt: skip


def training_examples(tasks: Sequence[str], recipe: mk.Recipe, seed: int) -> data.Examples:
    """Queries and demonstrations to train with: as many drawings as queries, at least one of each scan."""
    count = max(len(data.split_scans("train")), recipe.steps * recipe.batch_size)
    generator = torch.Generator().manual_seed(seed)
    return data.Examples(tasks, "train", generator=generator, count=count, augment=True)
