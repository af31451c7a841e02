"""The table of an evaluation: scores, differences on the same records, and what a query costs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mmicl_kernels.durable import replacing
from mmicl_kernels.evaluation.intervals import Gap, Interval
from mmicl_kernels.evaluation.metrics import Score, postprocess
from mmicl_kernels.evaluation.predictions import Prediction
from mmicl_kernels.evaluation.scoring import Scorer, difference_of, interval_of
from mmicl_kernels.evaluation.systems import PLOT, RESULTS, TABLE, System

NONE = "-"
FEW = 30  # records: see the coverage of ``bootstrap_interval``
COLUMNS = (
    "", "score (95 %)", "minus zero-shot", "minus best k-shot", "prompt tokens (of images)", "s / query",
    "first token, ms", "GPU peak, GiB",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """How one system did.

    Attributes:
        texts: its answers as they were scored, cut, in the order of the records.
        score, interval: of them. auroc: of the probabilities of yes, if asked for.
        minus_zero_shot, minus_best: paired differences to the zero-shot row and to the best k-shot row; None
            where there is none, or it is this one.
        prompt_tokens, image_tokens: means over the prompts.
        batch_sizes: of the runs that asked it. seconds: median over queries, of the time that ``generate``
            took for their batch divided by the number of queries in it.
        first_seconds: median until the first tokens of a batch were there.
        peak_bytes: the most that was allocated on the GPU; None on a CPU.
    """

    system: System
    texts: tuple[str, ...]
    score: Score
    interval: Interval
    auroc: Interval | None
    minus_zero_shot: Interval | None
    minus_best: Interval | None
    prompt_tokens: float
    image_tokens: float
    batch_sizes: tuple[int, ...]
    seconds: float
    first_seconds: float
    peak_bytes: int | None

    @property
    def name(self) -> str:
        return self.system.name


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The rows of a table, which ``print`` shows; ``evaluation["zero-shot"]`` is one of them.

    Attributes:
        metric: its name. records: how many were asked. settings: what else the rows have in common.
        best: the name of the k-shot row with the highest score, the first of equals, or None.
        gap: what it adds to the zero-shot row; None without one of them.
    """

    rows: tuple[Row, ...]
    metric: str
    records: int
    settings: Mapping[str, Any]
    best: str | None
    gap: Gap | None

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row is named {name!r}, expected one of {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        """A table in Markdown, and what it means."""
        sizes = sorted({size for row in self.rows for size in row.batch_sizes})
        batches = f"batches of {' and '.join(map(str, sizes))}"
        lines = [f"{self.metric} of {self.records} records, {batches}", "", *self._table(), ""]
        if self.records < FEW:
            lines.append(f"below {FEW} records the intervals are too narrow: do not rely on them")
        if self.gap is not None:
            others = sum(not row.system.adapter and row.system.shots > 0 for row in self.rows)
            chosen = f", the best of {others}" if others > 1 else ""
            lines.append(f"{self.best}{chosen}: {self.gap}")
        else:
            lines.append("whether there is a gap to close: not known without zero-shot and k-shot rows")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write ``results.json``, ``table.md`` and, where matplotlib is installed, ``scores.png``.

        If it is and cannot be imported, there is a warning and no picture.
        """
        folder.mkdir(parents=True, exist_ok=True)
        results = json.dumps(self.results(), indent=1, ensure_ascii=False)
        for name, text in ((RESULTS, results), (TABLE, f"{self}\n")):
            with replacing(folder / name) as (temporary,):
                temporary.write_text(text, encoding="utf-8")
        if find_spec("matplotlib") is None:
            return
        try:
            with replacing(folder / PLOT) as (temporary,):
                self._plot(temporary)
        except ImportError as error:
            warnings.warn(f"{PLOT} is not made: matplotlib cannot be imported: {error}", stacklevel=2)

    def results(self) -> dict[str, Any]:
        """All numbers, for JSON; the samples of a row's score are in the order of the records."""
        return {
            "metric": self.metric,
            "records": self.records,
            "best": self.best,
            "gap": None if self.gap is None else {**asdict(self.gap.difference), "exists": self.gap.exists},
            "settings": dict(self.settings),
            "rows": [_results(row) for row in self.rows],
        }

    def _table(self) -> list[str]:
        columns = [*COLUMNS]
        cells = [_cells(row) for row in self.rows]
        if any(row.auroc for row in self.rows):
            columns.insert(2, "AUROC (95 %)")
            for row, line in zip(self.rows, cells, strict=True):
                line.insert(2, _with_bounds(row.auroc))
        kept = [i for i in range(len(columns)) if i == 0 or any(line[i] != NONE for line in cells)]
        table = [[line[i] for i in kept] for line in (columns, *cells)]
        widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
        table.insert(1, ["-" * width for width in widths])
        return [
            "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in table
        ]

    def _plot(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 1 + 0.4 * len(self.rows)), layout="constrained")
        axes = figure.add_subplot()
        names = [row.name for row in self.rows]
        found = [row.interval for row in self.rows]
        # By rounding a value may be outside of its own interval.
        errors = [[max(0.0, x.value - x.low) for x in found], [max(0.0, x.high - x.value) for x in found]]
        colours = ["tab:grey" if row.system.adapter is None else "tab:blue" for row in self.rows]
        axes.barh(names, [x.value for x in found], xerr=errors, color=colours, capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(f"{self.metric}, 95 % intervals, {self.records} records")
        FigureCanvasAgg(figure).print_png(path)


def evaluation_of(
    predictions: Mapping[System, Sequence[Prediction]],
    scorer: Scorer,
    cut: str | Sequence[str],
    ending: str,
    settings: Mapping[str, Any],
) -> Evaluation:
    """Score what each system answered, one prediction for each record in the same order.

    ``cut``, ``ending``: of ``postprocess``.
    """
    texts = {x: postprocess([y.text for y in made], cut, ending) for x, made in predictions.items()}
    scores = {system: scorer(x) for system, x in texts.items()}
    zero = System(None, 0) if System(None, 0) in scores else None
    k_shot = [x for x in scores if x.adapter is None and x.shots]
    best = max(k_shot, key=lambda x: scores[x].value, default=None)

    def minus(system: System, other: System | None) -> Interval | None:
        if other in (None, system):
            return None
        return difference_of(scores[system], scores[other])

    rows = []
    for system, made in predictions.items():
        yes = [x.yes for x in made if x.yes is not None]
        peaks = [x.peak_bytes for x in made if x.peak_bytes is not None]
        rows.append(
            Row(
                system=system,
                texts=tuple(texts[system]),
                score=scores[system],
                interval=interval_of(scores[system]),
                auroc=scorer.auroc(yes) if yes else None,
                minus_zero_shot=minus(system, zero),
                minus_best=minus(system, best),
                prompt_tokens=fmean(x.prompt_tokens for x in made),
                image_tokens=fmean(x.image_tokens for x in made),
                batch_sizes=tuple(sorted({x.batch_size for x in made})),
                seconds=median(x.seconds for x in made),
                first_seconds=median(x.first_seconds for x in made),
                peak_bytes=max(peaks, default=None),
            )
        )
    found = Gap(difference_of(scores[best], scores[zero])) if zero and best else None
    count = len(next(iter(predictions.values())))
    return Evaluation(tuple(rows), scorer.name, count, settings, best and best.name, found)


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        _with_bounds(row.interval),
        _with_bounds(row.minus_zero_shot, "+"),
        _with_bounds(row.minus_best, "+"),
        f"{row.prompt_tokens:.0f} ({row.image_tokens:.0f})",
        f"{row.seconds:.3g}",
        f"{row.first_seconds * 1000:.3g}",
        NONE if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
    ]


def _with_bounds(x: Interval | None, sign: str = "") -> str:
    return NONE if x is None else f"{x.value:{sign}.3f} [{x.low:{sign}.3f}, {x.high:{sign}.3f}]"


def _results(row: Row) -> dict[str, Any]:
    intervals = ("interval", "auroc", "minus_zero_shot", "minus_best")
    plain = ("prompt_tokens", "image_tokens", "batch_sizes", "seconds", "first_seconds", "peak_bytes")
    return {
        "name": row.name,
        **asdict(row.system),
        "score": row.score.value,
        **{name: x if (x := getattr(row, name)) is None else asdict(x) for name in intervals},
        **{name: getattr(row, name) for name in plain},
        "samples": row.score.samples.tolist(),
    }
