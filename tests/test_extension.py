"""The C++ operators of `torch.ops.mmicl_cpu` against the formula in float64.

An operator may err twice as much as eager PyTorch does with the formula in the operator's own dtype, plus
one rounding of its result. In float64 the formula errs as much as its peer would, so the peer is float32,
scaled by the ratio of the precisions, and counts three times.
"""

import functools
import importlib
import os
import subprocess
import sys

import pytest
import torch

from mmicl_kernels import _extension
from mmicl_kernels.ops._core import dispatch
from mmicl_kernels.ops._core.rows import uses_of
from mmicl_kernels.ops.alignment_loss import _torch as alignment_loss_torch
from mmicl_kernels.ops.prefix_splice import _torch as prefix_splice_torch
from mmicl_kernels.testing.budgets import (
    assert_base,
    assert_within_budget,
    eager_attention_shift,
    gradients,
)

B, H, T, A = 3, 5, 63, 2  # T is odd and no multiple of the kernel's eight lanes
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 40, 72, 80, 96, 128, 131]
NAMES = ["out", "lse", "q", "weight", "bias", "shift"]


@pytest.fixture
def ops():
    if not _extension.load():
        pytest.skip(f"C++ kernels: {_extension.status()['reason']}")
    return torch.ops.mmicl_cpu


# ---- whose kernels run ----


