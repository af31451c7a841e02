"""The tables and plots of what was run: ``python -m benchmarks.experiments.evidence.report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import fill_tables

from .arms import ARMS, CONTROL
from .experiments import COUNTS, EFFICIENCY_ARMS, EFFICIENCY_TASKS, FEW, MANY, RATES, RATES_TASKS, TASKS
from .runs import ICL, Run, read

PAGE = Path(__file__).parents[3] / "docs" / "evidence.md"
PLOT = Path(__file__).with_name("efficiency.png")
RESAMPLES = 10_000

# By seed, 1 where the answer to a query is right and 0 else.
Right = Mapping[int, np.ndarray]


def right(found: Mapping[Run, dict], **fields: Any) -> Right:
    """Of the runs whose fields are those."""
    return {
        run.seed: np.array([int(x) for x in row["right"]])
        for run, row in found.items()
        if all(getattr(run, name) == value for name, value in fields.items())
    }


def accuracy(x: Right) -> str:
    """In percent: the mean over seeds, and the lowest and highest of several."""
    if not x:
        return ""
    each = [100 * own.mean() for own in x.values()]
    return f"{np.mean(each):.0f}" + (f" ({min(each):.0f} to {max(each):.0f})" if len(each) > 1 else "")


def minus(a: Right, b: Right) -> str:
    """In percentage points, with the 95 % interval; seeds and queries, which both share, are drawn anew."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return ""
    gaps = 100 * np.stack([a[seed] - b[seed] for seed in seeds])
    generator = np.random.default_rng(0)
    rows = generator.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    columns = generator.integers(gaps.shape[1], size=(RESAMPLES, gaps.shape[1]))
    drawn = [gaps[row][:, column].mean() for row, column in zip(rows, columns, strict=True)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{gaps.mean():+.0f} ({low:+.0f} to {high:+.0f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def forms_table() -> str:
    found = read("forms")
    arms = [CONTROL, *(x for x in ARMS if x.startswith("MimIC"))]
    rows = [[arm, *(accuracy(right(found, arm=arm, head=head)) for head in (True, False))] for arm in arms]
    return markdown(["alignment", "`kind`", "`kind`, no first token"], rows)


def rates_table() -> str:
    found = read("rates")
    rows = []
    for arm, grid in RATES.items():
        for rate in grid:
            shown = [accuracy(right(found, task=task, arm=arm, rate=rate)) for task in RATES_TASKS]
            rows.append([arm, f"{rate:g}", *shown])
    return markdown(["", "rate", *(f"`{task}`" for task in RATES_TASKS)], rows)


def default_table() -> str:
    found = read("default")
    columns = [
        "",
        "8-shot",
        "16-shot",
        CONTROL,
        "MimIC",
        "MimIC minus control",
        "M2IV",
        "M2IV minus 8-shot",
        "AIM, 8 fused",
    ]
    rows = []
    for task in TASKS:
        few, many = (right(found, task=task, arm=ICL, shots=k) for k in (8, 16))
        control, mimic, m2iv, aim = (
            right(found, task=task, arm=x) for x in (CONTROL, "MimIC", "M2IV", "AIM")
        )
        shown = [*map(accuracy, (few, many, control, mimic)), minus(mimic, control)]
        rows.append([f"`{task}`", *shown, accuracy(m2iv), minus(m2iv, few), accuracy(aim)])
    return markdown(columns, rows)


def efficiency_table() -> str:
    found = read("efficiency")
    rows = []
    for task in EFFICIENCY_TASKS:
        for arm in (ICL, *EFFICIENCY_ARMS):
            own = [right(found, task=task, arm=arm, labelled=count) for count in COUNTS]
            control = [right(found, task=task, arm=CONTROL, labelled=count) for count in COUNTS]
            gaps = [
                minus(*pair) if arm not in (CONTROL, ICL) else "" for pair in zip(own, control, strict=True)
            ]
            cells = [f"{accuracy(x)}{gap and f'; {gap}'}" for x, gap in zip(own, gaps, strict=True)]
            rows.append([f"`{task}`", arm, *cells])
    return markdown(["", "", *(f"{count} items" for count in COUNTS)], rows)


def unlabelled_table() -> str:
    found = read("unlabelled")
    rows = []
    for task in FEW:
        best = right(found, task=task, arm="MimIC", labeller="teacher")
        for name, fields in MANY.items():
            own = right(found, task=task, **fields)
            rows.append([f"`{task}`", name, accuracy(own), minus(best, own)])
    return markdown(["", "learnt from", "right", "MimIC, taught, minus this"], rows)


def plot() -> None:
    """Accuracy against the number of labelled items."""
    found = read("efficiency")
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, task in zip(
        figure.subplots(1, len(EFFICIENCY_TASKS), sharey=True), EFFICIENCY_TASKS, strict=True
    ):
        for arm in (ICL, *EFFICIENCY_ARMS):
            each = {count: right(found, task=task, arm=arm, labelled=count) for count in COUNTS}
            known = {
                count: 100 * np.mean([x.mean() for x in own.values()]) for count, own in each.items() if own
            }
            axis.plot(
                list(known), list(known.values()), "o-" if arm != ICL else "s--", label=arm, linewidth=1
            )
        axis.set(
            title=task,
            xlabel="labelled items",
            xscale="log",
            xticks=COUNTS,
            xticklabels=COUNTS,
            ylim=(0, 101),
        )
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right, %")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(PLOT, dpi=120)


def tables() -> dict[str, str]:
    """Markdown by the name of its marker."""
    return {
        "evidence-forms": forms_table(),
        "evidence-rates": rates_table(),
        "evidence-default": default_table(),
        "evidence-efficiency": efficiency_table(),
        "evidence-unlabelled": unlabelled_table(),
    }


def main() -> None:
    PAGE.write_text(fill_tables(PAGE.read_text(), tables()))
    plot()


if __name__ == "__main__":
    main()
