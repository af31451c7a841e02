"""A recipe as the arguments of a Trainer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mmicl_kernels.training.recipes import Recipe

if TYPE_CHECKING:  # importing the Trainer takes seconds
    from transformers import TrainingArguments

CHECKPOINTS = 0.1  # of the updates, from one to the next
MINE = ("output_dir", "remove_unused_columns", "seed")
# Of the fields, what changes how a run is watched and not what it makes.
WATCHING = ("log", "report", "run_name", "disable_tqdm", "push", "hub", "dataloader_num", "dataloader_p")
# An evaluation is followed by a checkpoint, which may be the best.
TOGETHER = {"save_steps": "eval_steps", "save_strategy": "eval_strategy"}


def require_accelerate() -> None:
    """Raise ImportError if it is missing."""
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("mmicl_kernels.train needs accelerate: pip install 'mmicl-kernels[train]'")


def training_arguments(
    recipe: Recipe,
    given: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    kept: bool,
    validated: bool,
    seed: int,
    progress: bool = True,
) -> TrainingArguments:
    """The recipe's and, before them, ``given``. ``kept`` is whether ``folder`` is, and so has checkpoints.

    Raises:
        ImportError: accelerate is missing. TypeError, ValueError: ``given`` has no such field, or one that a
        training cannot have; ``seed`` is none.
    """
    require_accelerate()
    from transformers import TrainingArguments

    unknown = sorted(set(given) - set(TrainingArguments.__dataclass_fields__) | set(MINE) & set(given))
    if unknown:
        raise ValueError(
            f"arguments has {unknown}, expected fields of transformers.TrainingArguments, without "
            f"{sorted(MINE)}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}, expected an integer")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, expected 0 to 2^32 - 1")
    options = {**_fields(recipe, kept, validated), **given}
    if "num_train_epochs" in given and "max_steps" not in given:
        options["max_steps"] = -1
    for pair in TOGETHER.items() if validated else ():
        for one, other in (pair, pair[::-1]):
            if one in given and other not in given:
                options[other] = given[one]
    if options["eval_strategy"] == "no":
        options["load_best_model_at_end"] = False
    options |= {"seed": seed, "output_dir": str(folder), "remove_unused_columns": False}
    made = TrainingArguments(**{"disable_tqdm": not progress, **options})
    if made.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {made.label_smoothing_factor}, expected 0")
    return made


def deciding(given: Mapping[str, Any]) -> dict[str, str]:
    """Those of ``given`` that decide what a training makes, as text."""
    return {name: str(x) for name, x in sorted(given.items()) if not name.startswith(WATCHING)}


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
