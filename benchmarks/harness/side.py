"""One side of a comparison: an op of the ``mmicl_kernels`` in the working folder, measured when asked.

compare.py starts it, and asks and is answered in lines of JSON through pipes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

import mmicl_kernels
from benchmarks.harness.case import Case
from benchmarks.harness.measure import Measurement
from benchmarks.harness.spec import Spec
from benchmarks.harness.timing import CLOCKS, sampler


def main(op: str, device: str, clock: str, threads: str) -> None:
    """Answer ``{"case", "check"}``, which prepares a case, and ``{"sample"}``, which times a call."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed is no answer
    library = Path(mmicl_kernels.__file__).resolve().parents[1]
    if library != Path.cwd().resolve():
        raise RuntimeError(f"mmicl_kernels is that of {library}, expected that of {Path.cwd()}")
    if int(threads):
        torch.set_num_threads(int(threads))
    spec = import_module(f"benchmarks.ops.{op}").SPEC
    lineup = replace(spec.lineups[device], floors={}, others={}, stock=())
    spec = replace(spec, lineups={device: lineup})
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            answer, sample = _prepare(spec, Case(**request["case"]), device, clock, request["check"])
        else:
            answer = sample(request["sample"])
        print(json.dumps(answer), file=answers, flush=True)


def _prepare(
    spec: Spec, case: Case, device: str, clock: str, check: bool
) -> tuple[dict, Callable[[str], float]]:
    """Peak bytes of implementations that are right, what is wrong with the others, and what times them."""
    measurement = Measurement(spec, case, device, {}, lambda stage: None)
    measurement.prepare(check)
    faults = {name: fault for name, fault in measurement.faults.items() if fault}
    right = {name: fn for name, fn in measurement.functions.items() if name not in faults}
    answer = {
        "peak_bytes": {name: measurement.peak_bytes[name] for name in right},
        "errors": measurement.errors | faults,
    }
    return answer, sampler(right, device, CLOCKS[clock])[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
