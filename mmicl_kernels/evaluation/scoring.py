"""A metric and the right answers of the records it is for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mmicl_kernels.data import Record
from mmicl_kernels.evaluation.intervals import (
    Interval,
    Statistic,
    bootstrap_interval,
    paired_bootstrap,
    wilson_interval,
)
from mmicl_kernels.evaluation.metrics import METRICS, Score, auroc, yes_no_of

# A score of the texts [N] that were answered to records [N]; a higher one is better.
Metric = Callable[[Sequence[str], Sequence[Record]], Score]
LEVEL = 0.95


class Scorer:
    """Scores texts; whatever the metric would complain of in the records it does before they are asked.

    Args:
        metric: a name in ``METRICS``, or a function. with_auroc: whether there will be probabilities of yes.

    Raises:
        ValueError: an unknown metric, a record without what it needs, or all records have one answer, which
        AUROC cannot use. ImportError, LookupError: as the metric.
    """

    def __init__(self, metric: str | Metric, records: Sequence[Record], *, with_auroc: bool = False) -> None:
        if not callable(metric) and metric not in METRICS:
            raise ValueError(f"metric is {metric!r}, expected a function or one of {', '.join(METRICS)}")
        if len(records) < 2:
            raise ValueError(f"records has {len(records)}, expected at least 2")
        self.name = getattr(metric, "__name__", "metric") if callable(metric) else metric
        self._metric = metric if callable(metric) else _metric(metric)
        self._records = records
        self._labels: list[bool] = []
        if with_auroc:
            self._labels = [_yes(record) for record in records]
            auroc([0.0] * len(records), self._labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self(["no"] * len(records))

    def __call__(self, texts: Sequence[str]) -> Score:
        return self._metric(texts, self._records)

    def auroc(self, probabilities: Sequence[float]) -> Interval:
        """Of probabilities of yes ``[N]``."""
        score = auroc(probabilities, self._labels)
        return bootstrap_interval(score.resampled, count=len(self._labels), level=LEVEL)


def interval_of(score: Score) -> Interval:
    """95 %: Wilson's of a mean of samples that are all right or wrong, else of the bootstrap."""
    if _is_mean(score) and np.isin(score.samples, (0, 1)).all():
        correct = int(score.samples.sum())
        return Interval(score.value, *wilson_interval(correct, len(score.samples)), LEVEL)
    statistic, count = _statistic(score)
    return replace(bootstrap_interval(statistic, count=count, level=LEVEL), value=score.value)


def difference_of(score: Score, other: Score) -> Interval:
    """``score - other``, of answers to the same records: 95 %, of the paired bootstrap."""
    (first, count), (second, _) = _statistic(score), _statistic(other)
    return paired_bootstrap(first, second, count=count, level=LEVEL)


def _statistic(score: Score) -> tuple[np.ndarray | Statistic, int | None]:
    """What is resampled: samples, whose mean is faster than ``resampled``, or another score of a set."""
    return (score.samples, None) if _is_mean(score) else (score.resampled, len(score.samples))


def _is_mean(score: Score) -> bool:
    return type(score).resampled is Score.resampled


def _metric(name: str) -> Metric:
    def score(texts: Sequence[str], records: Sequence[Record]) -> Score:
        answers = [_reference(name, record) for record in records]
        if name == "choice":
            return METRICS[name](texts, answers, [record.choices for record in records])
        return METRICS[name](texts, answers)

    return score


def _reference(metric: str, record: Record) -> str | tuple[str, ...]:
    where = record.place or f"record {record.id!r}"
    if metric in ("vqa", "okvqa") and record.answers is None:
        raise ValueError(f"{where}: answers is missing, expected those of the annotators for {metric!r}")
    if metric == "choice" and record.choices is None:
        raise ValueError(f"{where}: choices is missing, expected some for 'choice'")
    if metric in ("choice", "yes-no") or record.answers is None:
        if not record.answer.strip():
            raise ValueError(f"{where}: answer is {record.answer!r}, expected a known one for {metric!r}")
        if metric == "yes-no":
            _yes(record)
        return record.answer if metric != "caption" else (record.answer,)
    return record.answers


def _yes(record: Record) -> bool:
    label = yes_no_of(record.answer)
    if label is None:
        where = record.place or f"record {record.id!r}"
        raise ValueError(f"{where}: answer is {record.answer!r}, expected yes or no")
    return label
