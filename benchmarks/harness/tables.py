"""Results to tables, in Markdown and on a terminal.

In a file a table named NAME, "shifted_attention-cpu" or "shifted_attention-cuda-decode" say, replaces what
stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import math
import statistics
from collections.abc import Sequence

from rich.table import Table

from benchmarks.harness.tables_cuda import MIB, cuda_tables
from benchmarks.harness.verify import why_not

CASE = ("backward", "dtype", "D", "G", "T")  # what a row of a table is named by
SIZES = ("D", "G")  # shown where there are several


def tables(result: dict) -> dict[str, str]:
    """The result's tables by name, in Markdown: one, or on CUDA one per section."""
    if result["device"] == "cuda":
        return {
            key: f"{_markdown(header, lines, 4)}\n\n" + "\n\n".join(notes)
            for key, (header, lines, notes) in cuda_tables(result).items()
        }
    return {name(result): markdown(result), f"{name(result)}-mean": mean_table(result)}


def name(result: dict) -> str:
    """Of the result's table and plot."""
    return f"{result['op']}-{result['device']}"


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines: per case the providers' times, ratios to the floor, and peak memory.

    Of several runs the median; behind a ratio its range, over the runs or over the rounds of the only one.
    """
    floor, providers = result["peers"][0], providers_of(result)
    others, sizes = _others(result), _sizes(result)
    header = ["pass", "dtype", *sizes, "T", *(f"{provider} ms" for provider in providers)]
    header += [f"{provider} / {floor}" for provider in others]
    header += [f"{provider} MiB" for provider in providers]
    lines = []
    for case in cases(result):
        rows = {provider: rows_of(result, case, provider) for provider in providers}
        names = dict(zip(CASE, case, strict=True))
        line = [_pass(names["backward"]), names["dtype"], *(str(names[key]) for key in (*sizes, "T"))]
        line += [f"{median(rows[provider], 'median_ms'):.2f}" for provider in providers]
        line += [
            _ratio([row for row in rows[provider] if floor in row["ratio"]], floor) for provider in others
        ]
        line += [f"{median(rows[provider], 'peak_bytes') / MIB:.2f}" for provider in providers]
        lines.append(line)
    return header, lines


def mean_table(result: dict) -> str:
    """Per pass and dtype the geometric mean of the ratios to the floor over all sizes, and their range."""
    floor, others = result["peers"][0], _others(result)
    header = ["pass", "dtype", *(f"{provider} / {floor}" for provider in others)]
    lines = []
    for backward, dtype in dict.fromkeys(case[:2] for case in cases(result)):
        own = [case for case in cases(result) if case[:2] == (backward, dtype)]
        line = [_pass(backward), dtype]
        for provider in others:
            found = [rows_of(result, case, provider) for case in own]
            ratios = [statistics.median(row["ratio"][floor] for row in rows) for rows in found if rows]
            line.append(_with_range(statistics.geometric_mean(ratios), ratios) if ratios else "nan")
        lines.append(line)
    note = machine_line(result, "geometric means over the sizes, in brackets the range over them")
    return f"{_markdown(header, lines, 2)}\n\n{note}"


def markdown(result: dict) -> str:
    return f"{_markdown(*table(result), 3 + len(_sizes(result)))}\n\n{machine_line(result)}"


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


def machine_line(result: dict, note: str = "") -> str:
    """The machine and how it was measured, in one line; ``note``: of ratios that are not a case's own."""
    machine, runs = result["machine"], len({row["run"] for row in result["rows"]})
    device = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    load = f"{min(machine['load']):.1f} to {max(machine['load']):.1f}"
    how = f"{runs} interleaved runs, {note or 'in brackets the range of the ratio over them'}"
    if runs == 1:
        how = f"interleaved rounds, {note or 'in brackets the 10th and 90th percentile of their ratios'}"
    return (
        f"{device}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}; {result['clock']} time, median of {how}; load average {load}; "
        f"`{result['command']}`"
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


def cases(result: dict) -> list[tuple]:
    return list(dict.fromkeys(tuple(row[key] for key in CASE) for row in result["rows"]))


def providers_of(result: dict) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in result["rows"]))


def rows_of(result: dict, case: tuple, provider: str) -> list[dict]:
    """One row per run, of those that have a time and no wrong values."""
    return [
        row
        for row in result["rows"]
        if row["provider"] == provider and tuple(row[key] for key in CASE) == case and not why_not(row)
    ]


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows) if rows else math.nan


def _pass(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def _others(result: dict) -> list[str]:
    return [provider for provider in providers_of(result) if provider != result["peers"][0]]


def _sizes(result: dict) -> list[str]:
    return [key for key in SIZES if len({row[key] for row in result["rows"]}) > 1]


def _ratio(rows: list[dict], floor: str) -> str:
    if not rows:
        return "nan"
    ratios = [row["ratio"][floor] for row in rows]
    rounds = rows[0].get("ratio_range", {}).get(floor, ratios)
    return _with_range(statistics.median(ratios), rounds if len(rows) == 1 else ratios)


def _with_range(middle: float, values: Sequence[float]) -> str:
    text = f"{middle:.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"
