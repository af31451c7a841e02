"""Measure ops beside their peers: ``python -m benchmarks.run --op all --device cpu --json FILE``.

With ``--base REV`` beside another commit of this library: the ratio is printed, and nothing is saved.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks.harness.case import Case
from benchmarks.harness.compare import BaseError, Settings, compare_op, unpacked
from benchmarks.harness.measure import DeviceLost, measure_case
from benchmarks.harness.registry import OPS
from benchmarks.harness.spec import Spec
from benchmarks.harness.supervisor import LOST, Worker, supervise
from benchmarks.harness.tables import rich_tables
from benchmarks.harness.timing import CLOCKS, machine
from benchmarks.harness.verify import is_green, is_right

SCHEMA = 2
# For timing one case, all its providers together. A GPU settles sooner, and has more cases.
SECONDS, QUICK_SECONDS = {"cpu": 4.0, "cuda": 1.0}, 0.1
WIDTH = 240  # characters, of a table in a log


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and save JSON after every case.

    Returns 1 if an op's tests failed, or one of its implementations: with an error, or wrong values.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(arguments)
    if options.base:
        return _compare(options)
    if options.device == "cuda" and options.worker is None:
        return supervise(arguments, options.budget)
    try:
        return _run(options)
    except DeviceLost as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(LOST)  # at once: what would be cleaned up needs the device


def _run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    start, worker, console = time.monotonic(), Worker(options.worker), _console()
    names = _names(options)
    deadlines = _deadlines(names, start, options.budget)
    # Another process measured before this one if it lost something; its results are continued.
    results = _load(names, options) if worker.lost else []
    good = True
    for name in names:
        if options.device == "cpu" and not is_green(OPS[name]):
            console.print(f"{name}: its tests fail, so it is not measured")
            good = False
            continue
        result = next((r for r in results if r["op"] == name), None)
        if result is None:
            result = _new_result(OPS[name], options)
            results.append(result)
        _measure_op(OPS[name], options, results, result, deadlines[name], worker)
        for table in rich_tables(result):
            console.print(table)
        good = good and is_right(result)
    return 0 if good else 1


def _compare(options: argparse.Namespace) -> int:
    """This tree beside ``--base``. Returns 1 if either side failed, or was wrong."""
    start, console, names = time.monotonic(), _console(), _names(options)
    deadlines = _deadlines(names, start, options.budget)
    settings = Settings(options.device, options.clock, options.threads or 0, _seconds(options), options.check)
    good = True
    try:
        with unpacked(options.base, options.device) as trees:
            console.print(f"this tree beside {options.base}, {trees.kernels}")
            for name in names:
                cases = _cases(OPS[name], options)
                found = compare_op(OPS[name], cases, trees, settings, options.runs, deadlines[name])
                console.print(found.table(f"{name}-{options.device}"))
                for error in found.errors:
                    console.print(error)
                good = good and not found.errors
    except BaseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if good else 1


def _names(options: argparse.Namespace) -> list[str]:
    return list(OPS) if options.op == "all" else [options.op]


def _seconds(options: argparse.Namespace) -> float:
    return QUICK_SECONDS if options.quick else SECONDS[options.device]


def _console() -> Console:
    """As wide as the tables where nobody set a width."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDTH)


def _deadlines(names: list[str], start: float, budget: float) -> dict[str, float]:
    """When each op must be done, by its share; what one leaves over goes to those after it."""
    whole, passed, deadlines = sum(OPS[name].share for name in names), 0.0, {}
    for name in names:
        passed += OPS[name].share / whole
        deadlines[name] = start + budget * min(passed, 1.0)
    return deadlines


def _new_result(spec: Spec, options: argparse.Namespace) -> dict:
    lineup = spec.lineups[options.device]
    return {
        "schema": SCHEMA,
        "op": spec.name,
        "device": options.device,
        "machine": {**machine(options.device), "load": [os.getloadavg()[0]]},
        "command": options.command,
        "clock": options.clock,
        "peers": list(lineup.peers),
        "floors": list(lineup.floors),
        "stock": list(lineup.stock),
        "ours": list(lineup.ours),
        "left_out": [],
        "rows": [],
    }


