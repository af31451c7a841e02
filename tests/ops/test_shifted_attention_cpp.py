"""The CPU's kernels of few and of many queries, each over the whole contract: both take any number."""

import os
import subprocess
import sys

import pytest
import torch

from mmicl_kernels import ops
from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.ops._core.dispatch import has_cpu_kernels
from mmicl_kernels.ops.attention_shift.kernels import virtual_keys
from mmicl_kernels.ops.shifted_attention import _inference, _op, dispatch
from mmicl_kernels.ops.shifted_attention.options import Options
from mmicl_kernels.testing.budgets import gradients
from mmicl_kernels.testing.inputs import ints, output_gradients, shifted_attention_inputs
from tests.ops.shifted_attention_grid import (
    GRID,
    TYPICAL,
    added,
    assert_forward,
    assert_same_bits,
    assert_within,
    budget,
    budget_of,
    case,
    hiding,
    keep,
    minus_inf,
    run,
)
from tests.test_extension import assert_same_for_any_number_of_threads

if not has_cpu_kernels():
    pytest.skip("the C++ kernels are not built", allow_module_level=True)

# Keys in several parts, of which some see none.
LONG = {
    "parts": case("three parts, the last of a block and some", {"causal": True}, T=3, S=2130),
    "parts_bounds": case("parts of which a row sees nothing", {"kv_start": ints(1500, 0),
                                                               "kv_end": ints(2130, 9)}, T=2, S=2130),
    "parts_window": case("a window in two parts", {"window": 40, "causal": True, "q_start": 1040},
                         T=4, S=2130),
    "parts_mask": case("any pattern", {"mask": keep(2, 1, 1, 2130)}, T=2, S=2130),
    "parts_bias": case("-inf hides", {"mask": hiding(minus_inf, 4, 2130)}, T=4, S=2130),
    "parts_added": case("a learned bias", {"mask": added(1, 4, 1, 2130), "softcap": 3.0}, T=2, S=2130),
    "parts_all_keys": case("the gate over all parts", {"normalizer": "all_keys", "kv_start": ints(1100, 3),
                                                       "kv_end": ints(1300, 2130)}, T=2, S=2130),
}  # fmt: skip
# Sums of many: over keys for out and dq, over the queries of all heads for dk and dv. And tasks of several
# strips and tiles, which see other keys: smaller problems are cut into more tasks instead.
LARGE = {
    "strips_window": case("each strip begins elsewhere", {"window": 40, "causal": True}, T=300, S=330),
    "strips_bounds": case(
        "rows end elsewhere",
        {"kv_start": ints(150, 3), "kv_end": ints(290, 200), "causal": True, "q_start": 20},
        T=300,
        S=330,
    ),
    "strips_mask": case("any pattern", {"mask": keep(2, 1, 300, 330)}, T=300, S=330),
    "strips_all_keys": case("the gate over all", {"normalizer": "all_keys", "causal": True}, T=300, S=330),
    "keys": case("a sum over 8,192 keys", {}, T=8, S=8192, D=64),
    "queries": case("a sum over 16,384 queries", {}, B=1, T=2048, S=40, H=8, G=1, D=64),
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[0, 2**31], ids=["many", "few"])
def kernel(request, monkeypatch):
    """Whose kernel all queries take."""
    monkeypatch.setattr(dispatch, "FEW_QUERIES", request.param)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, marks=[] if dtype == torch.float32 or name in TYPICAL else pytest.mark.slow)
        for name, x in GRID.items()
        for dtype in DTYPES
        if "cu_seqlens_q" not in x.options
    ],
    ids=str,
)
def test_value(name, dtype):
    if dtype not in GRID[name].dtypes and dtype != torch.float64:
        pytest.skip("the eager form is exact there")
    given = budget(name, dtype, "cpu")
    with torch.no_grad():
        assert_forward(given, "composed")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LONG)
def test_parts(name, dtype):
    given = budget_of(LONG[name], dtype, "cpu", ways=(False,))
    with torch.no_grad():
        assert_forward(given, "composed")


