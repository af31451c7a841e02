"""The shift's Triton kernels: values in Triton's interpreter and on a GPU, machine code without one.

``test_values_in_the_interpreter`` starts a process on this file.
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from mmicl_kernels.ops import attention_shift  # noqa: E402
from mmicl_kernels.ops._core.layout import new_heads  # noqa: E402
from mmicl_kernels.ops.attention_shift import _triton  # noqa: E402
from mmicl_kernels.ops.attention_shift._triton import bwd, fwd  # noqa: E402
from mmicl_kernels.ops.attention_shift.kernels import stacked_parameters  # noqa: E402
from mmicl_kernels.ops.attention_shift.reference import attention_shift_reference  # noqa: E402
from mmicl_kernels.testing.budgets import (
    assert_base,  # noqa: E402
    assert_within_budget,
    eager_attention_shift,
    gradients,
)
from mmicl_kernels.testing.cross_compile import compiling_for, machine_code  # noqa: E402
from mmicl_kernels.testing.inputs import attention_shift_inputs, normal  # noqa: E402
from tests.ops.triton_process import (  # noqa: E402
    INTERPRETED,
    assert_all_pass,
    assert_no_synchronisation,
    captured,
    compiles,
    interpreted,
    on_device,
)

# The interpreter rounds bf16 towards zero, a GPU to nearest.
DTYPES = (torch.float64, torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
NAMES = ("out", "lse", "q", "weight", "bias", "shift")
SUMMED = ((2, 3), (2,), (2, 3), (-1,), (), (-1,))  # the dims T and D of each of them
IDS = {torch.int32: [1, -1, 2], torch.int64: [2, 2, 0]}


@dataclass(frozen=True)
class Case:
    """Sizes and layout of one call, and why it is in the grid."""

    why: str
    B: int
    H: int
    T: int
    D: int
    layout: str = "dense"
    ids: torch.dtype | None = None

    def inputs(self, dtype, device):
        """``out, lse, q, weight, bias, shift`` with a -inf and a +inf in lse, and adapter_ids."""
        adapters = None if self.ids is None else 4  # the ids leave one without a row
        inputs = attention_shift_inputs(
            self.B, self.H, self.T, self.D, adapters=adapters, dtype=dtype, layout=self.layout
        )
        out, lse, q, *parameters = (x.to(device) for x in inputs)
        lse = lse.mT.contiguous().mT  # strides of another order than the shape's
        lse[0, 0, 0], lse[-1, -1, -1] = -torch.inf, torch.inf
        ids = None if self.ids is None else torch.tensor(IDS[self.ids], dtype=self.ids, device=device)
        return (out, lse, q, *parameters), ids

    def dout(self, dtype, device):
        return normal(self.B, self.H, self.T, self.D, dtype=dtype, seed=30).to(device)


CASES = (
    Case("decode, one row and warp per head", B=2, H=3, T=1, D=128),
    Case("decode with one speculated token and adapters", B=3, H=2, T=2, D=64, ids=torch.int64),
    Case("smallest head dim, which fills no warp", B=1, H=3, T=63, D=8),
    Case("masked head dim, heads beside one another", B=2, H=2, T=63, D=40, layout="heads_last"),
    Case("rows at odd offsets, adapters", B=3, H=2, T=20, D=72, layout="sliced", ids=torch.int32),
    Case("one batch row seen twice", B=2, H=2, T=33, D=80, layout="expanded"),
    Case("two partial sums of a head", B=1, H=2, T=131, D=96),
    Case("two partial sums with adapters", B=3, H=1, T=130, D=128, ids=torch.int32),
)
REAL_CASES = (
    Case("prefill", B=2, H=32, T=1000, D=128, layout="heads_last"),
    Case("prefill with adapters", B=3, H=32, T=500, D=128, layout="heads_last", ids=torch.int32),
    Case("decode", B=64, H=32, T=1, D=128),
    Case("many partial sums", B=8, H=4, T=4096, D=64),
)
cases = pytest.mark.parametrize(
    "case", CASES if INTERPRETED else CASES + REAL_CASES, ids=lambda c: c.why.replace(" ", "_")
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def double(tensors):
    return tuple(x.double() for x in tensors)


def stacked(inputs):
    """Inputs with the parameters as the kernels take them."""
    out, lse, q, *parameters = inputs
    return out, lse, q, *stacked_parameters(q, *parameters)


def eager(inputs, ids, dout, order):
    """Value and gradients of plain PyTorch, summing over T and D forwards or backwards.

    In fp64 one order alone may agree with the reference to the last bit and say nothing about rounding.
    """
    if order == "forwards":
        (value,), grads = gradients(lambda *x: eager_attention_shift(*x, adapter_ids=ids), inputs, [dout])
        return value, grads
    flipped = [x.flip(dims) for x, dims in zip(inputs, SUMMED, strict=True)]
    value, grads = eager(flipped, ids, dout.flip(2, 3), "forwards")
    return value.flip(2, 3), [x.flip(dims) for x, dims in zip(grads, SUMMED, strict=True)]


def row_parameter(parameter, ids):
    """``[H, D]`` or ``[A, H, D]`` as it multiplies ``[B, H, T, D]``."""
    return parameter[:, None] if ids is None else parameter[ids.clamp(min=0).long()][:, :, None]


@compiles
def test_values_in_the_interpreter():
    """Runs every value test of this file on the CPU."""
    assert_all_pass(interpreted(__file__), at_least=len(CASES) * len(DTYPES[:3]) + 1)


# ---- values: the interpreter's, or a GPU's ----


@on_device
@dtypes
@cases
def test_value_and_gradients(case, dtype, device):
    inputs, ids = case.inputs(dtype, device)
    dout = case.dout(dtype, device)

    def shifted(*tensors):
        return attention_shift(*tensors, adapter_ids=ids, impl="triton")

    (value,), grads = gradients(shifted, inputs, [dout])
    lows, low_grads = zip(
        *(eager(inputs, ids, dout, order) for order in ("forwards", "backwards")), strict=True
    )
    (exact,), exact_grads = gradients(
        lambda *x: attention_shift_reference(*x, ids), double(inputs), [dout.double()]
    )
    assert value.dtype == dtype
    assert value.transpose(1, 2).is_contiguous()
    assert_within_budget("value", value, lows, exact)
    for name, x, grad, low_grad, exact_grad in zip(
        NAMES, inputs, grads, zip(*low_grads, strict=True), exact_grads, strict=True
    ):
        assert grad.dtype == x.dtype, name
        assert_within_budget(f"d{name}", grad, low_grad, exact_grad)


@on_device
@dtypes
@pytest.mark.parametrize("D", (1, 2, 40))
@pytest.mark.parametrize("need_dq", (True, False))
def test_base_is_what_a_stock_backward_needs(need_dq, D, dtype, device):
    case = Case("", B=3, H=2, T=20, D=D, layout="heads_last", ids=torch.int32)
    inputs, ids = case.inputs(dtype, device)
    dout, a = case.dout(dtype, device), inputs[0]
    _, dq, base, *_ = _triton.attention_shift_bwd(dout, *stacked(inputs)[1:], ids, a, need_dq)
    assert_base(base, dout, inputs, ids)
    assert base.transpose(1, 2).is_contiguous()
    assert dq.numel() == (a.numel() if need_dq else 0)

    without = _triton.attention_shift_bwd(dout, *stacked(inputs)[1:], ids, None, need_dq)
    assert without[2].numel() == 0
    assert torch.equal(dq, without[1])


@on_device
@cases
def test_in_place(case, device):
    inputs, ids = case.inputs(torch.float16, device)
    out, *rest = stacked(inputs)
    expected = _triton.attention_shift_fwd(out, *rest, ids)
    written = out.clone(memory_format=torch.contiguous_format)
    _triton.attention_shift_fwd_(written, *rest, ids)
    assert torch.equal(written, expected)


@on_device
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@cases
def test_add_gate_grad(case, dtype, device):
    inputs, ids = case.inputs(dtype, device)
    weight = inputs[3]
    dq, dg = new_heads(inputs[2]).copy_(inputs[0]), inputs[1].nan_to_num(0.0, 0.0, 0.0)
    if ids is not None:
        dg = dg * (ids >= 0)[:, None, None]  # as the backward returns it
    exact, low = (
        a + (g[..., None] * row_parameter(w, ids)).to(a.dtype)
        for a, g, w in (double((dq, dg, weight)), (dq, dg, weight))
    )
    _triton.add_gate_grad_(dq, dg, stacked(inputs)[3], ids)
    assert_within_budget("dq", dq, low, exact)


@on_device
@pytest.mark.parametrize("lse", (-torch.inf, torch.inf))
def test_rows_with_an_infinite_lse_are_untouched(lse, device):
    case = Case("", B=2, H=2, T=5, D=16)
    (out, _, q, *parameters), _ = case.inputs(torch.float32, device)
    lse = torch.full(out.shape[:3], lse, device=device)
    inputs, dout = (out, lse, q, *parameters), case.dout(torch.float32, device)
    (value,), grads = gradients(lambda *x: attention_shift(*x, impl="triton"), inputs, [dout])
    assert torch.equal(value, out)
    assert torch.equal(grads[0], dout)
    for name, grad in zip(NAMES[1:], grads[1:], strict=True):
        assert not grad.any(), name


@on_device
def test_nan_is_not_hidden(device):
    case = Case("", B=1, H=2, T=5, D=16)
    (out, lse, *inputs), ids = case.inputs(torch.float32, device)
    lse = torch.zeros_like(lse)
    lse[0, 1, 3] = torch.nan
    value = attention_shift(out, lse, *inputs, adapter_ids=ids, impl="triton")
    assert torch.equal(value.isnan().all(-1), lse.isnan())


@on_device
@pytest.mark.parametrize("lse, mu", ((-3e38, 1.0), (3e38, 0.0), (-200.0, 1.0), (200.0, 0.0)))
def test_gate_saturates_without_overflow(lse, mu, device):
    case = Case("", B=1, H=2, T=5, D=16)
    (out, _, q, *parameters), _ = case.inputs(torch.float32, device)
    inputs = (out, torch.full(out.shape[:3], lse, device=device), q, *parameters)
    dout = case.dout(torch.float32, device)
    (value,), grads = gradients(lambda *x: attention_shift(*x, impl="triton"), inputs, [dout])
    shift = parameters[2]
    assert torch.equal(value, out + mu * shift[:, None])
    assert_within_budget("dshift", grads[5], mu * dout.sum((0, 2)), mu * dout.double().sum((0, 2)))
    for name, grad in zip(NAMES[1:5], grads[1:5], strict=True):
        assert torch.isfinite(grad).all(), name
        assert grad.abs().max() < 1e-30, name


@on_device
@pytest.mark.parametrize("shape", ((0, 2, 3, 8), (2, 2, 0, 8)))
def test_empty(shape, device):
    B, H, T, D = shape
    inputs = attention_shift_inputs(B, H, T, D)
    inputs = tuple(x.to(device) for x in inputs)
    (value,), grads = gradients(
        lambda *x: attention_shift(*x, impl="triton"), inputs, [torch.empty_like(inputs[0])]
    )
    assert value.shape == shape
    for name, x, grad in zip(NAMES, inputs, grads, strict=True):
        assert grad.shape == x.shape, name
        assert not grad.any(), name


@on_device
def test_offsets_past_two_to_the_31(device):
    """Five rows, 2^29 elements apart: the product of row and stride passes int32."""
    T, D, stride = 5, 16, 2**29
    storage = torch.from_numpy(np.zeros((T - 1) * stride + D, np.float16)).to(device)
    far = storage.as_strided((1, 1, T, D), (stride, stride, stride, 1))
    case = Case("", B=1, H=1, T=T, D=D)
    (out, lse, q, *parameters), _ = case.inputs(torch.float16, device)
    near = stacked((out, lse, q, *parameters))
    far.copy_(q)
    expected = _triton.attention_shift_fwd(*near, None)
    assert torch.equal(_triton.attention_shift_fwd(out, lse, far, *near[3:], None), expected)
    grads = _triton.attention_shift_bwd(out, lse, far, *near[3:], None, None, True)
    near_grads = _triton.attention_shift_bwd(out, lse, q, *near[3:], None, None, True)
    assert all(map(torch.equal, grads, near_grads))
    far.copy_(out)
    _triton.attention_shift_fwd_(far, lse, q, *near[3:], None)
    assert torch.equal(far, expected)


@on_device
@pytest.mark.parametrize("ids", (None, torch.int32))
def test_bit_equal_twice(ids, device):
    B, H, T = (3, 1, 131) if device == "cpu" else (3, 32, 2000)
    case = Case("", B=B, H=H, T=T, D=64, ids=ids)
    inputs, adapter_ids = case.inputs(torch.float32, device)
    dout = case.dout(torch.float32, device)
    first, second = (
        _triton.attention_shift_bwd(dout, *stacked(inputs)[1:], adapter_ids, inputs[0], True)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_device
@pytest.mark.parametrize("ids", (None, torch.int32))
def test_opcheck(ids, device):
    case = Case("", B=3, H=2, T=5, D=40, layout="sliced", ids=ids)
    inputs, adapter_ids = case.inputs(torch.float16, device)
    dout = case.dout(torch.float16, device)
    tests = ("test_schema", "test_faketensor")
    fwd, bwd = torch.ops.mmicl.attention_shift_fwd, torch.ops.mmicl.attention_shift_bwd
    torch.library.opcheck(fwd, (*inputs, adapter_ids, "triton"), test_utils=tests)
    torch.library.opcheck(bwd, (dout, *inputs[1:], adapter_ids, "triton"), test_utils=tests)


# ---- machine code, without a GPU ----


KERNELS = (
    fwd.attention_shift_fwd_kernel,
    bwd.attention_shift_bwd_kernel,
    bwd.attention_shift_reduce_kernel,
    bwd.add_gate_grad_kernel,
)


def compiled(capability, case, dtype):
    """Machine code of what the launchers would launch on a CUDA device, specialised by Triton itself."""
    inputs, ids = case.inputs(dtype, "cpu")
    out, *rest = stacked(inputs)
    with compiling_for(capability, KERNELS) as kernels:
        _triton.attention_shift_fwd(out, *rest, ids)
        dg, dq, *_ = _triton.attention_shift_bwd(out, *rest, ids, out, True)
        _triton.add_gate_grad_(dq, dg, rest[2], ids)
    return [machine_code(kernel) for kernel in kernels]


# Registers that leave room for 8 programs of 4 warps on an SM of 65536, or 4 in the backward, which
# holds two sums beside its operands, and carries what base's rounding took; head dim 256 gets fewer.
REGISTERS = {"attention_shift_bwd_kernel": 128}
OTHER_REGISTERS = 64
COMPILED = [
    pytest.param(Case("", B=3, H=2, T=256, D=128, layout="heads_last", ids=torch.int32), id="long"),
    pytest.param(Case("", B=3, H=2, T=1, D=128, layout="heads_last"), id="short"),
]


@compiles
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("case", COMPILED)
def test_registers_and_vector_loads(case, dtype, capability):
    codes = compiled(capability, case, dtype)
    assert [code.name for code in codes] == [k.__name__ for k in KERNELS]
    for code in codes:
        assert code.spilled_bytes == 0, code.name
        assert code.registers <= REGISTERS.get(code.name, OTHER_REGISTERS), (code.name, code.registers)
        reduces = code.name == "attention_shift_reduce_kernel"
        # One row of 128 16-bit numbers over the lanes of one warp is 8 bytes a lane.
        width = "v2" if case.T == 1 and dtype.itemsize == 2 and not reduces else "v4"
        assert f"ld.global.{width}.b32" in code.ptx, code.name
        assert reduces or f"st.global.{width}.b32" in code.ptx, code.name
        assert not re.search(r"(ld|st)\.global\.b16", code.ptx), code.name


@compiles
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("D", (40, 80, 256))
def test_no_spills_at_other_head_dims(D, dtype):
    case = Case("", B=3, H=2, T=256, D=D, layout="heads_last", ids=torch.int64)
    for code in compiled(90, case, dtype):
        assert code.spilled_bytes == 0, code.name


# ---- on a GPU alone ----


@pytest.mark.gpu
@compiles
@pytest.mark.parametrize("T", (1, 300))
def test_cuda_graph_replay(T):
    case = Case("", B=3, H=8, T=T, D=128, ids=torch.int32)
    inputs, ids = case.inputs(torch.bfloat16, "cuda")
    inputs, dout = stacked(inputs), case.dout(torch.bfloat16, "cuda")

    def step():
        shifted = _triton.attention_shift_fwd(*inputs, ids)
        return shifted, *_triton.attention_shift_bwd(dout, *inputs[1:], ids, inputs[0], True)

    graph, replayed = captured(step)
    ids.copy_(ids.roll(1))  # ids are data: another request needs no new graph
    inputs[2].mul_(0.5)
    graph.replay()
    for a, b in zip(replayed, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@compiles
def test_no_host_synchronisation():
    case = Case("", B=3, H=8, T=100, D=128, ids=torch.int32)
    inputs, ids = case.inputs(torch.bfloat16, "cuda")
    dout = case.dout(torch.bfloat16, "cuda")

    def step():
        gradients(lambda *x: attention_shift(*x, adapter_ids=ids, impl="triton"), inputs, [dout])

    assert_no_synchronisation(step)
