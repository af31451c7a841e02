"""The projection's Triton kernels: values in the interpreter and on a GPU, machine code without one.

``test_values_in_the_interpreter`` starts a process on the value tests and on those here.
"""

import functools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from mmicl_kernels.ops._core import rows as stock_rows  # noqa: E402
from mmicl_kernels.ops.row_projection import _triton, row_projection  # noqa: E402
from mmicl_kernels.testing.budgets import gradients  # noqa: E402
from mmicl_kernels.testing.cross_compile import compiling_for, machine_code  # noqa: E402
from mmicl_kernels.testing.inputs import hidden_states, normal  # noqa: E402
from tests.ops.chosen_rows import INDICES  # noqa: E402
from tests.ops.triton_process import (  # noqa: E402
    CAPABILITIES,
    assert_machine_code,
    assert_passes_interpreted,
    assert_replays,
    compiles,
    far_rows,
    launches,
    on_device,
    on_gpu_alone,
)

GATHER, CLEAR, SCATTER = KERNELS = (
    _triton.gather_rows_kernel,
    _triton.clear_rows_kernel,
    _triton.scatter_rows_kernel,
)
COUNTS = {"row_projection": 65, "row_projection_triton": 15}
OTHERS = "not bad_input and not independent_code"
# Of test_row_projection.py: fp16 and 4096 uses of a row.
SLOW = "value_and_gradients and torch.float16] or duplicates_are_summed"


@compiles
@pytest.mark.parametrize("name", COUNTS)
def test_values_in_the_interpreter(name):
    """Runs the value tests of one file on the CPU, but for the slow ones."""
    assert_passes_interpreted(f"{OTHERS} and not ({SLOW})", name, at_least=COUNTS[name])


@compiles
@pytest.mark.slow
def test_slow_values_in_the_interpreter():
    assert_passes_interpreted(f"{OTHERS} and ({SLOW})", "row_projection", at_least=45)


# ---- values: the interpreter's, or a GPU's ----


@on_device
@pytest.mark.parametrize("layout", ("dense", "tokens_first", "sliced", "expanded"))
@pytest.mark.parametrize("name", INDICES)
def test_copies_are_the_stock_ones(name, layout, device):
    """Several programs along rows and columns, and a ragged end of both; and indices that are no rows."""
    B, T, C = 3, 30, 2500
    hidden = hidden_states(B, T, C, dtype=torch.float32, device=device, layout=layout)
    index = torch.tensor(INDICES[name], dtype=torch.long, device=device)
    assert torch.equal(_triton.gather_rows(hidden, index), stock_rows.gather_rows(hidden, index))
    dx = normal(len(index), C, dtype=torch.float32, device=device)
    expected = stock_rows.scatter_rows(dx, index, B, T)
    for x in (dx, dx.t().contiguous().t()):
        assert torch.equal(_triton.scatter_rows(x, index, B, T), expected)
    expected = stock_rows.clear_rows_(dx.clone(), index, B * T)
    assert torch.equal(_triton.clear_rows_(dx, index, B * T), expected)


@on_device
def test_offsets_past_two_to_the_31(device):
    """Rows 2^29 elements apart: the product of row and stride passes int32, of tokens and of batch rows."""
    index = torch.tensor([5, 0, 4, 5], device=device)
    for shape in ((1, 6, 16), (6, 1, 16)):
        near = normal(*shape, dtype=torch.float16, device=device)
        assert torch.equal(_triton.gather_rows(far_rows(near), index), near.view(6, 16)[index])


@on_device
def test_launches(device):
    """Two around the forward's product; before the backward's one, after it with dhidden a sort and one."""
    hidden = normal(2, 13, 40, dtype=torch.float32, device=device)
    weight, bias = (
        normal(*x, dtype=torch.float32, device=device).requires_grad_() for x in ((24, 40), (24,))
    )
    mask = torch.ones(2, 13, dtype=torch.bool, device=device)
    fn = functools.partial(row_projection, rows=mask, num_rows=26, impl="triton")
    sort = mock.patch.object(torch, "sort", wraps=torch.sort)
    with launches(*KERNELS) as launched, sort as sorts:
        out = fn(hidden, weight=weight, bias=bias)
        assert launched == [GATHER, CLEAR]
        torch.autograd.grad(out, (weight, bias), out)
        assert launched == [GATHER, CLEAR, CLEAR] and sorts.call_count == 0
        out = fn(hidden.requires_grad_(), weight=weight, bias=bias)
        torch.autograd.grad(out, hidden, out)
        assert launched[3:] == [GATHER, CLEAR, CLEAR, SCATTER] and sorts.call_count == 1


# ---- machine code, without a GPU ----


def compiled(capability, C, dtype, layout="dense"):
    """What the launchers would launch on a CUDA device, in their order."""
    hidden = hidden_states(2, 64, C, dtype=dtype, layout=layout)
    index = torch.arange(40)
    with compiling_for(capability, KERNELS) as kernels:
        x = _triton.clear_rows_(_triton.gather_rows(hidden, index), index, 128)
        _triton.scatter_rows(x, index, 2, 64)
    return [machine_code(kernel) for kernel in kernels]


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_registers_and_vector_accesses(dtype, capability):
    """Registers leave room for 24 warps on an SM of 65536; rows are touched 16 bytes at a time."""
    assert_machine_code(compiled(capability, 4096, dtype), KERNELS, 80, reads_nothing=CLEAR)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("C", "layout"), ((1, "dense"), (40, "sliced"), (3584, "tokens_first"), (8192, "dense"))
)
def test_no_spills_at_other_sizes(C, layout):
    for code in compiled(90, C, torch.bfloat16, layout):
        assert code.spilled_bytes == 0, (code.name, code.registers)


# ---- on a GPU alone ----


def step_on_cuda():
    """Forward and backward of both forms, and the mask they read."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    hidden, weight = normal(4, 300, 1024, **options), normal(1024, 1024, **options) / 32
    vectors = [normal(1024, seed=i, **options) for i in range(3)]
    mask = normal(4, 300, dtype=torch.float32, device="cuda") > 1
    dout, index = normal(256, 1024, **options), torch.arange(256, device="cuda") % 100

    def masked(hidden, weight, bias, norm_weight, norm_bias):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return row_projection(hidden, mask, weight, bias, **norm, num_rows=256)

    def indexed(hidden, weight, bias):
        return row_projection(hidden, index, weight, bias)

    def step():
        inputs = (hidden, weight, *vectors)
        results = [*gradients(masked, inputs, (dout,)), *gradients(indexed, inputs[:3], (dout,))]
        return sum(results, ())

    return step, mask


@on_gpu_alone
def test_cuda_graph_replay_without_synchronisation():
    assert_replays(*step_on_cuda())


@on_gpu_alone
def test_a_mask_with_more_rows_is_cut_on_cuda():
    hidden, weight = (normal(*x, dtype=torch.float32, device="cuda") for x in ((2, 13, 40), (24, 40)))
    mask = torch.ones(2, 13, dtype=torch.bool, device="cuda")
    expected = row_projection(hidden, torch.arange(5, device="cuda"), weight)
    assert torch.equal(row_projection(hidden, mask, weight, num_rows=5), expected)
