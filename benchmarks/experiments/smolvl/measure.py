"""Does it learn in context? ``python -m benchmarks.experiments.smolvl.measure`` asks of unseen things.

Every task without demonstrations and after 1 to 16 of them, by ``mk.evaluate``; writes ``results.json``. With
``--out`` an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

import mmicl_kernels as mk
from benchmarks.harness.timing import machine
from mmicl_kernels.evaluation.generation import Generation

from . import tasks
from .model import load_model, load_processor

RESULTS = Path(__file__).with_name("results.json")
SHOTS = (0, 1, 4, 8, 16)
QUERIES = 80  # at most, of a task
GENERATION = Generation(max_new_tokens=6)


def measure(split: str, limit: int, names: list[str], folder: Path | None) -> dict:
    """By task: of each number of shots accuracy with its interval, and the paired difference to zero-shot."""
    model, prompts = load_model(), tasks.task_prompts(load_processor())
    found = {}
    for task in names:
        evaluation = mk.evaluate(
            model, prompts, tasks.records(task, split), demonstrations=tasks.records(task, "train"),
            shots=SHOTS, limit=limit, generation=GENERATION, out=folder and folder / task,
        )  # fmt: skip
        print(f"{task}: {evaluation}\n")
        found[task] = {
            "queries": evaluation.records,
            "most_frequent": _most_frequent(tasks.records(task, split)[:limit]),
            "rows": {row.name: _row(row) for row in evaluation.rows},
        }
    return {"split": split, "machine": machine("cpu"), "tasks": found}


def _most_frequent(rows: list[dict]) -> float:
    """The accuracy of always saying the most frequent answer."""
    return max(Counter(x["answer"] for x in rows).values()) / len(rows)


def _row(row) -> dict:
    gained = row.minus_zero_shot
    return {
        "accuracy": row.score.value,
        "interval": [row.interval.low, row.interval.high],
        "minus_zero_shot": gained and [gained.value, gained.low, gained.high],
        "prompt_tokens": row.prompt_tokens,
    }


def table(results: dict) -> str:
    """Markdown, in percent."""
    names = list(next(iter(results["tasks"].values()))["rows"])
    columns = ["", "queries", "most frequent answer", *names, "16-shot minus zero-shot", "tokens, 16-shot"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for task, found in results["tasks"].items():
        rows = found["rows"]
        shown = [f"{100 * x['accuracy']:.0f}" for x in rows.values()]
        gained, low, high = (100 * x for x in rows["16-shot"]["minus_zero_shot"])
        tokens = rows["16-shot"]["prompt_tokens"]
        lines.append(
            f"| `{task}` | {found['queries']} | {100 * found['most_frequent']:.0f} | {' | '.join(shown)} "
            f"| {gained:+.0f} ({low:+.0f} to {high:+.0f}) | {tokens:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=tasks.SPLITS[1:], default="test")
    parser.add_argument("--tasks", choices=tasks.TASKS, nargs="+", default=list(tasks.TASKS))
    parser.add_argument("--limit", type=int, default=QUERIES)
    parser.add_argument("--out", type=Path, help="folder of the answers, to go on with")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = measure(options.split, options.limit, options.tasks, options.out)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