def _measure_op(
    spec: Spec,
    options: argparse.Namespace,
    results: list[dict],
    result: dict,
    deadline: float,
    worker: Worker,
) -> None:
    """Fill ``result``, one of ``results``; saved after every case, so that an interruption loses little."""
    cases = _cases(spec, options)
    todo = [(run, case) for run in range(options.runs) for case in cases]
    done = [(row["run"], *(row[key] for key in asdict(cases[0]))) for row in result["rows"]]
    todo = [(run, case) for run, case in todo if (run, *asdict(case).values()) not in done]
    result["left_out"] = []
    for run, case in tqdm(todo, desc=spec.name, unit="case", disable=None):
        if time.monotonic() >= deadline:
            result["left_out"].append({"run": run, **asdict(case)})
            continue
        rows = measure_case(
            spec,
            case,
            options.device,
            _seconds(options),
            options.clock,
            check=options.check,
            lost=worker.lost_in(spec.name, case.section, case.label),
            started=lambda name, case=case: worker.started(spec.name, case.section, case.label, name),
        )
        result["rows"] += [{"run": run, **row} for row in rows]
        result["machine"]["load"].append(os.getloadavg()[0])
        _save(results, result, options)
    _save(results, result, options)


def _cases(spec: Spec, options: argparse.Namespace) -> list[Case]:
    cases = spec.lineups[options.device].cases
    shortest = min(case.S for case in cases)
    return [case for case in cases if not options.quick or shortest == case.S]


def _path(result: dict, options: argparse.Namespace) -> Path:
    """All results in the one file of ``--json``, or each in its own below ``--out``."""
    if options.json:
        return options.json
    return options.out / device_folder(result["machine"], options.device) / f"{result['op']}.json"


def _save(results: list[dict], result: dict, options: argparse.Namespace) -> None:
    path = _path(result, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")  # replaced whole: never half written
    new.write_text(json.dumps(results if options.json else [result], indent=1) + "\n")
    new.replace(path)


def _load(names: list[str], options: argparse.Namespace) -> list[dict]:
    line = {"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else machine("cpu")
    paths = dict.fromkeys(_path({"machine": line, "op": name}, options) for name in names)
    results = [result for path in paths if path.exists() for result in json.loads(path.read_text())]
    return [result for result in results if result["op"] in names]


def device_folder(machine_line: dict, device: str) -> str:
    """ "nvidia-h200", "cpu-amd-epyc": what the result was measured on, as a folder's name."""
    name = machine_line["gpu"] if device == "cuda" else f"cpu {machine_line['cpu']}"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", choices=(*OPS, "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--base", metavar="REV", help="measure beside this commit of the library, and print")
    target.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    target.add_argument("--out", type=Path, metavar="FOLDER", help="write to FOLDER/<device>/<op>.json")
    parser.add_argument("--runs", type=int, default=1, help="measure everything so often")
    parser.add_argument("--threads", type=int, help="of torch; as torch chooses by default")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: with --threads 1, where busy"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no case after so long"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="compare values with fp64 in every case; by default where it stands for the op's tests, "
        "on cuda and with --base",
    )
    parser.add_argument("--quick", action="store_true", help="shortest sequences only, few rounds")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # of the supervisor
    options = parser.parse_args(arguments)
    # The supervisor appends four words of its own.
    options.command = " ".join([parser.prog, *(arguments[:-4] if options.worker else arguments)])
    if options.check is None:
        options.check = options.device == "cuda" or options.base is not None
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if options.clock == "processor" and (options.device, options.threads) != ("cpu", 1):
        parser.error("--clock processor needs --device cpu --threads 1")
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}, expected at least 1")
    if not options.budget >= 0:
        parser.error(f"--budget is {options.budget}, expected at least 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
