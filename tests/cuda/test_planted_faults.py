"""Faults of the kinds that pass by luck on a GPU, planted in csrc/cuda: the emulator must notice each."""

import itertools
import shutil
from dataclasses import dataclass

import pytest
import torch

from tests.cuda import emulated
from tests.ops.shifted_attention_grid import assert_forward, budget_of, case

# Two groups' blocks, three and more stages, a masked tail and plain tiles, rows beyond the end.
CASES = {
    "many_tiles": case("", {"causal": True}, B=1, H=2, G=1, T=201, S=700, D=128),
    "prefix": case("", {"causal": True, "prefix": True}, B=1, H=2, G=1, T=70, S=150, D=64, virtual=(2, 3)),
}
SEEDS = range(3)


@dataclass(frozen=True)
class Fault:
    old: str
    new: str
    case: str = "many_tiles"
    file: str = "shifted_attention.h"


FAULTS = {
    # ---- the copying warp and the barriers ----
    "a stage of keys is overwritten before it is empty":
        Fault("if (i >= kStages) barrier_wait(shared.keys_empty(i), shared.parity(i) ^ 1);", ""),
    "a stage of values is overwritten before it is empty":
        Fault("if (i >= kStages) barrier_wait(shared.values_empty(i), shared.parity(i) ^ 1);", ""),
    "an empty stage is awaited with the wrong parity":
        Fault("shared.keys_empty(i), shared.parity(i) ^ 1", "shared.keys_empty(i), shared.parity(i)"),
    "keys are released before their product is done":
        Fault("product_wait<1>();\n    pin(scores);\n    release(shared.keys_empty(i));",
              "release(shared.keys_empty(i));\n    product_wait<1>();\n    pin(scores);"),
    "values are released before their product is done":
        Fault("product_wait<0>();\n    pin(out);\n    release(shared.values_empty(i - 1));",
              "release(shared.values_empty(i - 1));\n    product_wait<0>();\n    pin(out);"),
    "the first keys are released before their product is done":
        Fault("product_wait<0>();\n    pin(scores);\n    release(shared.keys_empty(0));",
              "release(shared.keys_empty(0));\n    product_wait<0>();\n    pin(scores);"),
    "a release by every lane": Fault("if (lane == 0) barrier_arrive(empty);", "barrier_arrive(empty);"),
    "half the arrivals empty a stage":
        Fault("barrier_init(shared.keys_empty(i), 4 * Tile<D>::kGroups)",
              "barrier_init(shared.keys_empty(i), 2 * Tile<D>::kGroups)"),
    "the queries are not awaited": Fault("barrier_wait(shared.queries_full(), 0);", ""),
    "the first keys are not awaited": Fault("barrier_wait(shared.keys_full(0), 0);", ""),
    "keys are not awaited": Fault("barrier_wait(shared.keys_full(i), shared.parity(i));", ""),
    "values are not awaited": Fault("barrier_wait(shared.values_full(i - 1), shared.parity(i - 1));", ""),
    "the last values are not awaited":
        Fault("barrier_wait(shared.values_full(tiles - 1), shared.parity(tiles - 1));", ""),
    "too few bytes are expected": Fault("expect(full, D / 64 * panel)", "expect(full, panel)"),
    "too many bytes are expected": Fault("expect(full, D / 64 * panel)", "expect(full, D / 32 * panel)"),
    "barriers are used before they are known":
        Fault("  sync_threads();\n\n  if (thread < 128)", "\n  if (thread < 128)"),
    "stages share a barrier":
        Fault("queries_full() + (1 + i % kStages) * kBarrierBytes", "queries_full() + kBarrierBytes"),
    "values from the first tile on": Fault("shared.values_full(i), keys.first_key(i, tiles), g)",
                                         "shared.values_full(i), keys.first_key(tiles - 1 - i, tiles), g)"),
    "keys of another head": Fault("const int g = h / (p.H / p.G);", "const int g = h;"),
    # ---- products ----
    "scores are read before they are there": Fault("product_wait<1>();", "product_wait<2>();"),
    "the output is scaled while a product adds to it":
        Fault("    softmax();\n    product_wait<0>();",
              "    softmax();\n    UNROLL for (int j = 0; j < D / 2; ++j) out[j] *= rescale[j / 2 % 2];\n"
              "    product_wait<0>();"),
    "probabilities are overwritten in flight":
        Fault("    softmax();\n    product_wait<0>();",
              "    softmax();\n    keep_probabilities();\n    product_wait<0>();"),
    "registers of a product are not fenced": Fault("    pin(out);\n    product_fence();\n", ""),
    "the last product is not awaited":
        Fault("issue_values(tiles - 1);\n    product_wait<0>();", "issue_values(tiles - 1);"),
    "panels of values at the distance of rows":
        Fault("matrix_descriptor(shared.values(i), shared.kKeyPanel)",
              "matrix_descriptor(shared.values(i), 1024)"),
    "half a step along the values": Fault("advanced(b, j * 2048)", "advanced(b, j * 1024)"),
    "half a step along the keys":
        Fault("b, j / 4 * shared.kKeyPanel + j % 4 * 32", "b, j / 4 * shared.kKeyPanel + j % 4 * 16"),
    "every group reads the first queries":
        Fault("shared.queries() + group * kGroupRows * 128, 16", "shared.queries(), 16"),
    "descriptors without a swizzle":
        Fault("static_cast<uint64_t>(1) << 62", "static_cast<uint64_t>(0) << 62", file="hopper.h"),
    # ---- turns ----
    "nobody begins": Fault("if (group == kGroups - 1) named_arrive(1, 256);", ""),
    "the last turn is left": Fault("if (group == 0) named_sync(1, 256);", ""),
    "turns of the wrong size": Fault("named_sync(1 + group, 256);", "named_sync(1 + group, 128);"),
    # ---- softmax, edges, the end ----
    "the tail is not hidden": Fault("if (!kIsSeenByAll) hide(i);", "", "many_tiles"),
    "the first tile is not hidden": Fault("    hide(0);\n", ""),
    "rows of the other half": Fault("row + 8)}", "row)}"),
    "the maximum of two lanes": Fault("next = fmaxf(next, shuffle_xor(next, 2));", ""),
    "the output keeps an old scale": Fault("out[j] *= rescale[j / 2 % 2];", "out[j] *= rescale[0];"),
    "queries are overwritten before others read them":
        Fault("  sync_warp();  // the queries have been read", "", "prefix"),
    "rows are read before others wrote them": Fault("  sync_warp();\n  const int first", "  const int first"),
    "a column's swizzle is forgotten":
        Fault("swizzled(x.row + 8 * r, d % 8)", "swizzled(x.row, d % 8)"),
    "a virtual key of the wrong head":
        Fault("h / heads_per_key", "h / heads_per_key % 1", "prefix", "virtual_keys.h"),
    "the shift without the prefix's weight":
        Fault("x.out[j / 2 * 4 + 2 * r + j % 2] *= gate.kept();", ";", "prefix"),
}  # fmt: skip
QUICK = (
    "values are released before their product is done", "barriers are used before they are known",
    "the output is scaled while a product adds to it", "half a step along the keys",
)  # fmt: skip


