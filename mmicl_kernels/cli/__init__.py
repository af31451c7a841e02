"""The command `mmicl`. Each subcommand's module is imported when it runs."""

import argparse
from collections.abc import Sequence

from mmicl_kernels.cli import bank, data, library, support, train
from mmicl_kernels.cli import eval as evaluation
from mmicl_kernels.cli.shell import guarded

COMMANDS = {
    "data": data,
    "train": train,
    "eval": evaluation,
    "library": library,
    "bank": bank,
    "support": support,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mmicl` with ``arguments`` (the process's by default) and return its exit code.

    Raises:
        KeyboardInterrupt: where arguments are given, because then it is the caller whom Ctrl-C stops.
    """
    return guarded(lambda: _run(arguments), is_program=arguments is None)


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="mmicl", description="multimodal in-context learning, shifted")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print what a bug report needs")

    demo = commands.add_parser("demo", help="in-context learning and adapters side by side, on a real model")
    demo.add_argument("--world", choices=("smolvl", "digits"), help="(default: smolvl, if it was downloaded)")
    demo.add_argument("--task", help="what is asked (default: kind; of the digits: digit)")
    demo.add_argument("--seed", type=int, default=0, help="of the adapters and the episodes")
    demo.add_argument("--out", default="demo", help="folder for demo.json and demo.png (default: demo)")
    demo.add_argument("--quick", action="store_true", help="few steps and samples, to see that it runs")

    for command in COMMANDS.values():
        command.add_parser(commands)

    parsed = parser.parse_args(arguments)
    if parsed.command == "env":
        from mmicl_kernels.cli.env import report

        print(report())
        return 0
    if parsed.command in COMMANDS:
        return COMMANDS[parsed.command].run(parsed)
    from mmicl_kernels.cli.demo import run

    return run(world=parsed.world, task=parsed.task, seed=parsed.seed, out=parsed.out, quick=parsed.quick)
