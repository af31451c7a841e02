"""The README's tables of the demo and of all digit tasks: ``python -m benchmarks.experiments.digits.report``.

Reads ``results.json`` beside this file and ``demo.json`` under benchmarks/results.
"""

import json
import statistics
from pathlib import Path

from benchmarks.experiments.digits.mimic import RESULTS
from benchmarks.report import fill_tables

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "benchmarks" / "results" / "cpu-amd-epyc" / "demo.json"


def tables() -> dict[str, str]:
    """Markdown by the name of its marker."""
    return {
        "demo": demo_table(json.loads(DEMO.read_text())),
        "digits": task_table(json.loads(RESULTS.read_text())),
    }


def demo_table(demo: dict) -> str:
    header = [
        "",
        "accuracy (95 % interval)",
        "prompt tokens",
        "first token ms",
        "further token ms",
        "attention KiB",
    ]
    lines = []
    for row in demo["rows"]:
        low, high = row["interval"]
        lines.append(
            [
                row["name"],
                f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
                str(row["prompt_tokens"]),
                f"{row['first_token_ms']:.1f}",
                f"{row['further_token_ms']:.2f}",
                f"{row['attention_peak_bytes'] / 1024:.0f}",
            ]
        )
    return _markdown(header, lines)


def task_table(results: dict) -> str:
    """Accuracies in percent; MimIC's are means over the seeds, with the range of their means."""
    tasks = list(results["plain"]["0"])
    lines = [
        [
            f"{shots}-shot" if int(shots) else "zero-shot",
            *_percent(row, tasks),
            f"{100 * results['plain_mean'][shots]:.1f}",
        ]
        for shots, row in results["plain"].items()
    ]
    seeds = list(results["mimic"].values())
    mean = {task: statistics.mean(row[task] for row in seeds) for task in tasks}
    means = [100 * value for value in results["mimic_mean"].values()]
    spread = f"{statistics.mean(means):.1f} ({min(means):.1f} to {max(means):.1f})"
    lines.append([f"MimIC, no demonstrations, {len(seeds)} seeds", *_percent(mean, tasks), spread])
    ratios = results["mimic_over_8_shot"].values()
    note = (
        f"MimIC reaches {100 * min(ratios):.1f} to {100 * max(ratios):.1f} % of the 8-shot accuracy; "
        f"{results['recipe']['steps']} updates, {results['seconds_per_adapter']} s an adapter on one core "
        "beside other work."
    )
    return f"{_markdown(['', *tasks, 'mean'], lines)}\n\n{note}"


def _percent(row: dict[str, float], tasks: list[str]) -> list[str]:
    return [f"{100 * row[task]:.1f}" for task in tasks]


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(fill_tables(readme.read_text(), tables()))


if __name__ == "__main__":
    main()
