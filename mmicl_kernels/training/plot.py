"""The losses of a training as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

VALIDATION = "eval_"  # as a Trainer names what it evaluates
# What a line of the log has beside the loss and its parts.
OTHERS = {"step", "epoch", "learning_rate", "grad_norm", "total_flos", "train_loss"}


def plot_losses(log: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """A panel for each part of the loss over the updates, with that of the validation. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in log:
        if not any(name in line for name in ("loss", VALIDATION + "loss")):
            continue
        for name in line.keys() - OTHERS:
            part = name.removeprefix(VALIDATION)
            kind = "training" if part == name else "validation"
            curves.setdefault(part, {}).setdefault(kind, []).append((line["step"], line[name]))
    names = sorted(curves, key=lambda name: (name != "loss", name))
    figure = Figure(figsize=(4 * max(1, len(names)), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        for kind, style in (("training", "-"), ("validation", "o--")):
            if kind in curves[name]:
                axes.plot(*zip(*curves[name][kind], strict=True), style, label=kind, markersize=3)
        axes.set(title=name, xlabel="update")
        axes.legend()
    figure.savefig(path, dpi=150)
