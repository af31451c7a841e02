"""Result files to tables and plots: ``python -m benchmarks.report FILES --readme README.md --plots FOLDER``.

A table named NAME, "shifted_attention-cpu" or "shifted_attention-cuda-decode" say, replaces what stands
between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.report_cuda import cuda_tables, plot_section, sections, why_not

CASE = ("backward", "dtype", "T")  # what a row of a table is named by
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables that the README has markers for, and one plot per result or section of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="fill the tables in this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write FOLDER/NAME.png")
    options = parser.parse_args(arguments)
    results = [result for path in options.results for result in json.loads(path.read_text())]
    if options.readme:
        filled = {key: text for result in results for key, text in tables(result).items()}
        options.readme.write_text(fill_tables(options.readme.read_text(), filled))
    for result in results if options.plots else []:
        options.plots.mkdir(parents=True, exist_ok=True)
        if result["device"] == "cuda":
            for section in sections(result):
                plot_section(result, section, options.plots / f"{name(result)}-{section}.png")
        else:
            plot(result, options.plots / f"{name(result)}.png")
    return 0


def tables(result: dict) -> dict[str, str]:
    """The result's tables by name, in Markdown: one, or on CUDA one per section."""
    if result["device"] == "cuda":
        return {
            key: f"{_markdown(header, lines, 4)}\n\n" + "\n\n".join(notes)
            for key, (header, lines, notes) in cuda_tables(result).items()
        }
    return {name(result): markdown(result)}


def name(result: dict) -> str:
    """Of the result's table and plot."""
    return f"{result['op']}-{result['device']}"


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines: per case the providers' times, ratios to the floor, and peak memory.

    Of several runs the median; behind a ratio its range over them.
    """
    floor, providers = result["peers"][0], _providers(result)
    others = [provider for provider in providers if provider != floor]
    header = ["pass", "dtype", "T", *(f"{provider} ms" for provider in providers)]
    header += [f"{provider} / {floor}" for provider in others]
    header += [f"{provider} MiB" for provider in providers]
    lines = []
    for case in _cases(result):
        rows = {provider: _rows(result, case, provider) for provider in providers}
        backward, dtype, T = case
        line = ["forward + backward" if backward else "forward", dtype, str(T)]
        line += [f"{_median(rows[provider], 'median_ms'):.2f}" for provider in providers]
        line += [
            _with_range([row["ratio"][floor] for row in rows[provider] if floor in row["ratio"]])
            for provider in others
        ]
        line += [f"{_median(rows[provider], 'peak_bytes') / MIB:.2f}" for provider in providers]
        lines.append(line)
    return header, lines


def markdown(result: dict) -> str:
    return f"{_markdown(*table(result), 3)}\n\n{machine_line(result)}"


def _markdown(header: list[str], lines: list[list[str]], num_names: int) -> str:
    """The first ``num_names`` columns name a line, the rest are numbers."""
    rule = ["---"] * num_names + ["---:"] * (len(header) - num_names)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def rich_tables(result: dict) -> list[Table]:
    if result["device"] == "cuda":
        return [
            _rich_table(key, header, lines, "\n".join(notes))
            for key, (header, lines, notes) in cuda_tables(result).items()
        ]
    return [_rich_table(name(result), *table(result), machine_line(result))]


def _rich_table(title: str, header: list[str], lines: list[list[str]], caption: str) -> Table:
    shown = Table(title=title, caption=caption)
    for index, column in enumerate(header):
        shown.add_column(column, justify="left" if index < 2 else "right")
    for line in lines:
        shown.add_row(*line)
    return shown


def machine_line(result: dict) -> str:
    """The machine and how it was measured, in one line."""
    machine, runs = result["machine"], len({row["run"] for row in result["rows"]})
    device = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    load = f"{min(machine['load']):.1f} to {max(machine['load']):.1f}"
    return (
        f"{device}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}; {result['clock']} time, median of {runs} interleaved runs, "
        f"in brackets the range of the ratio over them; load average {load}; `{result['command']}`"
    )


def fill_tables(text: str, tables: dict[str, str]) -> str:
    """``text`` with the tables between their markers; doing it again changes nothing.

    Raises:
        ValueError: no marker is that of a table, or one has no end.
    """
    filled = 0
    for table_name, content in tables.items():
        begin, end = f"<!-- table: {table_name} -->", "<!-- end -->"
        if begin not in text:
            continue
        before, rest = text.split(begin, 1)
        if end not in rest:
            raise ValueError(f"{begin} has no {end} after it")
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
        filled += 1
    if filled == 0:
        raise ValueError(f"no marker <!-- table: NAME --> with a NAME among {', '.join(tables)}")
    return text


def plot(result: dict, path: Path) -> None:
    """Time and memory against T, one column of panels per pass and dtype, as PNG."""
    panels = sorted({case[:2] for case in _cases(result)})
    figure = Figure(figsize=(3.2 * len(panels), 6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    for (column, panel), provider in product(enumerate(panels), _providers(result)):
        lengths = [case[2] for case in _cases(result) if case[:2] == panel]
        rows = [_rows(result, (*panel, T), provider) for T in lengths]
        style = {"label": provider, "marker": "o", "markersize": 4}
        axes[0, column].loglog(lengths, [_median(row, "median_ms") for row in rows], **style)
        memory = [_median(row, "peak_bytes") / MIB or math.nan for row in rows]  # a logarithm shows no 0
        axes[1, column].loglog(lengths, memory, **style)
        axes[0, column].set(title=f"{'forward + backward' if panel[0] else 'forward'}, {panel[1]}")
        axes[1, column].set(xlabel="T", xticks=lengths, xticklabels=lengths)
        axes[1, column].minorticks_off()
    axes[0, 0].set(ylabel="ms")
    axes[1, 0].set(ylabel="peak MiB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def _cases(result: dict) -> list[tuple]:
    return list(dict.fromkeys(tuple(row[key] for key in CASE) for row in result["rows"]))


def _providers(result: dict) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in result["rows"]))


def _rows(result: dict, case: tuple, provider: str) -> list[dict]:
    """One row per run, of those that have a time and no wrong values."""
    return [
        row
        for row in result["rows"]
        if row["provider"] == provider and tuple(row[key] for key in CASE) == case and not why_not(row)
    ]


def _median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows) if rows else math.nan


def _with_range(ratios: list[float]) -> str:
    if not ratios:
        return "nan"
    text = f"{statistics.median(ratios):.2f}"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
