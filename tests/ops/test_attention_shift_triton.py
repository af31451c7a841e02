"""The shift's Triton kernels: values in Triton's interpreter and on a GPU, machine code without one.

``test_values_in_the_interpreter`` starts a process on the value tests and on those here.
"""

import functools
import re

import pytest
import torch

pytest.importorskip("triton")

from mmicl_kernels.ops import attention_shift  # noqa: E402
from mmicl_kernels.ops._core.layout import new_heads  # noqa: E402
from mmicl_kernels.ops._core.virtual_keys import of_queries, of_tokens  # noqa: E402
from mmicl_kernels.ops.attention_shift import _triton  # noqa: E402
from mmicl_kernels.ops.attention_shift._triton import bwd, fwd, keys  # noqa: E402
from mmicl_kernels.ops.attention_shift.kernels import virtual_keys  # noqa: E402
from mmicl_kernels.testing.budgets import assert_base, assert_within_budget, gradients  # noqa: E402
from mmicl_kernels.testing.cross_compile import compiling_for, machine_code  # noqa: E402
from mmicl_kernels.testing.inputs import normal  # noqa: E402
from tests.ops.test_attention_shift import GRID, make_inputs  # noqa: E402
from tests.ops.triton_process import (  # noqa: E402
    CAPABILITIES,
    FLOATS,
    assert_no_synchronisation,
    assert_passes_interpreted,
    assert_replays,
    compiles,
    far_rows,
    on_device,
    on_gpu_alone,
)

COUNTS = {"attention_shift": 65, "attention_shift_triton": 40}
# By name of test_attention_shift.py's grid: columns and rows that fill tiles and do not, every layout.
IN_PLACE = (
    "decode", "speculated", "less_than_a_warp", "masked_heads_last", "odd_offsets", "seen_twice", "two_sums",
    "two_sums_ids", "keys_5", "prefix_16", "keys_of_queries",
)  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def inputs_of(name, dtype, device, **changes):
    """A case of the grid, its virtual keys as the kernels take them, and a gradient."""
    (out, lse, q, *parameters), options = make_inputs(dtype, device, **{**GRID[name], **changes})
    ids, prefix = options["adapter_ids"], options["prefix"]
    which = (False, prefix) if isinstance(prefix, torch.Tensor) else (prefix, None)
    dout = normal(*out.shape, dtype=dtype, device=device, seed=30)
    return (out, lse, q), virtual_keys(q, *parameters, None if ids is None else ids.int(), *which), dout


@compiles
@pytest.mark.parametrize("name", COUNTS)
def test_values_in_the_interpreter(name):
    """Runs the value tests of one file on the CPU."""
    assert_passes_interpreted("not independent_code", name, at_least=COUNTS[name])


# ---- values: the interpreter's, or a GPU's ----


@on_device
@dtypes
@pytest.mark.parametrize("D", (1, 2, 40))
@pytest.mark.parametrize("need_dq", (True, False))
def test_base_is_what_a_stock_backward_needs(need_dq, D, dtype, device):
    (a, lse, q), own, dout = inputs_of("odd_offsets", dtype, device, D=D, layout="heads_last")
    _, _, dq, base, *_ = _triton.attention_shift_bwd(dout, lse, q, *own, a, need_dq)
    assert_base(base, dout, (a, lse, q, *(x.squeeze(2) for x in own.parameters)), own.adapter_ids)
    assert base.transpose(1, 2).is_contiguous()
    assert dq.numel() == (a.numel() if need_dq else 0)

    without = _triton.attention_shift_bwd(dout, lse, q, *own, None, need_dq)
    assert without[3].numel() == 0
    assert torch.equal(dq, without[2])


@on_device
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name, device):
    (out, *rest), own, _ = inputs_of(name, torch.float16, device)
    expected = _triton.attention_shift_fwd(out, *rest, *own)
    written = out.clone(memory_format=torch.contiguous_format)
    _triton.attention_shift_fwd_(written, *rest, *own)
    assert torch.equal(written, expected)


@on_device
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("name", IN_PLACE)
def test_add_gate_grad(name, dtype, device):
    (out, lse, q), own, _ = inputs_of(name, dtype, device)
    weight, ids, N = own.weight, own.adapter_ids, own.weight.shape[2]
    dq, dg = new_heads(q).copy_(out), lse.nan_to_num(0.0, 0.0, 0.0)[..., None].repeat(1, 1, 1, N)
    rows = of_tokens(weight, ids, q.shape[1])
    if ids is not None:
        dg = dg * of_queries(ids >= 0)[..., None]  # as the backward returns it
    low = dq + (dg[..., None] * rows).sum(-2).to(dtype)
    exact = dq.double() + (dg.double()[..., None] * rows.double()).sum(-2)
    _triton.add_gate_grad_(dq, dg, weight, ids)
    assert_within_budget("dq", dq, low, exact)


@on_device
@pytest.mark.parametrize(("name", "changes"), (("plain", {}), ("prefix_5", {"virtual": (1, 5)})), ids=str)
def test_offsets_past_two_to_the_31(name, changes, device):
    """Five rows, 2^29 elements apart: the product of row and stride passes int32."""
    (out, lse, q), own, _ = inputs_of(name, torch.float16, device, B=1, H=1, T=5, **changes)
    far = far_rows(q)
    expected = _triton.attention_shift_fwd(out, lse, q, *own)
    assert torch.equal(_triton.attention_shift_fwd(out, lse, far, *own), expected)
    grads = _triton.attention_shift_bwd(out, lse, far, *own, out, True)
    assert all(map(torch.equal, grads, _triton.attention_shift_bwd(out, lse, q, *own, out, True)))
    far.copy_(out)
    _triton.attention_shift_fwd_(far, lse, q, *own)
    assert torch.equal(far, expected)


