"""What is run: for each experiment its runs, the most telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from benchmarks.experiments.smolvl.tasks import IMAGE_TASKS, TASKS

from .arms import (
    ALIGNED,
    CONTROL,
    HIFICL,
    MAGNITUDES,
    OFFICIAL,
    PROMPT,
    PULL,
    SHUFFLED,
    SMALL,
    STATES,
    STAVE,
)
from .runs import ICL, LORA, Run
from .world import LAST_LETTER, RENAMED

SEEDS, MORE_SEEDS = range(3), range(5)
OTHER_SEED = 100  # whose labelled items choose what the others are run with

# Updates and learning rates of the control, which has nothing but the answers, and of the others.
STEPS = (15, 30, 60)
GRID = (5e-3, 1e-2, 2e-2)
TUNED = (CONTROL, PULL, "MimIC")
TUNED_TASKS, TUNED_COUNT = ("past", "feeling"), 4

STAVE_RATES = (5e-3, 2e-2, 5e-2)
RATES = {STAVE: 5e-2}  # instead of the arm's: of ``stave``, the best on average

SYNERGIES = ("M2IV", "M2IV, no synergy", "M2IV, synergy of tokens")

# A whole, and the same without a part of it.
ABLATIONS: Mapping[str, tuple[str, ...]] = {
    CONTROL: (
        *(f"{CONTROL}, magnitude {x}" for x in MAGNITUDES),
        f"{CONTROL}, heads alike",
        f"{CONTROL}, LIVE's vectors",
        f"{CONTROL}, M2IV's vectors",
    ),
    "MimIC": (*(f"MimIC, magnitude {x}" for x in MAGNITUDES), "MimIC, heads alike"),
    "M2IV": ("M2IV, no attention vectors", "M2IV, no MLP vectors", "M2IV, no mimicry", "M2IV, no synergy"),
}
ABLATED_TASKS, ABLATED_COUNT = ("past", "feeling"), 16

TEACHERS = (1, 4, 16)  # shots of
TAUGHT_TASKS = ("past", "feeling")

# A task, and those that AIM's projection learns instead.
HELD_OUT: Mapping[str, str] = {"kind": "colour + feeling + past", "colour": "kind + feeling + past"}
LIMITS = (*RENAMED, LAST_LETTER)
METHODS = ("MimIC", CONTROL, "LIVE", "M2IV", "AIM", HIFICL, PROMPT, STAVE, LORA)
METHODS_TASKS = ("past", "feeling", "kind")
BESIDE = ("MimIC", CONTROL, PULL, "M2IV", "LIVE", HIFICL, PROMPT, LORA)

COUNTS = (4, 16, 64)
EFFICIENCY_TASKS = ("past", "feeling", "kind")
EFFICIENCY_ARMS = ("MimIC", CONTROL, PULL, SHUFFLED, OFFICIAL, "M2IV", "LIVE", HIFICL, PROMPT, LORA)

FEW = ("past", "feeling", "colour")
_FEW: dict[str, Any] = {"labelled": 4, "unlabelled": 0}
_MANY: dict[str, Any] = {"labelled": 4, "unlabelled": 64}
MANY: Mapping[str, dict[str, Any]] = {
    "4 demonstrations in the prompt": {"arm": ICL, **_FEW},
    "4 items: answers alone": {"arm": CONTROL, **_FEW},
    "4 items: pulled to zero-shot": {"arm": PULL, **_FEW},
    "4 items: MimIC of a shuffled teacher": {"arm": SHUFFLED, **_FEW},
    "4 items: MimIC": {"arm": "MimIC", **_FEW},
    "64 questions: the control's answers (self-training)": {"arm": CONTROL, "labeller": "control", **_MANY},
    "64 questions: a shuffled teacher's answers": {"arm": CONTROL, "labeller": "shuffled", **_MANY},
    "64 questions: a shuffled teacher's answers and states": {
        "arm": SHUFFLED,
        "labeller": "shuffled",
        **_MANY,
    },
    "64 questions: the teacher's states alone": {"arm": STATES, "labeller": "teacher", **_MANY},
    "64 questions: the teacher's answers": {"arm": CONTROL, "labeller": "teacher", **_MANY},
    "64 questions: the teacher's answers, pulled to zero-shot": {"arm": PULL, "labeller": "teacher", **_MANY},
    "64 questions: the teacher's answers and states": {"arm": "MimIC", "labeller": "teacher", **_MANY},
    "64 questions: the true answers": {"arm": CONTROL, "labeller": "truth", **_MANY},
}
TAUGHT = "64 questions: the teacher's answers and states"


def forms() -> list[Run]:
    """Forms of the alignment, for the default, on validation items: where the first token's states are a
    thousand times as large as the teacher's, and for the first few where they are not."""
    fields = {"labelled": 16, "seed": OTHER_SEED, "steps": 45, "split": "validation"}
    return [Run("kind", arm, head=False, **fields) for arm in ALIGNED] + [
        Run("kind", arm, **fields) for arm in (CONTROL, "MimIC", OFFICIAL, SMALL)
    ]


