"""The README's tables of the digits: ``python -m benchmarks.experiments.digits.report``.

Reads ``results.json``, ``aim.json``, ``held_out.json`` and ``uses.json`` beside this file.
"""

import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.experiments.digits.aim import RESULTS as AIM
from benchmarks.experiments.digits.aim import mean_of, mean_row
from benchmarks.experiments.digits.data import TASKS
from benchmarks.experiments.digits.held_out import GROUPS, QUESTIONS
from benchmarks.experiments.digits.held_out import RESULTS as HELD_OUT
from benchmarks.experiments.digits.measure import RESULTS, SETTINGS
from benchmarks.experiments.digits.uses import RESULTS as USES
from benchmarks.report import fill_tables

ROOT = Path(__file__).parents[3]
FUSED = {"label": "answer and end", "end": "end alone"}


def tables() -> dict[str, str]:
    """Markdown by the name of its marker."""
    results = json.loads(RESULTS.read_text())
    return {
        "digits": task_table(results),
        "mixed": mixed_table(results),
        "aim": aim_table(json.loads(AIM.read_text())),
        "held-out": held_out_table(json.loads(HELD_OUT.read_text())),
        "uses": uses_table(json.loads(USES.read_text())),
    }


def task_table(results: dict) -> str:
    """Accuracies in percent; a method's are means over its seeds, with the range of their means."""
    tasks = SETTINGS["m2iv"].tasks
    lines = [
        [_shots(shots), *_percent(row, tasks), f"{100 * _mean(row, tasks):.1f}"]
        for shots, row in results["plain"].items()
    ]
    sixteen = _mean(results["plain"]["16"], tasks)
    notes = []
    for name, row in _adapted(results, tasks):
        seeds = list(row["seeds"].values())
        mean = {task: statistics.mean(seed[task] for seed in seeds) for task in tasks}
        lines.append(
            [_row_name(name, seeds), *_percent(mean, tasks), _spread(_mean(x, tasks) for x in seeds)]
        )
        ratio = 100 * statistics.mean(_mean(x, tasks) for x in seeds) / sixteen
        notes.append(f"{SETTINGS[name].name} {ratio:.1f} %")
    steps = SETTINGS["m2iv"].recipe.steps
    note = (
        f"Of the 16-shot accuracy, the mean over tasks and seeds: {'; '.join(notes)}. {steps} updates each."
    )
    return f"{_markdown(['', *tasks, 'mean'], lines)}\n\n{note}"


def mixed_table(results: dict) -> str:
    """The task that demonstrations do not teach this model: plain prompts, and methods trained on answers."""
    lines = [[_shots(shots), f"{100 * row['mixed']:.1f}"] for shots, row in results["plain"].items()]
    for name, row in _adapted(results, ("mixed",)):
        seeds = list(row["seeds"].values())
        lines.append([_row_name(name, seeds), _spread(seed["mixed"] for seed in seeds)])
    return _markdown(["", "mixed"], lines)


def aim_table(results: dict) -> str:
    """Plain prompts and AIM's, by demonstrations; the last column compares with as many in plain prompts."""
    lines = []
    for shots, plain in results["plain"].items():
        whole = mean_of(plain)
        tokens, mean = str(plain["prompt_tokens"]), f"{100 * whole:.1f}"
        lines.append([f"{shots}-shot", tokens, *_percent(plain, TASKS), mean, ""])
        for fused, found in results["fused"].items():
            seeds = [rows[shots] for rows in found["seeds"].values()]
            mean, tokens = mean_row(found["seeds"], shots), str(seeds[0]["prompt_tokens"])
            name = f"AIM, {FUSED[fused]}, {shots}-shot, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
            of_plain = f"{100 * mean_of(mean) / whole:.1f} %"
            lines.append([name, tokens, *_percent(mean, TASKS), _spread(map(mean_of, seeds)), of_plain])
    return _markdown(["", "prompt tokens", *TASKS, "mean", "of plain"], lines)


def held_out_table(results: dict) -> str:
    """AIM in the wide world: means over a group's attributes, and over seeds with their range."""
    header = ["question", "attributes", "plain 8-shot", "identity", "trained", "of plain"]
    lines = []
    for question, (group, names) in itertools.product(QUESTIONS, GROUPS.items()):
        plain, identity = (_mean(results[way][question], names) for way in ("plain", "identity"))
        seeds = [_mean(row[question], names) for row in results["seeds"].values()]
        ratio = f"{100 * statistics.mean(seeds) / plain:.1f} %"
        lines.append([question, group, f"{100 * plain:.1f}", f"{100 * identity:.1f}", _spread(seeds), ratio])
    return _markdown(header, lines)


def uses_table(results: dict) -> str:
    lines = [
        [use, measured, *(f"{100 * row[way][measured]:.1f}" for way in ("plain", "with"))]
        for use, row in results["uses"].items() for measured in row["plain"]
    ]  # fmt: skip
    first, *others = results["combination"].items()
    lines += [
        [f"{name}, no demonstrations", measured, *(f"{100 * x[measured]:.1f}" for x in (first[1], row))]
        for name, row in others for measured in row
    ]  # fmt: skip
    return _markdown(["vector", "share of the test images", "plain", "with it"], lines)


def _adapted(results: dict, tasks: tuple[str, ...]) -> list[tuple[str, dict]]:
    return [(name, row) for name, row in results["adapted"].items() if SETTINGS[name].tasks == tasks]


def _shots(shots: str) -> str:
    return f"{shots}-shot" if int(shots) else "zero-shot"


def _row_name(name: str, seeds: list) -> str:
    return f"{SETTINGS[name].name}, no demonstrations, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def _mean(row: dict[str, float], tasks: tuple[str, ...]) -> float:
    return statistics.mean(row[task] for task in tasks)


def _spread(values: Iterable[float]) -> str:
    """Percent: the mean, and in brackets the range if there are several."""
    values = [100 * value for value in values]
    bounds = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{bounds}"


def _percent(row: dict[str, float], tasks: tuple[str, ...]) -> list[str]:
    return [f"{100 * row[task]:.1f}" for task in tasks]


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(fill_tables(readme.read_text(), tables()))


if __name__ == "__main__":
    main()