@on_device
@pytest.mark.parametrize("ids", (None, (1, -1, 2)))
def test_bit_equal_twice(ids, device):
    H, T = (1, 131) if device == "cpu" else (32, 2000)
    sizes = {"B": 3, "H": H, "T": T, "D": 64, "ids": ids, "adapters": ids and 4}
    (out, lse, q), own, dout = inputs_of("plain", torch.float32, device, **sizes)
    first, second = (_triton.attention_shift_bwd(dout, lse, q, *own, out, True) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---- machine code, without a GPU ----


KERNELS = (
    fwd.attention_shift_fwd_kernel,
    bwd.attention_shift_bwd_kernel,
    bwd.attention_shift_reduce_kernel,
    bwd.add_gate_grad_kernel,
)
KEYS_KERNELS = (keys.virtual_keys_fwd_kernel, keys.virtual_keys_bwd_kernel, keys.add_keys_grad_kernel)


def compiled(capability, dtype, wanted=KERNELS, **sizes):
    """Machine code of what the launchers would launch on a CUDA device, specialised by Triton itself."""
    sizes = {"B": 3, "H": 2, "layout": "heads_last", **sizes}
    (out, *rest), own, _ = inputs_of("plain", dtype, "cpu", **sizes)
    with compiling_for(capability, wanted) as kernels:
        _triton.attention_shift_fwd(out, *rest, *own)
        dg, _, dq, *_ = _triton.attention_shift_bwd(out, *rest, *own, out, False)
        dq = new_heads(out) if dq.numel() == 0 else dq
        _triton.add_gate_grad_(dq, dg, own.weight, own.adapter_ids)
    return [machine_code(kernel) for kernel in kernels]


# Registers that leave room for 8 programs of 4 warps on an SM of 65536, or 4 in the backward, which
# holds two sums beside its operands, and carries what base's rounding took; head dim 256 gets fewer.
REGISTERS = {"attention_shift_bwd_kernel": 128}
OTHER_REGISTERS = 64
ADAPTERS = {"ids": (1, -1, 2), "adapters": 4}


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("sizes", ({"T": 256, **ADAPTERS}, {"T": 1}), ids=("long", "short"))
def test_registers_and_vector_loads(sizes, dtype, capability):
    codes = compiled(capability, dtype, D=128, **sizes)
    assert [code.name for code in codes] == [k.__name__ for k in KERNELS]
    for code in codes:
        assert code.spilled_bytes == 0, code.name
        assert code.registers <= REGISTERS.get(code.name, OTHER_REGISTERS), (code.name, code.registers)
        reduces = code.name == "attention_shift_reduce_kernel"
        # One row of 128 16-bit numbers over the lanes of one warp is 8 bytes a lane.
        width = "v2" if sizes["T"] == 1 and dtype.itemsize == 2 and not reduces else "v4"
        assert f"ld.global.{width}.b32" in code.ptx, code.name
        assert reduces or f"st.global.{width}.b32" in code.ptx, code.name
        assert not re.search(r"(ld|st)\.global\.b16", code.ptx), code.name


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("D", (40, 80, 256))
def test_no_spills_at_other_head_dims(D, dtype):
    for code in compiled(90, dtype, T=256, D=D, **ADAPTERS, wide_ids=True):
        assert code.spilled_bytes == 0, code.name


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(
    "sizes",
    (
        {"T": 256, "virtual": (2, 8), "prefix": True},
        {"T": 256, "virtual": (1, 128)},
        {"T": 1, "virtual": (2, 8), "prefix": True},
        {"T": 256, "virtual": (2, 8), "adapters": 4, "ids": ((1, -1, 2, 0) * 64,) * 3},
    ),
    ids=("long", "many_keys", "short", "of_queries"),
)
def test_virtual_keys_do_not_spill(sizes, dtype, capability):
    codes = compiled(capability, dtype, KEYS_KERNELS, D=128, **sizes)
    assert [code.name for code in codes] == [kernel.__name__ for kernel in KEYS_KERNELS]
    for code in codes:
        assert code.spilled_bytes == 0, code.name


# ---- on a GPU alone ----


@on_gpu_alone
@pytest.mark.parametrize("changes", ({}, {"virtual": (2, 8), "prefix": True}), ids=("one_key", "prefix"))
@pytest.mark.parametrize("T", (1, 300))
def test_cuda_graph_replay(T, changes):
    sizes = {"B": 3, "H": 8, "T": T, "D": 128, **ADAPTERS, **changes}
    inputs, own, dout = inputs_of("plain", torch.bfloat16, "cuda", **sizes)

    def step():
        shifted = _triton.attention_shift_fwd(*inputs, *own)
        return shifted, *_triton.attention_shift_bwd(dout, *inputs[1:], *own, inputs[0], True)

    assert_replays(step, own.adapter_ids, inputs[2])  # ids are data: another request needs no new graph


@on_gpu_alone
@pytest.mark.parametrize("changes", ({}, {"virtual": (2, 8), "prefix": True}), ids=("one_key", "prefix"))
def test_no_host_synchronisation(changes):
    sizes = {"B": 3, "H": 8, "T": 100, "D": 128, **ADAPTERS, **changes}
    inputs, options = make_inputs(torch.bfloat16, "cuda", **sizes)
    shifted = functools.partial(attention_shift, **options, impl="triton")
    assert_no_synchronisation(lambda: gradients(shifted, inputs, inputs[:1]))
