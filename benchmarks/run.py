"""Measure ops beside their peers: ``python -m benchmarks.run --op all --device cpu --json FILE``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks.registry import OPS, Case, OpSpec
from benchmarks.report import rich_table
from benchmarks.timing import CLOCKS, machine, peak_allocated_bytes, time_interleaved
from benchmarks.verify import is_green

SCHEMA = 1
SECONDS, QUICK_SECONDS = 4.0, 0.1  # for one case, all its providers together


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and save JSON after every case. Returns 1 if an op's tests failed."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console, results, names = Console(), [], OPS if options.op == "all" else [options.op]
    for name in names:
        console.print(f"{name}: testing")
        if is_green(OPS[name]):
            results.append(_new_result(OPS[name], options))
            _measure_op(OPS[name], options, results)
            console.print(rich_table(results[-1]))
        else:
            console.print(f"{name}: its tests fail, so it is not measured")
    return 0 if len(results) == len(names) else 1


def _new_result(spec: OpSpec, options: argparse.Namespace) -> dict:
    return {
        "schema": SCHEMA,
        "op": spec.name,
        "device": options.device,
        "machine": {**machine(options.device), "load": [os.getloadavg()[0]]},
        "command": options.command,
        "clock": options.clock,
        "peers": list(spec.peers),
        "rows": [],
    }


def _measure_op(spec: OpSpec, options: argparse.Namespace, results: list[dict]) -> None:
    """Fill the last of ``results`` and save after every case, so that an interruption loses little."""
    result, shortest = results[-1], min(case.T for case in spec.cases)
    cases = [case for case in spec.cases if not options.quick or shortest == case.T]
    seconds = QUICK_SECONDS if options.quick else SECONDS
    with tqdm(total=options.runs * len(cases), desc=spec.name, unit="case") as bar:
        for run in range(options.runs):
            for case in cases:
                rows = measure_case(spec, case, options.device, seconds, options.clock)
                result["rows"] += [{"run": run, **row} for row in rows]
                result["machine"]["load"].append(os.getloadavg()[0])
                _save(results, options)
                bar.update()


def measure_case(spec: OpSpec, case: Case, device: str, seconds: float, clock: str) -> list[dict]:
    """One row per provider: time in milliseconds, ratios to the peers, rates, peak bytes."""
    label = f"{case.dtype} T={case.T}"
    inputs = spec.make_inputs(case, device)
    functions = {name: bind(case, inputs) for name, bind in spec.providers[device].items()}
    samples = time_interleaved(functions, device=device, seconds=seconds, clock=CLOCKS[clock], label=label)
    return [
        {
            **asdict(case),
            "provider": name,
            "rounds": len(samples[name].ms),
            "median_ms": samples[name].median,
            "q10_ms": samples[name].low,
            "q90_ms": samples[name].high,
            "ratio": {peer: samples[name].ratio(samples[peer]) for peer in spec.peers},
            "gb_per_s": spec.bytes(case) / samples[name].median / 1e6,
            "gflop_per_s": spec.flops(case) / samples[name].median / 1e6,
            "peak_bytes": peak_allocated_bytes(fn),
        }
        for name, fn in functions.items()
    ]


def _save(results: list[dict], options: argparse.Namespace) -> None:
    """All results in the one file of ``--json``, or the last in its own below ``--out``."""
    path = options.json
    if path is None:
        results = results[-1:]
        folder = device_folder(results[0]["machine"], options.device)
        path = options.out / folder / f"{results[0]['op']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def device_folder(machine_line: dict, device: str) -> str:
    """ "nvidia-h200", "cpu-amd-epyc": what the result was measured on, as a folder's name."""
    name = machine_line["gpu"] if device == "cuda" else f"cpu {machine_line['cpu']}"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", choices=(*OPS, "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    target.add_argument("--out", type=Path, metavar="FOLDER", help="write to FOLDER/<device>/<op>.json")
    parser.add_argument("--runs", type=int, default=1, help="measure everything so often")
    parser.add_argument("--threads", type=int, help="of torch; as torch chooses by default")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: with --threads 1, where busy"
    )
    parser.add_argument("--quick", action="store_true", help="shortest sequences only, few rounds")
    options = parser.parse_args(arguments)
    options.command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if options.clock == "processor" and (options.device, options.threads) != ("cpu", 1):
        parser.error("--clock processor needs --device cpu --threads 1")
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}, expected at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
