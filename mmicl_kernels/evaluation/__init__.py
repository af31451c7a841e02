"""Scores of what a model generated, and how sure they are."""

from .intervals import Gap, Interval, bootstrap_interval, gap, paired_bootstrap, wilson_interval
from .metrics import METRICS, Score

__all__ = [
    "METRICS",
    "Gap",
    "Interval",
    "Score",
    "bootstrap_interval",
    "gap",
    "paired_bootstrap",
    "wilson_interval",
]
