"""Tables and plot of ``benchmarks.e2e``: ``python -m benchmarks.e2e.report e2e.json --readme README.md``.

In the README the table stands between ``<!-- table: e2e -->`` and ``<!-- end -->``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.report import fill_tables

GIB = 2**30
TEXT_COLUMNS = 3
HEADER = (
    "mode",
    "prompt",
    "variant",
    "first token ms",
    "token ms",
    "peak GiB",
    "ratio to",
    "first token",
    "token",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the README's table, and draw the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e.report", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", type=Path, help="fill the table in this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text())
    if options.readme:
        options.readme.write_text(fill_tables(options.readme.read_text(), {"e2e": markdown(result)}))
    if options.plot:
        plot(result, options.plot)
    return 0


def markdown(result: dict) -> str:
    rule = ["---"] * TEXT_COLUMNS + ["---:"] * (len(HEADER) - TEXT_COLUMNS)
    lines = "\n".join("| " + " | ".join(line) + " |" for line in (HEADER, rule, *_lines(result)))
    return f"{lines}\n\n{machine_line(result)}"


def rich_table(result: dict) -> Table:
    shown = Table(title="e2e", caption=machine_line(result))
    for index, column in enumerate(HEADER):
        shown.add_column(column, justify="left" if index < TEXT_COLUMNS else "right")
    block = None
    for row, line in zip(result["rows"], _lines(result), strict=True):
        if row["block"] != block and block is not None:
            shown.add_section()
        block = row["block"]
        shown.add_row(*line)
    return shown


def machine_line(result: dict) -> str:
    """The machine, the model and how it was measured, in one line."""
    machine = result["machine"]
    rounds = [row["rounds"] for row in result["rows"] if "rounds" in row]
    left_out = f"; left out: {'; '.join(result['left_out'])}" if result["left_out"] else ""
    return (
        f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, commit {machine['commit']}, {machine['date']}; "
        f"{result['parameters'] / 1e9:.2f} billion random parameters in {result['dtype']}, batch 1, "
        f"{result['new_tokens']} tokens; medians of {min(rounds, default=0)} to {max(rounds, default=0)} "
        f"interleaved rounds; `{result['command']}`{left_out}"
    )


def plot(result: dict, path: Path) -> None:
    """Time to the first token, and of each further one, against demonstrations, in eager mode, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for (variant, has_images), points in _series(result).items():
        label = f"{variant}, with images" if has_images else variant
        style = {"label": label, "marker": "o" if len(points) > 1 else "s", "markersize": 4}
        for axis, key in zip(axes, ("first_token_ms", "token_ms"), strict=True):
            shots = sorted(points)
            axis.plot(shots, [points[k][key] for k in shots], "--" if has_images else "-", **style)
    shots = sorted({row["shots"] for row in result["rows"]})
    for axis, label in zip(axes, ("time to first token (ms)", "time per further token (ms)"), strict=True):
        axis.set(xlabel="demonstrations", ylabel=label, xticks=shots)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    if axes[0].lines:
        axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _series(result: dict) -> dict[tuple[str, bool], dict[int, dict]]:
    """Rows in eager mode by variant and whether they have images, then by shots; the first of several."""
    series: dict[tuple[str, bool], dict[int, dict]] = {}
    for row in result["rows"]:
        if row["mode"] == "eager" and row["right"] and "token_ms" in row:
            series.setdefault((row["variant"], row["images"] > 0), {}).setdefault(row["shots"], row)
    return series


def _lines(result: dict) -> list[list[str]]:
    return [_line(row, result["model_bytes"]) for row in result["rows"]]


def _line(row: dict, model_bytes: int) -> list[str]:
    prompt = f"{row['tokens']} tokens"
    prompt += f", {row['shots']} shots" if row["shots"] else ""
    prompt += f", {row['images']} images" if row["images"] else ""
    line = [row["mode"], prompt, row["variant"]]
    if row["error"] or "token_ms" not in row:
        return [*line, row["error"].splitlines()[0][:60] if row["error"] else "no time", *[""] * 5]
    line += [f"{row['first_token_ms']:.2f}", f"{row['token_ms']:.3f}"]
    line.append(f"{(model_bytes + row['peak_bytes']) / GIB:.2f}")
    ratio = row["ratio"]
    if ratio is None:
        return [*line, "" if row["right"] else "wrong logits", "", ""]
    peer = ratio["variant"] + (f", {ratio['shots']} shots" if ratio["shots"] else "")
    return [*line, peer, f"{ratio['first_token']:.3f}", f"{ratio['token']:.3f}"]


if __name__ == "__main__":
    sys.exit(main())
