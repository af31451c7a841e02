"""How adapters are trained, as data: a recipe for each method, and those of the papers' own code.

M2IV and AIM name no optimisation in what can be read of them: M2IV has MimIC's here, AIM's projection the
rate of SelfCP, by the same first author. Prompt tuning's paper has another optimizer; here it has MimIC's.
Official code lets a query be its own demonstration, MimIC's without
its answer; no recipe does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Attributes:
        epochs: passes over the queries; ``steps``, if given, is the number of updates instead.
        batch_size: queries at once in each process; ``accumulate`` such batches make one update.
        shots: demonstrations of the teacher (MimIC, LIVE, M2IV), or before a query (AIM); (low, high) is
            drawn for each query, for AIM. ``shots_per_pass``: how many of them one prompt has at most.
        shared_shots: whether all queries of a batch have the same ones, which the teacher reads once. They
            depend on the batch then, so that neither accumulation nor more processes are a larger batch.
        learning_rate, weight_decay, clip: of AdamW; the largest norm of a gradient.
        warmup: the fraction of the updates in which the rate rises; then it falls along a cosine.
        replacement: whether a demonstration may come twice.
        shuffle: whether the queries come in another order in each epoch.
        template: of the prompts; None is the processor's own (see ``builder_of``).

    Raises:
        TypeError, ValueError: a number of another kind, or out of range.
    """

    epochs: float = 10
    steps: int | None = None
    batch_size: int = 2
    accumulate: int = 2
    shots: int | tuple[int, int] = 8
    shots_per_pass: int | None = None
    shared_shots: bool = False
    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    replacement: bool = False
    shuffle: bool = True
    template: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "accumulate": 1, "steps": 1, "shots_per_pass": 1}.items():
            value = getattr(self, name)
            if value is not None or name in ("batch_size", "accumulate"):
                _check_whole(name, value, least)
        for value in self.shots if isinstance(self.shots, tuple) else (self.shots,):
            _check_whole("shots", value, 0)
        if isinstance(self.shots, tuple) and (len(self.shots) != 2 or self.shots[0] > self.shots[1]):
            raise ValueError(f"shots is {self.shots}, expected a number or (low, high)")
        if not isinstance(self.shared_shots, bool):
            raise TypeError(f"shared_shots is {self.shared_shots!r}, expected True or False")
        if self.shared_shots and self.shots_per_pass is not None:
            raise ValueError(f"shots_per_pass is {self.shots_per_pass} with shared_shots, expected None")
        for name in ("epochs", "learning_rate", "weight_decay", "warmup", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is {value!r}, expected a number")
            positive = name in ("epochs", "learning_rate")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"{name} is {value}, expected {'more than' if positive else 'at least'} 0")
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}, expected a fraction of the updates, 0 to 1")

    def description(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")


# MimIC's code (Kamichanw/MimIC 9eda50b, src/config): 1,000 queries, which are the demonstrations too.
_MIMIC = {"replacement": True, "shuffle": False}
# LIVE's (ForJadeForest/LIVE-Learnable-In-Context-Vector 83e8491): 8,000 queries, batches of 8 x 2 on 4 GPUs.
_LIVE = {"batch_size": 8, "accumulate": 2, "replacement": True, "shuffle": False, "template": "live"}

RECIPES = {
    "mimic": Recipe(),
    "live": Recipe(learning_rate=1e-3, batch_size=8),
    "m2iv": Recipe(shots=16),
    "aim": Recipe(shots=(1, 4), learning_rate=5e-5),
    "prompt_tuning": Recipe(shots=0),
    # Its code (bbbandari/HiFICL 198c21b, src/config and run_hifi.sh).
    "hificl": Recipe(shots=0, epochs=3, batch_size=2, accumulate=2),
    "stave": Recipe(shots=4, batch_size=4, accumulate=1, learning_rate=1e-3),
    "mimic-vqa-idefics": Recipe(shots=32, template="mimic-idefics", **_MIMIC),
    "mimic-caption-idefics": Recipe(shots=32, template="mimic-idefics-caption", **_MIMIC),
    "mimic-vqa-idefics2": Recipe(epochs=5, shots=8, template="mimic-idefics2", **_MIMIC),
    "mimic-caption-idefics2": Recipe(epochs=5, shots=8, template="mimic-idefics2-caption", **_MIMIC),
    "mimic-vqa-llava": Recipe(epochs=5, shots=8, template="mimic-llava", **_MIMIC),
    "mimic-caption-llava": Recipe(epochs=5, shots=8, template="mimic-llava-caption", **_MIMIC),
    "live-vqav2-idefics": Recipe(shots=32, learning_rate=1e-3, **_LIVE),
    "live-okvqa-idefics": Recipe(shots=32, learning_rate=5e-3, **_LIVE),
    "live-vqav2-idefics2": Recipe(shots=1, learning_rate=1e-3, **_LIVE),
}