def tuning() -> list[Run]:
    """Updates and rates on validation items, with other labelled ones."""
    return [
        Run(task, arm, TUNED_COUNT, OTHER_SEED, steps, rate=rate, split="validation")
        for task, arm, steps, rate in product(TUNED_TASKS, TUNED, STEPS, GRID)
    ]


def stave() -> list[Run]:
    """Its rate on validation items, for ``methods``."""
    return [
        Run(task, STAVE, None, OTHER_SEED, 100, rate=rate, split="validation")
        for task, rate in product(TUNED_TASKS, STAVE_RATES)
    ]


def synergies() -> list[Run]:
    """M2IV's, for the default, on validation items."""
    tasks = ("feeling", "past", "kind")
    return [Run(task, arm, 64, OTHER_SEED, split="validation") for task, arm in product(tasks, SYNERGIES)]


def ablations() -> list[Run]:
    """What of a method does it."""
    arms = [arm for whole, parts in ABLATIONS.items() for arm in (whole, *parts)]
    return [
        Run(task, arm, ABLATED_COUNT, seed) for task, seed, arm in product(ABLATED_TASKS, MORE_SEEDS, arms)
    ]


def teachers() -> list[Run]:
    """Of few and many shots, whose answers and states at 64 questions are learnt; and as many items alone."""
    runs = []
    for task, seed, k in product(TAUGHT_TASKS, SEEDS, TEACHERS):
        runs += [Run(task, arm, k, seed, shots=k) for arm in (ICL, CONTROL)]
        runs.append(Run(task, "MimIC", k, seed, shots=k, unlabelled=64, labeller="teacher"))
    return runs


def limits() -> list[Run]:
    """What the model cannot learn from its prompt."""
    runs = []
    for seed, task in product(SEEDS, LIMITS):
        runs += [Run(task, arm, None, seed, 100, shots=16) for arm in (ICL, CONTROL, "MimIC")]
    return runs


def held_out() -> list[Run]:
    """AIM's projection on a task that it did not learn, beside one that learnt nothing, and one of noise."""
    runs = []
    for seed, (task, others) in product(SEEDS, HELD_OUT.items()):
        runs.append(Run(others, "AIM", None, seed, 100, asked=task))
        runs += [Run(task, arm, None, seed, 0) for arm in ("AIM", "AIM, random projection")]
        runs += [Run(task, "AIM", None, seed, 100), Run(task, ICL, None, seed)]
    return runs


def elsewhere() -> list[Run]:
    """What an adapter costs where it has no business."""
    fields = {"labelled": 64, "elsewhere": True}
    return [Run("feeling", arm, seed=seed, **fields) for seed, arm in product(SEEDS, (ICL, *BESIDE))]


def default() -> list[Run]:
    """The defaults on every task, with all labelled items: against the control and demonstrations."""
    runs, tasks = [], sorted(TASKS, key=lambda task: task in IMAGE_TASKS)  # those that take minutes come last
    for seed, task in product(SEEDS, tasks):
        runs += [Run(task, arm, None, seed, 100) for arm in ("MimIC", CONTROL)]
    for seed, task in product(SEEDS, tasks):
        runs += [Run(task, ICL, None, seed, shots=k) for k in (8, 16)]
        runs.append(Run(task, "M2IV", None, seed, 100))
        runs += [Run(task, "AIM", None, seed, 100)] if task in IMAGE_TASKS else []
    # Where the default may be behind its control.
    return runs + [Run("kind", arm, None, seed, 100) for seed in MORE_SEEDS[3:] for arm in ("MimIC", CONTROL)]


def methods() -> list[Run]:
    """Each method with all labelled items, beside LoRA; AIM where there are images to fuse."""
    runs = []
    for task, seed in product(METHODS_TASKS, SEEDS):
        arms = [x for x in METHODS if x != "AIM" or task in IMAGE_TASKS]
        runs += [Run(task, arm, None, seed, 100, rate=RATES.get(arm)) for arm in arms]
        runs.append(Run(task, ICL, None, seed, shots=8))
    return runs


def efficiency() -> list[Run]:
    """Accuracy against the number of labelled items, first where methods are close."""
    close = (CONTROL, "MimIC", OFFICIAL, SHUFFLED, PULL)
    runs = [Run("past", arm, 4, seed) for seed, arm in product(MORE_SEEDS[3:], close)]
    for task, seed, count in product(EFFICIENCY_TASKS, SEEDS, COUNTS):
        runs += [Run(task, arm, count, seed) for arm in EFFICIENCY_ARMS]
        runs += [Run(task, ICL, count, seed, shots=16)] if count <= 16 else []
    return runs


def unlabelled() -> list[Run]:
    """A teacher that knows what few labelled items do not say: many questions without answers."""
    return [
        Run(task, seed=seed, shots=4, **fields)
        for task, seed, fields in product(FEW, MORE_SEEDS, MANY.values())
    ]


EXPERIMENTS: Mapping[str, Callable[[], list[Run]]] = {
    f.__name__: f
    for f in (
        forms,
        tuning,
        stave,
        synergies,
        default,
        methods,
        unlabelled,
        efficiency,
        ablations,
        teachers,
        limits,
        held_out,
        elsewhere,
    )  # fmt: skip
}
