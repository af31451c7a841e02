"""How far a score of N samples can be off, and the difference of two systems on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# A score of the samples at int indices [M], which may repeat.
Statistic = Callable[[np.ndarray], float]

# Indices drawn at a time: 8 MiB of int64.
_DRAWN_AT_ONCE = 2**20


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; ``z`` is the normal quantile, by default of 95 %."""
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"expected 0 <= correct <= total and total > 0, got {correct} of {total}")
    rate, spread = correct / total, z * z / total
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    centre = rate + spread / 2
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


@dataclass(frozen=True)
class Interval:
    """``value`` of the samples as they are, and the range ``low`` to ``high`` at confidence ``level``."""

    value: float
    low: float
    high: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.level:.0%} interval {self.low:.4f} to {self.high:.4f})"


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray | Statistic,
    *,
    count: int | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, or of any score of a data set.

    ``scores``: one finite number per sample ``[N]``, whose mean is the value; or a function of indices, such
    as the ``resampled`` of ``auroc(...)`` or of ``chair(...).instance``, with the number of samples as
    ``count``. Samples are drawn with replacement, ``N`` at a time; the bounds are the
    quantiles ``(1 - level) / 2`` and ``(1 + level) / 2`` of the ``resamples`` values. The same ``seed`` gives
    the same draws, hence the same interval.

    Coverage. For means of N samples it is that of a normal interval whose spread is divided by N, not N - 1:
    at ``level=0.95`` about 0.904 for N = 10, 0.936 for 30, 0.946 for 100, less for skewed scores; below some
    30 samples it is too narrow. Samples that are all equal give an interval without width, which is not
    certainty: for right-or-wrong scores near 0 or 1 use ``wilson_interval``. Records that share an image are
    not independent; then it is too narrow as well.

    A resample whose value is nan (AUROC: a single class) is left out. Memory: about 20 MiB beyond the scores.

    Raises ``ValueError`` for fewer than two samples, scores that are not finite, a ``level`` outside (0, 1),
    no resamples, ``count`` beside numbers or missing beside a function, or if half of the resamples are nan.
    """
    statistic, samples = _statistic("scores", scores, count)
    return _percentile(statistic, samples, level, resamples, seed)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray | Statistic,
    b: Sequence[float] | np.ndarray | Statistic,
    *,
    count: int | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of ``a - b``, two systems on the *same* samples in the same order.

    Both get the same draws, so that hard samples are hard for both: the interval is narrower than those of
    two separate scores suggest. ``a`` and ``b`` are as ``scores`` of ``bootstrap_interval``, both numbers or
    both functions; so are its coverage and its other errors. ``ValueError`` also if ``a`` and ``b`` have
    other lengths.
    """
    if callable(a) != callable(b):
        raise ValueError("a and b must both be numbers or both be functions of indices")
    first, samples = _statistic("a", a, count)
    second, others = _statistic("b", b, count)
    if samples != others:
        raise ValueError(f"a and b must be of the same samples, got {samples} and {others}")
    if isinstance(first, _Mean):
        return _percentile(_Mean(first.scores - second.scores), samples, level, resamples, seed)
    return _percentile(lambda indices: first(indices) - second(indices), samples, level, resamples, seed)


@dataclass(frozen=True)
class Gap:
    """``difference``: what demonstrations add to the zero-shot score. ``str(gap)`` says it in words."""

    difference: Interval

    @property
    def exists(self) -> bool:
        """Whether there is a gap to close: demonstrations help, and chance alone hardly explains it."""
        return self.difference.low > 0

    def __str__(self) -> str:
        if self.exists:
            return f"a gap to close: demonstrations add {self.difference}"
        if self.difference.high < 0:
            x = self.difference
            lost = Interval(-x.value, -x.high, -x.low, x.level)
            return f"no gap to close: demonstrations make it worse by {lost}"
        return f"no gap to close: what demonstrations add, {self.difference}, may be nothing"


def gap(
    zero_shot: Sequence[float] | np.ndarray | Statistic,
    k_shot: Sequence[float] | np.ndarray | Statistic,
    *,
    count: int | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Gap:
    """Whether k-shot prompts beat zero-shot ones on the same samples: what an adapter could win back at all.

    Arguments and errors as in ``paired_bootstrap``. Higher scores must be better.
    """
    difference = paired_bootstrap(k_shot, zero_shot, count=count, level=level, resamples=resamples, seed=seed)
    return Gap(difference)


class _Mean:
    """The mean as a statistic, for many resamples at once."""

    def __init__(self, scores: np.ndarray):
        self.scores = scores

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return self.scores[indices].mean(axis=-1)


def _statistic(name: str, scores: object, count: int | None) -> tuple[Statistic, int]:
    """A function of indices, and how many samples they index."""
    if callable(scores):
        if count is None:
            raise ValueError(f"{name} is a function of indices: count must be its number of samples")
    else:
        if count is not None:
            raise ValueError(f"count is for functions of indices, but {name} is numbers")
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise ValueError(f"{name} must be finite numbers in one dimension, got shape {scores.shape}")
        scores, count = _Mean(scores), len(scores)
    if count < 2:
        raise ValueError(f"{name} must have at least two samples, got {count}")
    return scores, count


def _percentile(statistic: Statistic, count: int, level: float, resamples: int, seed: int) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    rows = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        part = statistic(drawn) if isinstance(statistic, _Mean) else [statistic(row) for row in drawn]
        values[start : start + rows] = part
    kept = values[~np.isnan(values)]
    if len(kept) <= resamples / 2:
        raise ValueError(f"{resamples - len(kept)} of {resamples} resamples have no value (nan)")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(np.arange(count))), float(low), float(high), level)