@pytest.mark.parametrize(
    "module, choose",
    [
        ("alignment_loss._op", "_kernels"),
        ("attention_shift.kernels", "backend_kernels"),
        ("prefix_splice._op", "_kernels"),
        ("residual_shift._op", "_kernels"),
        ("residual_shift.gradients", "_kernels"),
        ("residual_shift_rms_norm._op", "_kernels"),
    ],
)
def test_whose_kernels_run(module, choose, ops, monkeypatch):
    """C++'s on a CPU where they are built, else PyTorch's; Triton's where it is named, and on CUDA."""
    pytest.importorskip("triton")
    op = f"mmicl_kernels.ops.{module.split('.')[0]}"
    kernels = getattr(importlib.import_module(f"mmicl_kernels.ops.{module}"), choose)
    stock, triton = (importlib.import_module(f"{op}.{name}") for name in ("_torch", "_triton"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernels("composed", cpu) is ops
    assert kernels("triton", cpu) is kernels("composed", cuda) is triton
    monkeypatch.setattr(_extension, "load", lambda: False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert kernels("composed", cpu) is kernels("composed", cuda) is stock


# ---- the formula ----


def evaluate(inputs, dout, ids, dtype):
    """Every result of the two operators, by autograd of the eager form in `dtype` (lse at least float32)."""
    acc = torch.promote_types(dtype, torch.float32)
    tensors = [inputs[n].to(acc if n == "lse" else dtype) for n in NAMES]
    fn = functools.partial(eager_attention_shift, adapter_ids=ids)
    (value,), (_, dlse, dq, dweight, dbias, dshift) = gradients(fn, tensors, [dout.to(dtype)])
    dgate = torch.cat([dweight, dbias[..., None]], -1)  # bias is the weight of a constant feature
    return {"value": value, "dg": -dlse, "dq": dq, "dgate": dgate, "dshift": dshift}


def assert_near(actual, dtype, formula):
    """Results by name within twice the error of ``formula(dtype)``, and one rounding of each."""
    exact = formula(torch.float64)
    eager = formula(torch.float32 if dtype == torch.float64 else dtype)
    scale = 1.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1.0
    for name, result in actual.items():
        low = exact[name] + scale * (eager[name].double() - exact[name])
        assert_within_budget(name, result, low, exact[name], roundings=0)


# ---- inputs ----


def rows(dtype, D, layout):
    """[B, H, T, D] of values that float32 holds, in one of the memory layouts that attention meets."""
    if layout == "heads first":
        return torch.randn(B, H, T, D).to(dtype)
    if layout == "heads last":
        return torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    fused = torch.randn(B, T + 3, H, 3 * D + 1).to(dtype)  # a slice of a fused projection, unaligned
    return fused[:, 3:, :, D + 1 : 2 * D + 1].transpose(1, 2)


def make_inputs(dtype, D, layout="heads last"):
    acc = torch.promote_types(dtype, torch.float32)
    lse = 2 + torch.randn(B, T, H).to(acc).transpose(1, 2)
    lse[0, 1, 5], lse[1, 2, T - 1] = -torch.inf, torch.inf
    return {
        "out": rows(dtype, D, layout),
        "lse": lse,
        "q": rows(dtype, D, layout),
        "weight": torch.randn(A, H, D).to(acc) * D**-0.5,
        "bias": torch.randn(A, H).to(acc),
        "shift": torch.randn(A, H, D).to(acc),
    }


def tensors(inputs):
    """As the operators take them: one virtual key of each head."""
    return [x.unsqueeze(2) if name in ("weight", "bias", "shift") else x for name, x in inputs.items()]


def backward(ops, inputs, dout, ids, a=None, need_dq=True):
    dg, _, dq, base, _, *gradients = ops.attention_shift_bwd(
        dout, *tensors(inputs)[1:], ids, None, a, need_dq
    )
    dweight, dbias, dshift = (x.squeeze(2) for x in gradients)
    dgate = torch.cat([dweight, dbias[..., None]], -1)
    return {"dg": dg[..., 0], "dq": dq, "base": base, "dgate": dgate, "dshift": dshift}


IDS = torch.tensor([1, -1, 0], dtype=torch.int32)
FIRST = torch.zeros(B, dtype=torch.int32)  # what absent ids mean


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("layout", ["heads first", "heads last", "fused"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["no ids", "ids"])
def test_formula(ops, dtype, D, layout, ids):
    inputs, dout = make_inputs(dtype, D, layout), rows(dtype, D, layout)
    value = ops.attention_shift_fwd(*tensors(inputs), ids, None)
    results = {"value": value, **backward(ops, inputs, dout, ids, a=inputs["out"])}
    compared = {name: x for name, x in results.items() if name != "base"}
    adapters = FIRST if ids is None else ids
    assert_near(compared, dtype, functools.partial(evaluate, inputs, dout, adapters))
    assert_base(results["base"], dout, list(inputs.values()), adapters)

    for name in ("value", "dq", "base"):
        assert results[name].dtype == dtype and results[name].transpose(1, 2).is_contiguous(), name

    in_place = inputs["out"].clone(memory_format=torch.preserve_format)
    ops.attention_shift_fwd_(in_place, *tensors(inputs)[1:], ids, None)
    assert torch.equal(in_place, value)


def test_backward_returns_only_what_is_asked_for(ops):
    inputs, dout = make_inputs(torch.float32, 40), rows(torch.float32, 40, "heads last")
    full = backward(ops, inputs, dout, IDS, a=inputs["out"])
    lean = backward(ops, inputs, dout, IDS, need_dq=False)
    assert lean["dq"].numel() == lean["base"].numel() == 0
    for name in ("dg", "dgate", "dshift"):
        assert torch.equal(lean[name], full[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_formula_add_gate_grad(ops, dtype, D):
    inputs = make_inputs(dtype, D)
    weight, dg = inputs["weight"], torch.randn_like(inputs["lse"])
    dq = rows(dtype, D, "fused")
    before = dq.clone()
    ops.add_gate_grad_(dq, dg[..., None], weight.unsqueeze(2), IDS)

    def add(dtype):
        rows = weight[IDS.clamp(min=0)][:, :, None].to(dtype)
        return {"dq": (before.to(dtype) + dg.to(dtype)[..., None] * rows)[on]}

    on = IDS >= 0
    assert_near({"dq": dq[on]}, dtype, add)
    assert torch.equal(dq[~on], before[~on])


# ---- rows without a shift, and extremes ----


def test_unshifted_rows_are_untouched_and_contribute_nothing(ops):
    inputs, dout = make_inputs(torch.float32, 40), rows(torch.float32, 40, "heads last")
    clean = backward(ops, inputs, dout, IDS, a=inputs["out"])
    unshifted = torch.isinf(inputs["lse"]) | (IDS < 0)[:, None, None]
    for x in (inputs["q"], dout):
        x[unshifted] = torch.inf
    inputs["q"][0, 1, 5] = torch.nan

    value = ops.attention_shift_fwd(*tensors(inputs), IDS, None)
    assert torch.equal(value[unshifted], inputs["out"][unshifted])
    assert torch.isfinite(value).all()
    for name, result in backward(ops, inputs, dout, IDS, a=inputs["out"]).items():
        assert torch.equal(result, clean[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_gates(ops, dtype):
    inputs, dout = make_inputs(dtype, 8), rows(dtype, 8, "heads last").round()  # sums are exact
    inputs["bias"][0], inputs["bias"][1] = -torch.finfo(dtype).max, torch.finfo(dtype).max
    ids = torch.tensor([0, 1, 1], dtype=torch.int32)
    inputs["lse"].zero_()
    value = ops.attention_shift_fwd(*tensors(inputs), ids, None)
    assert torch.equal(value[0], inputs["out"][0])
    assert torch.equal(value[1:], inputs["out"][1:] + inputs["shift"][1][:, None])
    results = backward(ops, inputs, dout, ids)
    assert not results["dg"].any() and not results["dq"].any() and not results["dgate"].any()
    assert torch.equal(results["dshift"][1], dout[1:].sum((0, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [0.0, 1e-7, 1e-3, 1.0, 1e4, 1e38])
def test_formula_conversion_of_every_value(ops, dtype, magnitude):
    # the gate is exactly 1, so that the result is one float32 sum, rounded as PyTorch rounds it
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 512, 128)
    shift = torch.randn(1, 1, 128) * magnitude
    q, weight = torch.zeros_like(patterns), torch.zeros(1, 1, 1, 128)
    lse = torch.full((1, 1, 512), -1e4)
    parameters = weight, torch.zeros(1, 1, 1), shift[None]
    result = ops.attention_shift_fwd(patterns, lse, q, *parameters, None, None)
    expected = (patterns.float() + shift).to(dtype)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(result), nan)
    assert torch.equal(result[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_conversion_keeps_every_nan(ops, dtype):
    # all bits set: rounding this one up to bfloat16 by adding would give zero
    acc = torch.promote_types(dtype, torch.float32)
    shift = torch.full((1, 1, 8 * acc.itemsize), -1, dtype=torch.int8).view(acc)
    x, weight = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.zeros(1, 1, 8, dtype=acc)
    parameters = weight[None], weight[..., :1], shift[None]
    result = ops.attention_shift_fwd(x, weight[..., 0][None], x, *parameters, None, None)
    assert torch.isnan(result).all()


@pytest.mark.parametrize("shape", [(0, H, T, 8), (B, 0, T, 8), (B, H, 0, 8), (B, H, T, 0)])
def test_empty(ops, shape):
    b, h, t, d = shape
    x, lse = torch.randn(shape), torch.zeros(b, h, t)
    parameters = torch.randn(A, h, 1, d), torch.randn(A, h, 1), torch.randn(A, h, 1, d)
    ids = torch.zeros(b, dtype=torch.int32)
    assert ops.attention_shift_fwd(x, lse, x, *parameters, ids, None).shape == shape
    dg, _, dq, base, _, *gradients = ops.attention_shift_bwd(x, lse, x, *parameters, ids, None, x, True)
    assert dg.shape == (*lse.shape, 1) and dq.shape == base.shape == shape
    for gradient, parameter in zip(gradients, parameters, strict=True):
        assert gradient.shape == parameter.shape and not gradient.any()
    ops.add_gate_grad_(dq, dg, parameters[0], ids)


def assert_same_for_any_number_of_threads(run):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_result_does_not_depend_on_the_number_of_threads(ops):
    b, h, t, d = 2, 8, 1000, 128
    x, out, dout = (torch.randn(b, t, h, d).transpose(1, 2) for _ in range(3))
    lse = torch.randn(b, h, t)
    ids = torch.tensor([1, 0], dtype=torch.int32)
    prefix = torch.tensor([True] * A)

    def run(keys, prefix):
        value = ops.attention_shift_fwd(out, lse, x, *keys, ids, prefix)
        return value, *ops.attention_shift_bwd(dout, lse, x, *keys, ids, prefix, out, True)

    for n, which in ((1, None), (3, None), (3, prefix)):
        keys = torch.randn(A, h, n, d), torch.randn(A, h, n), torch.randn(A, h, n, d)
        assert_same_for_any_number_of_threads(functools.partial(run, keys, which))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(ops, isa):
    if ops.isa() in (isa, "baseline"):
        pytest.skip(f"this machine already runs {ops.isa()}")
    environment = {**os.environ, "MMICL_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    script = "from mmicl_kernels import _extension as e; print(e.status()['isa'])"
    chosen = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert chosen.stdout.strip() == isa
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "formula and not heads"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout


# ---- bad input ----


def expand_last(x):
    return x[..., :1].expand_as(x)


BAD_INPUTS = {
    "q dims": ({"q": lambda x: x[0]}, r"q has 3 dims, expected \[B, H, T, D\]"),
    "out dims": ({"out": lambda x: x[0]}, "out has 3 dims"),
    "q dtype": ({"q": lambda x: x.int()}, "q has dtype Int"),
    "out dtype": ({"out": lambda x: x.double()}, "out has dtype Double, expected Float"),
    "out shape": ({"out": lambda x: x[:, :, 1:]}, r"out has shape \[3, 5, 62, 8\], expected"),
    "lse shape": ({"lse": lambda x: x[..., 1:]}, r"lse has shape \[3, 5, 62\]"),
    "lse dtype": ({"lse": lambda x: x.bfloat16()}, "lse has dtype BFloat16, expected Float"),
    "weight dims": ({"weight": lambda x: x[0]}, r"weight has 3 dims, expected \[A, P, N, D\]"),
    "weight heads": ({"weight": lambda x: x[:, 1:]}, "weight has 4 heads, expected a divisor of 5"),
    "weight strides": ({"weight": lambda x: x.mT.contiguous().mT}, "weight must be contiguous"),
    "bias shape": ({"bias": lambda x: x[:1]}, "bias has shape"),
    "shift shape": ({"shift": lambda x: x[:1]}, "shift has shape"),
    "shift dtype": ({"shift": lambda x: x.half()}, "shift has dtype Half"),
    "q last stride": ({"q": expand_last}, "q has last stride 0, expected 1"),
    "out last stride": ({"out": lambda x: x.mT.contiguous().mT}, "out has last stride 63"),
    "ids high": ({"ids": lambda x: x + 1}, r"adapter_ids\[0\] is 2, expected -1 or 0 to 1"),
    "ids low": ({"ids": lambda x: x - 1}, r"adapter_ids\[1\] is -2"),
    "ids dtype": ({"ids": lambda x: x.long()}, "adapter_ids has dtype Long, expected Int"),
    "ids shape": ({"ids": lambda x: x[:2]}, r"adapter_ids has shape \[2\], expected \[3\]"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input(ops, case):
    changes, message = BAD_INPUTS[case]
    inputs = {**make_inputs(torch.float32, 8), "ids": IDS, "prefix": None}
    for name, change in changes.items():
        inputs[name] = change(inputs[name])
    out, *others = tensors(inputs)
    for op in (ops.attention_shift_fwd, ops.attention_shift_fwd_):
        with pytest.raises(RuntimeError, match=message):
            op(out, *others)
    dout = torch.zeros(B, H, T, 8)
    if case != "out dims":
        with pytest.raises(RuntimeError, match=message.replace("out has", "a has")):
            ops.attention_shift_bwd(dout, *others, out, True)


def test_bad_input_of_one_operator(ops):
    inputs, dout = make_inputs(torch.float32, 8), rows(torch.float32, 8, "heads last")
    dg, weight = inputs["lse"][..., None], inputs["weight"].unsqueeze(2)
    with pytest.raises(RuntimeError, match="a has shape"):
        backward(ops, inputs, dout, IDS, a=dout[:, :, 1:])
    with pytest.raises(RuntimeError, match="dout has shape"):
        backward(ops, inputs, dout[:, :, 1:], IDS)
    with pytest.raises(RuntimeError, match="out is written to, but its elements along dim 0"):
        expanded = inputs["out"][:1].expand(B, H, T, 8)
        ops.attention_shift_fwd_(expanded, *tensors(inputs)[1:], IDS, None)
    with pytest.raises(RuntimeError, match="dg has dtype Double"):
        ops.add_gate_grad_(dout, dg.double(), weight, IDS)
    with pytest.raises(RuntimeError, match="weight has no adapters"):
        ops.add_gate_grad_(dout, dg, weight[:0], None)
    with pytest.raises(RuntimeError, match="weight has 0 keys, expected 1 to 2048"):
        ops.add_gate_grad_(dout, dg, weight[:, :, :0], IDS)
    prefix = torch.ones(A, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"prefix has shape \[1\], expected \[2\]"):
        ops.attention_shift_fwd(*tensors(inputs), IDS, prefix[:1])
    with pytest.raises(RuntimeError, match="a is None, expected the attention output beside a prefix"):
        ops.attention_shift_bwd(dout, *tensors(inputs)[1:], IDS, prefix, None, True)
    with pytest.raises(RuntimeError, match=r"adapter_ids\[0, 0\] is 2, expected -1 or 0 to 1"):
        ops.attention_shift_fwd(*tensors(inputs), IDS[:, None].expand(B, T).cumsum(0).int() + 1, None)


def test_schemas(ops):
    inputs, dout = make_inputs(torch.float32, 8), rows(torch.float32, 8, "heads last")
    args, prefix = tensors(inputs), torch.tensor([True, False])
    check = torch.library.opcheck
    for which in (None, prefix):
        check(ops.attention_shift_fwd.default, (*args, IDS, which), test_utils="test_schema")
        check(ops.attention_shift_fwd_.default, (*args, IDS, which), test_utils="test_schema")
        backward_args = (dout, *args[1:], IDS, which, inputs["out"], True)
        check(ops.attention_shift_bwd.default, backward_args, test_utils="test_schema")
    gate_args = (dout, torch.randn(B, H, T, 1), args[3], IDS)
    check(ops.add_gate_grad_.default, gate_args, test_utils="test_schema")


# ---- prefix_splice; its own tests run with these operators and without ----


def make_splice(bank_dtype, prompt_dtype, C, R=3, T=4):
    """The arguments of the forward operator but for the layout: R requests that share demonstrations."""
    ids = torch.arange(4 * R, dtype=torch.int32) * 3 % 5
    bank = torch.randn(30, C, dtype=torch.float64).to(bank_dtype)
    prompt = torch.randn(R, T, C, dtype=torch.float64).to(prompt_dtype)
    offsets = torch.tensor([2, 5, 5, 12, 13, 29])
    return [bank, None, offsets, ids, torch.arange(R + 1) * 4, prompt, None, None, None, None]


def splice_gradients(kernels, dout, outputs, bank, offsets, ids, prompt):
    bounds = (None, None, None)
    return kernels.prefix_splice_bwd(
        dout, offsets, ids, *outputs[5:], list(prompt.shape), *bounds, len(bank), bank.dtype, True, True
    )


@pytest.mark.parametrize("C", [1, 13, 64])
@pytest.mark.parametrize("prompt_dtype", DTYPES)
@pytest.mark.parametrize("bank_dtype", DTYPES)
def test_formula_splice_converts_as_pytorch_does(ops, bank_dtype, prompt_dtype, C):
    arguments = make_splice(bank_dtype, prompt_dtype, C)
    bank, _, offsets, ids, _, prompt, *_ = arguments
    results = []
    for kernels in (ops, prefix_splice_torch):
        outputs = kernels.prefix_splice_fwd(*arguments, "left", 60, 60)
        grads = splice_gradients(kernels, outputs[0], outputs, bank, offsets, ids, prompt)
        results.append([*outputs, *grads])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("prompt_dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_formula_splice_dequantises_as_pytorch_does(ops, scale_dtype, prompt_dtype):
    arguments = make_splice(torch.float32, prompt_dtype, 13)
    arguments[0] = torch.randint(-128, 128, (30, 13), dtype=torch.int8)
    arguments[1] = torch.randn(60, dtype=torch.float64).to(scale_dtype)[::2]
    a, b = (k.prefix_splice_fwd(*arguments, "packed", 200, 60)[0] for k in (ops, prefix_splice_torch))
    assert torch.equal(a, b)


def test_splice_does_not_depend_on_the_number_of_threads(ops):
    arguments = make_splice(torch.bfloat16, torch.float32, 3000, R=8, T=40)
    bank, _, offsets, ids, _, prompt, *_ = arguments

    def run():
        outputs = ops.prefix_splice_fwd(*arguments, "right", 100, 100)
        grads = splice_gradients(ops, outputs[0], outputs, bank, offsets, ids, prompt)
        batch = torch.zeros(16, 50, 3000)
        places = ops.prefix_splice_place_(batch, *arguments[:5], torch.arange(8) - 4)
        return *outputs, *grads, batch, *places

    assert_same_for_any_number_of_threads(run)


def test_splice_into_large_pages(ops):
    """From 8 MiB on the output asks for them; its ends lie within some."""
    bank, _, offsets, ids, cu_demos, prompt, *_ = arguments = make_splice(torch.float32, torch.float32, 4099)
    out = ops.prefix_splice_fwd(*arguments, "left", 700, 700)[0]
    assert out.nbytes > 2**23 and not out[:, :640].any()
    for r in range(3):
        named = [bank[offsets[d] : offsets[d + 1]] for d in ids[cu_demos[r] : cu_demos[r + 1]]]
        sequence = torch.cat([*named, prompt[r]])
        assert torch.equal(out[r, 700 - len(sequence) :], sequence)


def changed_splice(**changes):
    names = ("bank", "scale", "offsets", "ids", "cu_demos", "prompt", "start", "end", "cu_prompt", "labels")
    arguments = dict(zip(names, make_splice(torch.float32, torch.float32, 8), strict=True))
    return [*(arguments | changes).values(), "left", 60, 60]


BAD_SPLICES = {
    "bank dims": ({"bank": torch.zeros(8)}, r"bank has 1 dims, expected \[N, C\]"),
    "bank columns": ({"bank": torch.zeros(30, 7)}, r"bank has shape \[30, 7\], expected \[30, 8\]"),
    "bank dtype": ({"bank": torch.zeros(30, 8).int()}, "bank has dtype Int"),
    "bank scaled": ({"scale": torch.ones(30)}, "bank has dtype Float, expected Char"),
    "scale": (
        {"bank": torch.zeros(30, 8, dtype=torch.int8), "scale": torch.ones(29)},
        r"bank_scale has shape \[29\], expected \[30\]",
    ),
    "offsets": ({"offsets": torch.zeros(0).long()}, "offsets is empty"),
    "ids dtype": ({"ids": torch.zeros(4)}, "demo_ids has dtype Float, expected Int or Long"),
    "ids dims": ({"ids": torch.zeros(4, 1).int()}, "demo_ids has 2 dims, expected 1"),
    "prompt rows": ({"prompt": torch.zeros(2, 4, 8)}, "prompt has 2 rows, expected 3"),
    "prompt stride": ({"prompt": torch.zeros(3, 8, 4).mT}, "prompt has last stride 4"),
    "start": ({"start": torch.zeros(2).int()}, "prompt_start has 2 numbers, expected 3"),
    "labels": ({"labels": torch.zeros(3, 3).int()}, "labels has 9 numbers, expected 12"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SPLICES)
def test_bad_splice(ops, case):
    changes, message = BAD_SPLICES[case]
    with pytest.raises(RuntimeError, match=message):
        ops.prefix_splice_fwd(*changed_splice(**changes))


def test_splice_backward_reads_no_place_outside_of_dout(ops):
    bank, _, offsets, ids, _, prompt, *_ = arguments = changed_splice()
    outputs = ops.prefix_splice_fwd(*arguments)
    for i, bad, message in (
        (5, -60, "demo_places"), (5, 180, "demo_places"), (6, 121, "prompt_places"), (6, -1, "prompt_places"),
    ):  # fmt: skip
        places = [x.clone() for x in outputs]
        places[i][0, 1] = bad
        with pytest.raises(ValueError, match=message):
            splice_gradients(ops, outputs[0], places, bank, offsets, ids, prompt)
    far = [x.clone() for x in outputs]
    far[6][1, 1] = 57  # four tokens from there on would pass the end of the batch row
    with pytest.raises(ValueError, match="prompt_places"):
        splice_gradients(ops, outputs[0], far, bank, offsets, ids, prompt)


def test_splice_schemas(ops):
    arguments = changed_splice()
    check = torch.library.opcheck
    check(ops.prefix_splice_fwd.default, tuple(arguments), test_utils="test_schema")
    starts = torch.arange(3)
    check(
        ops.prefix_splice_place_.default, (torch.zeros(6, 9, 8), *arguments[:5], starts),
        test_utils="test_schema",
    )  # fmt: skip
    outputs = ops.prefix_splice_fwd(*arguments)
    saved = (outputs[0], *arguments[2:4], *outputs[5:], [3, 4, 8], None, None, None, 30, torch.float16)
    check(ops.prefix_splice_bwd.default, (*saved, True, True), test_utils="test_schema")


# ---- alignment_loss; its own tests run with these operators and without ----


def make_alignment(dtype, target_dtype, C, N=40):
    """``(dd, ds), states, targets, index, order, starts``: indices before and past all rows, some twice."""
    states = torch.randn(3, 23, C, dtype=torch.float64).to(dtype)[:, 2:22]
    targets = torch.randn(N, C + 1, dtype=torch.float64).to(target_dtype)[:, 1:]
    index = torch.arange(N) ** 2 % 67 - 1
    dd, ds = torch.randn(2, N, dtype=torch.promote_types(dtype, torch.float32))
    dd[::5], ds[::10], ds[1::10] = 0, 0, 0  # one, the other, both
    return (dd, ds), states, targets, index, *uses_of(index, 60)


@pytest.mark.parametrize("C", [1, 13, 64])
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_alignment(ops, dtype, target_dtype, C):
    """Against plain PyTorch in float64: one rounding of the result and eight of the sums."""
    squares, states, targets, index, order, starts = make_alignment(dtype, target_dtype, C)
    acc = squares[0].dtype
    rows, wide = (states, targets), (states.double(), targets.to(acc).double())
    results = [*ops.alignment_squares_fwd(*rows, index)]
    results.append(ops.alignment_squares_bwd(*squares, *rows, order, starts))
    exact = [*alignment_loss_torch.alignment_squares_fwd(*wide, index)]
    squares = [x.double() for x in squares]
    exact.append(alignment_loss_torch.alignment_squares_bwd(*squares, *wide, order, starts))
    for name, actual, expected in zip(("d", "s", "dstates"), results, exact, strict=True):
        assert_within_budget(name, actual, expected, expected, roundings=8)
        assert torch.equal(actual == 0, expected == 0)
    assert [x.dtype for x in results] == [acc, acc, dtype]


def test_alignment_does_not_depend_on_the_number_of_threads(ops):
    squares, *rows, index, order, starts = make_alignment(torch.bfloat16, torch.float32, 9000)

    def run():
        outputs = ops.alignment_squares_fwd(*rows, index)
        return *outputs, ops.alignment_squares_bwd(*squares, *rows, order, starts)

    assert_same_for_any_number_of_threads(run)


ALIGNMENT = ("dd", "ds", "states", "targets", "order", "starts")
BAD_ALIGNMENTS = {
    "dd dtype": ({"dd": torch.zeros(40).double()}, "dd has dtype Double, expected Float"),
    "dd shape": ({"dd": torch.zeros(39)}, r"dd has shape \[39\], expected \[40\]"),
    "ds dtype": ({"ds": torch.zeros(40).half()}, "ds has dtype Half, expected Float"),
    "states dims": ({"states": torch.zeros(20, 8)}, "states has 2 dims, expected 3"),
    "states dtype": ({"states": torch.zeros(3, 20, 8).int()}, "states has dtype Int"),
    "states stride": ({"states": torch.zeros(3, 8, 20).mT}, "states has last stride 20"),
    "targets dims": ({"targets": torch.zeros(1, 40, 8)}, "targets has 3 dims, expected 2"),
    "targets rows": ({"targets": torch.zeros(39, 8)}, r"targets has shape \[39, 8\], expected \[40, 8\]"),
    "targets columns": ({"targets": torch.zeros(40, 9)}, r"expected \[40, 8\]"),
    "targets dtype": ({"targets": torch.zeros(40, 8).char()}, "targets has dtype Char"),
    "order dtype": ({"order": torch.arange(40).int()}, "order has dtype Int, expected Long"),
    "order low": ({"order": torch.arange(40) - 1}, r"order\[0\] is -1, expected 0 to 39"),
    "order high": ({"order": torch.arange(40) + 1}, r"order\[39\] is 40, expected 0 to 39"),
    "starts shape": ({"starts": torch.zeros(60).long()}, r"starts has shape \[60\], expected \[61\]"),
    "starts low": ({"starts": torch.arange(61).clamp(max=9) - 1}, "starts goes from -1 to 8"),
    "starts high": ({"starts": torch.arange(61)}, "starts goes from 0 to 60, expected 0 to 40"),
    "starts order": ({"starts": (torch.arange(61) == 7).long()}, r"starts\[8\] is 0, expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ALIGNMENTS)
def test_bad_alignment(ops, case):
    squares, states, targets, index, order, starts = make_alignment(torch.float32, torch.float32, 8)
    arguments = dict(zip(ALIGNMENT, (*squares, states, targets, order, starts), strict=True))
    changes, message = BAD_ALIGNMENTS[case]
    with pytest.raises(RuntimeError, match=message):
        ops.alignment_squares_bwd(*(arguments | changes).values())
    if case.startswith(("states", "targets")):
        arguments = {"states": states, "targets": targets, "index": index}
        with pytest.raises(RuntimeError, match=message):
            ops.alignment_squares_fwd(*(arguments | changes).values())


def test_alignment_schemas(ops):
    squares, *rows, index, order, starts = make_alignment(torch.float32, torch.float16, 8)
    check = torch.library.opcheck
    check(ops.alignment_squares_fwd.default, (*rows, index), test_utils="test_schema")
    check(ops.alignment_squares_bwd.default, (*squares, *rows, order, starts), test_utils="test_schema")


# ---- loading ----


def test_status_describes_the_build(ops):
    status = _extension.status()
    assert status["built"] and status["loaded"] and status["reason"] is None
    assert status["isa"] in status["build"]["isas"]
    assert status["build"]["torch_version"].split(".")[0] == torch.__version__.split(".")[0]


def test_disabled(monkeypatch):
    monkeypatch.setenv("MMICL_DISABLE_EXTENSION", "1")
    _extension.load.cache_clear()
    try:
        assert _extension.load() is False
        status = _extension.status()
        assert not status["built"] and "MMICL_DISABLE_EXTENSION" in status["reason"]
    finally:
        _extension.load.cache_clear()


def test_broken_library_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.delenv("MMICL_DISABLE_EXTENSION", raising=False)
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    _extension.load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=f"{broken} does not load with torch"):
            _extension.load()
        status = _extension.status()
        assert status["built"] and not status["loaded"] and str(broken) in status["reason"]
    finally:
        _extension.load.cache_clear()


@pytest.fixture
def cuda_torch(monkeypatch):
    """As if torch had been built for CUDA; nothing of it is called."""
    monkeypatch.delenv("MMICL_DISABLE_EXTENSION", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _extension.missing_cuda.cache_clear()
    yield
    _extension.missing_cuda.cache_clear()


def test_cuda_kernels_not_built(cuda_torch, monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    assert _extension.missing_cuda().startswith("not built: ")


def test_cuda_kernels_turned_off(cuda_torch, monkeypatch):
    monkeypatch.setenv("MMICL_DISABLE_EXTENSION", "1")
    assert _extension.missing_cuda() == "turned off by MMICL_DISABLE_EXTENSION=1"


def test_cuda_kernels_without_cuda(cuda_torch, monkeypatch, tmp_path):
    (tmp_path / "_C_cuda.abi3.so").write_bytes(b"is not looked into")
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _extension.missing_cuda() == "torch was built for CPU"


def test_broken_cuda_kernels_are_named(cuda_torch, monkeypatch, tmp_path):
    broken = tmp_path / "_C_cuda.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=f"{broken} does not load with torch"):
        _extension.missing_cuda()
    assert _extension._library("_C")[0] is None, "one library is not the other"
