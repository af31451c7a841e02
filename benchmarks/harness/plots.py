"""Results to plots: one each, or on CUDA one per section. This module alone needs matplotlib."""

import math
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.tables import cases, median, name, providers_of, rows_of
from benchmarks.harness.tables_cuda import MIB, Section, sections


def plot(result: dict, folder: Path) -> None:
    """Write FOLDER/NAME.png, with the names of the result's tables."""
    if result["device"] == "cuda":
        for section in sections(result):
            _plot_section(result, section, folder / f"{name(result)}-{section}.png")
    else:
        _plot_cpu(result, folder / f"{name(result)}.png")


def _plot_cpu(result: dict, path: Path) -> None:
    """Time and memory against T, one column of panels per pass and dtype, as PNG. Of the first sizes."""
    sizes = cases(result)[0][2:-1]
    panels = sorted({case[:-1] for case in cases(result) if case[2:-1] == sizes})
    figure = Figure(figsize=(3.2 * len(panels), 6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    for (column, panel), provider in product(enumerate(panels), providers_of(result)):
        lengths = [case[-1] for case in cases(result) if case[:-1] == panel]
        rows = [rows_of(result, (*panel, T), provider) for T in lengths]
        style = {"label": provider, "marker": "o", "markersize": 4}
        axes[0, column].loglog(lengths, [median(row, "median_ms") for row in rows], **style)
        memory = [median(row, "peak_bytes") / MIB or math.nan for row in rows]  # a logarithm shows no 0
        axes[1, column].loglog(lengths, memory, **style)
        axes[0, column].set(title=f"{'forward + backward' if panel[0] else 'forward'}, {panel[1]}")
        axes[1, column].set(xlabel="T", xticks=lengths, xticklabels=lengths)
        axes[1, column].minorticks_off()
    axes[0, 0].set(ylabel="ms")
    axes[1, 0].set(ylabel="peak MiB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def _plot_section(result: dict, section_name: str, path: Path) -> None:
    """Time as a ratio to the floor, against T or the keys of a decode; one panel per model and batch."""
    section, floor = Section(result, section_name), result["floors"][0]
    lengths: dict[tuple, list[int]] = {}
    for model, dtype, B, _, S in section.cases:
        lengths.setdefault((model, dtype, B), []).append(S)
    panels = [panel for panel, found in lengths.items() if len(found) > 1] or list(lengths)
    figure = Figure(figsize=(max(3.4 * len(panels), 6), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for number, provider in enumerate(x for x in section.providers if x != floor):
            own = [case for case in section.cases if case[:3] == panel]
            points = sorted((case[4], section.ratio(case, provider, floor)) for case in own)
            points = [(length, ratio) for length, ratio in points if ratio is not None]
            style = "-" if provider in section.ours else ":"
            color = f"C{number}"  # the same provider has the same colour in every panel
            if points:
                ax.loglog(
                    *zip(*points, strict=True), style, color=color, label=provider, marker="o", markersize=4
                )
        ax.axhline(1.0, color="black", linewidth=0.8)
        ticks = sorted(lengths[panel])
        ax.set(title=f"{panel[0]}, B={panel[2]}", xticks=ticks, xticklabels=ticks)
        ax.set_xlabel("keys" if section_name == "decode" else "T")
        ax.minorticks_off()
        ax.tick_params(axis="x", labelrotation=45)
    axes[0].set_ylabel(f"time / {floor}")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.savefig(path, dpi=120)
