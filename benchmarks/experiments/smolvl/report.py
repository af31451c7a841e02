"""The tables of this README and of the project's: ``python -m benchmarks.experiments.smolvl.report``.

Reads ``results.json`` beside this file, and ``demo.json`` and ``model.json`` under benchmarks/results.
"""

import json
from pathlib import Path

from benchmarks.experiments.smolvl import measure, speed
from benchmarks.report import fill_tables

ROOT = Path(__file__).parents[3]
READMES = (ROOT / "README.md", Path(__file__).with_name("README.md"))
RESULTS = ROOT / "benchmarks" / "results" / "cpu-amd-epyc"


def tables() -> dict[str, str]:
    """Markdown by the name of its marker."""
    demo, model = (json.loads((RESULTS / name).read_text()) for name in ("demo.json", "model.json"))
    in_context = json.loads(measure.RESULTS.read_text())
    return {
        "demo": demo_table(demo),
        "in-context": measure.table(in_context),
        "model": speed.table(model["rows"]),
    }


def demo_table(demo: dict) -> str:
    columns = (
        "",
        "trained parameters",
        "correct (95 %)",
        "prompt tokens",
        "first token ms",
        "further token ms",
        "memory MiB",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * 6 + "|"]
    for row in demo["rows"]:
        low, high = (100 * x for x in row["interval"])
        cells = [
            row["name"],
            f"{row['parameters']:,}" if row["parameters"] else "",
            f"{100 * row['accuracy']:.1f} ({low:.0f} to {high:.0f})",
            f"{row['prompt_tokens']:.0f}",
            f"{row['first_token_ms']:.0f}",
            f"{row['further_token_ms']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    made = tables()
    for readme in READMES:
        readme.write_text(fill_tables(readme.read_text(), made))


if __name__ == "__main__":
    main()
