"""`mmicl demo`: finds the checkout that holds the small model and its data, and runs the demo there."""

import sys
from pathlib import Path


def run(*, task: str, seed: int, out: str, quick: bool) -> int:
    """Run ``benchmarks.demo`` and return the exit code; 2 with a message outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "demo.py").is_file():
        print(
            "mmicl demo needs a checkout of the repository: its model and its data live in "
            "benchmarks/experiments/digits, which is not installed. Clone it and run `make demo` there.",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    from benchmarks.demo import TASKS, run_demo

    if task not in TASKS:
        print(f"mmicl demo: task is {task!r}, expected one of {', '.join(TASKS)}", file=sys.stderr)
        return 2
    run_demo(task=task, seed=seed, out=Path(out), quick=quick)
    return 0