@pytest.mark.parametrize("name", LARGE)
def test_large(name):
    assert_within(budget_of(LARGE[name], torch.float32, "cpu", ways=(False,)), "composed", False)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    if torch.ops.mmicl_cpu.isa() in (isa, "baseline"):
        pytest.skip(f"this machine already runs {torch.ops.mmicl_cpu.isa()}")
    environment = {**os.environ, "MMICL_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    chosen = " or ".join(["parts", "large", *(f"value and {name}" for name in TYPICAL)])
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", chosen]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout


def test_one_call_where_no_backward_follows(monkeypatch):
    calls = []
    monkeypatch.setattr(_op, "infer", lambda *args: calls.append(args) or _inference.infer(*args))
    for T, requires_grad in ((1, False), (40, False), (1, True), (40, True)):
        calls.clear()
        q, *others = shifted_attention_inputs(T=T)
        out = shifted_attention(q.requires_grad_(requires_grad), *others)
        assert len(calls) == (not requires_grad)
        assert torch.equal(out, shifted_attention(q.detach(), *others))


def stacked(*parameters):
    """As kernels take them."""
    return [x.float()[None, :, None].contiguous() for x in parameters]


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("mask", [None, keep(2, 1, 1, 37), keep(1, 4, 1, 37)], ids=str)
def test_a_step_is_the_op_of_one_query(mask, normalizer):
    """Beside a mask ``all_keys`` means the keys up to the last that any query sees."""
    q, k, v, *parameters = shifted_attention_inputs(T=1)
    kv_end = None
    if mask is not None:
        mask = mask.clone()
        mask[..., 30:] = False
        kv_end = ints(30, 30) if normalizer == "all_keys" else None
        mask[..., 29] = True
    expected = shifted_attention(q, k, v, *parameters, mask=mask, normalizer=normalizer, kv_end=kv_end)
    actual = torch.ops.mmicl.shifted_attention_step(
        q, k, v, *stacked(*parameters), None, None, q.shape[-1] ** -0.5, None, None, mask,
        normalizer == "all_keys",
    )  # fmt: skip
    assert torch.equal(actual.transpose(1, 2), expected) and actual.is_contiguous()


def test_a_step_reads_its_own_key_even_where_that_is_hidden():
    q, k, v, *parameters = shifted_attention_inputs(T=1, B=1)
    hidden = torch.zeros(1, 1, 1, 37, dtype=torch.bool)
    options = (None, None, 0.3, None, None, hidden, True)
    assert not torch.ops.mmicl.shifted_attention_step(q, k, v, *stacked(*parameters), *options).any()


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize(
    "sizes",
    [{"T": 1, "S": 2500}, {"B": 5, "T": 3, "S": 300, "H": 6, "G": 3}, {"B": 2, "T": 300, "S": 300}],
    ids=str,
)
def test_it_does_not_depend_on_the_number_of_threads(sizes, normalizer):
    inputs = shifted_attention_inputs(**sizes)

    def call(*inputs):
        return shifted_attention(*inputs, causal=True, normalizer=normalizer, return_lse=True)

    assert_same_for_any_number_of_threads(lambda: call(*inputs))
    douts = output_gradients(*inputs[0].shape, dtype=torch.float32)
    assert_same_for_any_number_of_threads(lambda: sum(gradients(call, inputs, douts), ()))


@pytest.mark.parametrize("offset", range(1, 4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [2, 30])
def test_it_does_not_depend_on_alignment(T, dtype, offset):
    inputs = shifted_attention_inputs(T=T, D=40, dtype=dtype)
    moved = []
    for x in inputs[:3]:
        room = x.new_empty(x.numel() + offset)[offset:]
        moved.append(room.view(x.shape).copy_(x))
    moved += inputs[3:]
    assert torch.equal(shifted_attention(*moved), shifted_attention(*inputs))
    douts = output_gradients(*inputs[0].shape, dtype=dtype)
    assert_same_bits(*(run(x, {"causal": True}, douts, "composed") for x in (inputs, moved)))


@pytest.mark.parametrize("T", [2, 30])
def test_nan_stays_where_it_is(T):
    """In the row, and the head, of a query, a key or a value; what a bool mask hides may be anything."""
    q, k, v, *parameters = shifted_attention_inputs(T=T, S=70)
    clean = shifted_attention(q, k, v, *parameters)
    for x in (q, k):
        changed = x.clone()
        changed[0, 1 if x is q else 0, 1, 3] = torch.nan
        given = [changed if y is x else y for y in (q, k, v)]
        out = shifted_attention(*given, *parameters)
        reached = torch.zeros(out.shape[:3], dtype=torch.bool)
        if x is q:
            reached[0, 1, 1] = True
        else:
            reached[0, : q.shape[1] // k.shape[1]] = True
        assert torch.isnan(out[reached]).all() and torch.equal(out[~reached], clean[~reached])
    mask = torch.arange(70) != 1
    hidden = k.clone()
    hidden[:, :, 1] = torch.nan
    options = {"mask": mask}
    expected = shifted_attention(q, k, v, *parameters, **options)
    assert torch.equal(shifted_attention(q, hidden, v, *parameters, **options), expected)


@pytest.mark.parametrize("name", ["causal", "mask_bounds", "bias_fp64", "prefix_5", "keys_of_queries"])
def test_opcheck(name):
    q, k, v, *parameters = GRID[name].inputs(torch.float32, "cpu")
    x = GRID[name].arguments(torch.float32, "cpu")
    options = Options(
        **{"scale": 0.3, **{key: x[key] for key in x if key in Options._fields and key != "prefix"}}
    )
    ids, prefix = x.get("adapter_ids"), x.get("prefix", False)
    which = (prefix, None) if isinstance(prefix, bool) else (False, prefix)
    keys = virtual_keys(q, *parameters, None if ids is None else ids.int(), *which)
    arguments = (
        q, k, v, *keys, 0.3, None, options.causal, options.window, options.q_start, options.q_starts,
        options.kv_start, options.kv_end, options.mask, False, 4,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mmicl.shifted_attention_inference.default, arguments)


@pytest.mark.parametrize(
    "message, change",
    [
        ("k has 3 heads, expected a divisor of 4", {"k": torch.zeros(2, 3, 9, 16)}),
        ("v has shape", {"v": torch.zeros(2, 2, 8, 16)}),
        ("k has dtype Double, expected Float", {"k": torch.zeros(2, 2, 9, 16).double()}),
        ("q has last stride 2", {"q": torch.zeros(2, 4, 1, 32)[..., ::2]}),
        ("mask has shape", {"mask": torch.ones(2, 1, 1, 8, dtype=torch.bool)}),
        ("mask has dtype Long", {"mask": torch.ones(2, 1, 1, 9, dtype=torch.int64)}),
        ("kv_end has shape", {"kv_end": ints(1, 2, 3)}),
        ("kv_end has dtype Float", {"kv_end": torch.zeros(2)}),
        ("q_start has shape", {"q_starts": ints(1)}),
        ("shift must be contiguous", {"shift": torch.zeros(1, 4, 1, 32)[..., ::2]}),
    ],
)
def test_what_it_refuses(message, change):
    """Memory is read as these checks allow, whoever calls it."""
    given = {
        "q": torch.zeros(2, 4, 1, 16), "k": torch.zeros(2, 2, 9, 16), "v": torch.zeros(2, 2, 9, 16),
        "weight": torch.zeros(1, 4, 1, 16), "bias": torch.zeros(1, 4, 1), "shift": torch.zeros(1, 4, 1, 16),
        "adapter_ids": None, "prefix": None, "scale": 0.25, "softcap": None, "causal": False, "window": None,
        "q_start": None, "q_starts": None, "kv_start": None, "kv_end": None, "mask": None, "all_keys": False,
        "few_queries": 4,
    }  # fmt: skip
    operator = torch.ops.mmicl.shifted_attention_inference
    assert not operator(**given)[0].any()
    with pytest.raises(RuntimeError, match=message):
        operator(**{**given, **change})


EXPORTED = """
import sys, torch
import mmicl_kernels.ops
program, inputs, expected = (sys.argv[1] + x for x in (".pt2", ".inputs", ".expected"))
out = torch.export.load(program).module()(*torch.load(inputs))
torch.testing.assert_close(out, torch.load(expected))
"""


@pytest.mark.parametrize("built", ["0", "1"], ids=["built", "not built"])
@pytest.mark.parametrize("op", ["shifted_attention", "residual_shift"])
def test_an_exported_program_runs_elsewhere(op, built, tmp_path):
    """In a process that has not loaded the C++ kernels, or has none."""

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return getattr(ops, op)(*inputs)

    x = torch.randn(2, 3, 16)
    inputs = shifted_attention_inputs(T=2) if op == "shifted_attention" else (x, x[0, 0])
    path = str(tmp_path / "program")
    with torch.no_grad():
        torch.export.save(torch.export.export(Module(), tuple(inputs)), path + ".pt2")
        torch.save(Module()(*inputs), path + ".expected")
    torch.save(tuple(inputs), path + ".inputs")
    environment = {**os.environ, "MMICL_DISABLE_EXTENSION": built}
    run = subprocess.run(
        [sys.executable, "-c", EXPORTED, path], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "q, keys",
    [
        ((1, 1024, 4, 1), (1, 1, 2**62, 1)),
        (((2**64 + 2) // 3, 0, 1, 4), (1, 1, 0, 4)),
        ((2**40, 0, 1, 4), None),
    ],
)
def test_sizes_beyond_any_memory(q, keys):
    """They are an error, or nothing to do; what is allocated never wraps around."""
    B, H, _, D = q
    k = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**62, 1) if keys and keys[2] else torch.empty(B, 1, 0, D)
    parameters = torch.zeros(H, D), torch.zeros(H), torch.zeros(H, D)
    try:
        out = shifted_attention(torch.zeros(q), k, k, *parameters, causal=True, window=8)
    except (RuntimeError, MemoryError) as error:
        assert "too many elements" in str(error)
    else:
        assert out.shape == q and out.numel() == 0
