"""CPU ops beside plain PyTorch, in two minutes: ``make bench-quick``. Shows times and asserts none.

Of every SPEC the smallest shape, forward and where there is one backward: our implementation, and the first
of its peers that is no floor.
"""

import pytest
import torch

from benchmarks.harness.case import Case
from benchmarks.harness.registry import OPS
from benchmarks.harness.spec import Lineup

ROUNDS, WARM_UPS = 50, 3

torch.set_num_threads(1)  # threads that wait for each other measure what else runs


def _smallest(lineup: Lineup) -> list[Case]:
    cases = sorted((case for case in lineup.cases if case.dtype == "float32"), key=lambda x: (x.T, x.H))
    return list({case.backward: case for case in reversed(cases)}.values())


RUNS = {
    f"{spec.name}-{case.section}-{name}": (spec, case, name)
    for spec in OPS.values()
    for case in _smallest(spec.lineups["cpu"])
    for name in (*list(spec.lineups["cpu"].others)[:1], *spec.lineups["cpu"].ours)
}


@pytest.mark.parametrize("run", RUNS)
def test_op(run, benchmark):
    spec, case, name = RUNS[run]
    benchmark.group = f"{spec.name}, {case.label}"
    fn = spec.lineups["cpu"].providers[name](case, spec.make_inputs(case, "cpu"))
    benchmark.pedantic(fn, rounds=ROUNDS, warmup_rounds=WARM_UPS)
