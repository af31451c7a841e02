"""What a metric returns, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Score:
    """A metric's value of a whole data set, and what each sample adds to it.

    ``value`` is a fraction from 0 to 1 (CIDEr-D: 0 to 10). ``samples``: float64 ``[N]``, in the order of the
    predictions; two systems on the same records have samples that can be compared one to one.
    """

    value: float
    samples: np.ndarray

    def resampled(self, indices: np.ndarray) -> float:
        """The value of the samples at ``indices``, int ``[M]``, which may repeat: here their mean."""
        return float(self.samples[indices].mean())


@dataclass(frozen=True, eq=False)
class Ratio(Score):
    """A sum over a sum: ``numerators`` and ``denominators`` are float64 ``[N]``.

    ``value`` is nan where nothing was counted. ``samples`` are each sample's own ratio, 0 where it counted
    nothing; their mean is not ``value``.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def of(cls, numerators: np.ndarray, denominators: np.ndarray) -> Ratio:
        own = np.divide(numerators, denominators, out=np.zeros(len(numerators)), where=denominators > 0)
        return cls(_ratio(numerators, denominators), own, numerators, denominators)

    def resampled(self, indices: np.ndarray) -> float:
        return _ratio(self.numerators[indices], self.denominators[indices])


def mean_score(samples: Sequence[float] | np.ndarray) -> Score:
    samples = np.asarray(samples, dtype=np.float64)
    return Score(float(samples.mean()), samples)


def check_lengths(**columns: Sequence) -> None:
    """Raises ``ValueError`` unless all columns have as many samples as the first, and there is one.

    A string is no column (``TypeError``): its letters are not samples.
    """
    first, *_ = columns
    for name, values in columns.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise TypeError(f"{name} must be a sequence of samples, got {type(values).__name__} {values!r}")
        if len(values) != len(columns[first]):
            raise ValueError(f"{name} has {len(values)} samples, but {first} has {len(columns[first])}")
    if len(columns[first]) == 0:
        raise ValueError(f"{first} is empty: there is nothing to score")


def check_text(name: str, position: int, value: object) -> str:
    """``value``, or a ``TypeError`` that names the sample."""
    if not isinstance(value, str):
        raise TypeError(f"{name}[{position}] must be a string, got {type(value).__name__} {value!r}")
    return value


def check_texts(name: str, position: int, values: object) -> list[str]:
    """The non-empty list of strings of one sample; a single string is refused, its letters are no answers."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"{name}[{position}] must be a list of strings, got {values!r}")
    if len(values) == 0:
        raise ValueError(f"{name}[{position}] is empty: a sample needs at least one")
    return [check_text(f"{name}[{position}]", i, value) for i, value in enumerate(values)]


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    total = denominators.sum()
    return float(numerators.sum() / total) if total else float("nan")