@pytest.fixture(scope="module")
def budgets():
    return {name: budget_of(x, torch.bfloat16, "cpu", ways=(False,)) for name, x in CASES.items()}


def is_caught(given):
    try:
        assert_forward(given, impl="cuda")
    except (RuntimeError, AssertionError):
        return True
    return False


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in FAULTS]
)
def test_the_emulator_notices(name, budgets, tmp_path, monkeypatch):
    emulated.load()
    fault = FAULTS[name]
    shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    source = tmp_path / "csrc" / "cuda" / fault.file
    text = source.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has this {text.count(fault.old)} times: {fault.old}"
    source.write_text(text.replace(fault.old, fault.new))
    namespace = f"mmicl_planted_{list(FAULTS).index(name)}"
    torch.ops.load_library(emulated.compile_library(tmp_path / "csrc", namespace, ("-O1", "-w")))
    monkeypatch.setattr(torch.ops, "mmicl_cuda", getattr(torch.ops, namespace))
    runs = list(itertools.product(SEEDS, emulated.POLICIES))
    for seed, policy in runs:
        torch.ops.mmicl_cuda.emulate(seed, policy)
        if is_caught(budgets[fault.case]):
            return
    pytest.fail(f"not noticed in {len(runs)} runs")


def test_without_a_fault_nothing_is_noticed(budgets):
    emulated.load()
    for seed, policy in itertools.product(SEEDS, emulated.POLICIES):
        torch.ops.mmicl_cuda.emulate(seed, policy)
        for given in budgets.values():
            assert not is_caught(given)
    torch.ops.mmicl_cuda.emulate(0, "random")
