"""What is run: for each experiment its runs, the most telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from benchmarks.experiments.smolvl.tasks import IMAGE_TASKS, TASKS

from .arms import ARMS, CONTROL, OFFICIAL, PULL, SHUFFLED, SMALL, STATES
from .runs import ICL, LORA, Run

SEEDS = range(3)
OTHER_SEED = 100  # whose labelled items choose what the others are run with

GRID = (5e-3, 1e-2, 2e-2)
RATES = {
    "MimIC": GRID,
    CONTROL: GRID,
    PULL: GRID,
    "M2IV": GRID,
    "LIVE": (1e-2, 2e-2, 5e-2),
    LORA: (1e-3, 2e-3, 5e-3),
}
RATES_TASKS = ("past", "kind")

COUNTS = (4, 16, 64)
EFFICIENCY_TASKS = ("kind", "colour", "past")
EFFICIENCY_ARMS = ("MimIC", CONTROL, PULL, SHUFFLED, OFFICIAL, "M2IV", "LIVE", LORA)

FEW = ("colour", "past", "feeling")
_FEW: dict[str, Any] = {"labelled": 4, "unlabelled": 0}
_MANY: dict[str, Any] = {"labelled": 4, "unlabelled": 64}
MANY: Mapping[str, dict[str, Any]] = {
    "4 demonstrations in the prompt": {"arm": ICL, **_FEW},
    "4 items: answers alone": {"arm": CONTROL, **_FEW},
    "4 items: MimIC": {"arm": "MimIC", **_FEW},
    "4 items: pulled to zero-shot": {"arm": PULL, **_FEW},
    "4 items: MimIC of a shuffled teacher": {"arm": SHUFFLED, **_FEW},
    "64 questions: the teacher's answers and states, MimIC": {"arm": "MimIC", "labeller": "teacher", **_MANY},
    "the teacher's answers alone": {"arm": CONTROL, "labeller": "teacher", **_MANY},
    "the control's answers alone (self-training)": {"arm": CONTROL, "labeller": "control", **_MANY},
    "the control's answers, pulled to zero-shot": {"arm": PULL, "labeller": "control", **_MANY},
    "a shuffled teacher's answers and states, MimIC": {"arm": SHUFFLED, "labeller": "shuffled", **_MANY},
    "the teacher's states alone": {"arm": STATES, "labeller": "teacher", **_MANY},
    "the true answers alone": {"arm": CONTROL, "labeller": "truth", **_MANY},
}


def forms() -> list[Run]:
    """Forms of the alignment, for the default, on validation items: where the first token's states are a
    thousand times as large as the teacher's, and for the first few where they are not."""
    arms = [CONTROL, *(arm for arm in ARMS if arm.startswith("MimIC"))]
    fields = {"labelled": 16, "seed": OTHER_SEED, "steps": 45, "split": "validation"}
    return [Run("kind", arm, head=False, **fields) for arm in arms] + [
        Run("kind", arm, **fields) for arm in (CONTROL, "MimIC", OFFICIAL, SMALL)
    ]


def rates() -> list[Run]:
    """Learning rates, on validation items with other labelled ones."""
    return [
        Run(task, arm, 16, OTHER_SEED, rate=rate, split="validation")
        for task, arm in product(RATES_TASKS, RATES)
        for rate in RATES[arm]
    ]


def default() -> list[Run]:
    """The defaults on every task, with all labelled items: against the control and demonstrations."""
    runs = []
    for seed, task in product(SEEDS, TASKS):
        arms = ("MimIC", CONTROL, "M2IV", *(["AIM"] if task in IMAGE_TASKS else []))
        runs += [Run(task, arm, None, seed, 100) for arm in arms]
        runs += [Run(task, ICL, None, seed, shots=k) for k in (8, 16)]
    return runs


def efficiency() -> list[Run]:
    """Accuracy against the number of labelled items."""
    runs = []
    for seed, task, count in product(SEEDS, EFFICIENCY_TASKS, COUNTS):
        runs += [Run(task, arm, count, seed) for arm in EFFICIENCY_ARMS]
        runs += [Run(task, ICL, count, seed, shots=16)] if count <= 16 else []
    return runs


def unlabelled() -> list[Run]:
    """A teacher that knows what few labelled items do not say: many questions without answers."""
    return [
        Run(task, seed=seed, shots=4, **fields)
        for seed, task in product(SEEDS, FEW)
        for fields in MANY.values()
    ]


EXPERIMENTS: Mapping[str, Callable[[], list[Run]]] = {
    f.__name__: f for f in (forms, rates, default, efficiency, unlabelled)
}
