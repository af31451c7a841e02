"""The squares' Triton kernels: values in the interpreter and on a GPU, machine code without one.

``test_values_in_the_interpreter`` starts a process on the value tests and on those here.
"""

import functools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from mmicl_kernels.ops._core.rows import uses_of  # noqa: E402
from mmicl_kernels.ops.alignment_loss import _torch, _triton, alignment_loss  # noqa: E402
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

FORWARD, BACKWARD = KERNELS = (_triton.squares_fwd_kernel, _triton.squares_bwd_kernel)
COUNTS = {"alignment_loss": 60, "alignment_loss_triton": 20}
OTHERS = "not bad_input and not independent_code"
# Of test_alignment_loss.py: fp16, and 4096 uses of a row.
SLOW = "value_and_gradients and torch.float16] or duplicates_are_summed"


@compiles
@pytest.mark.parametrize("name", COUNTS)
def test_values_in_the_interpreter(name):
    """Runs the value tests of one file on the CPU, but for the slow ones."""
    assert_passes_interpreted(f"{OTHERS} and not ({SLOW})", name, at_least=COUNTS[name])


@compiles
@pytest.mark.slow
def test_slow_values_in_the_interpreter():
    assert_passes_interpreted(f"{OTHERS} and ({SLOW})", "alignment_loss", at_least=20)


# ---- values: the interpreter's, or a GPU's ----


@on_device
@pytest.mark.parametrize("layout", ("dense", "tokens_first", "sliced", "expanded"))
@pytest.mark.parametrize("name", INDICES)
def test_squares_are_the_stock_ones(name, layout, device):
    """Several programs along rows, a ragged end of columns; indices that are no rows, as CUDA may have."""
    B, T, C = 3, 30, 2500
    states = hidden_states(B, T, C, dtype=torch.float32, device=device, layout=layout)
    index = torch.tensor(INDICES[name], dtype=torch.long, device=device)
    targets = normal(len(index), 2 * C, dtype=torch.float32, device=device)[:, :C]
    results = (kernels.alignment_squares_fwd(states, targets, index) for kernels in (_triton, _torch))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)
    dd = normal(len(index), dtype=torch.float32, device=device, seed=1)
    ds = normal(len(index), dtype=torch.float32, device=device, seed=2)
    dd[::3], ds[::6], ds[1::6] = 0, 0, 0  # one, the other, both
    arguments = (dd, ds, states, targets, *uses_of(index, B * T))
    ours, stock = (kernels.alignment_squares_bwd(*arguments) for kernels in (_triton, _torch))
    torch.testing.assert_close(ours, stock)
    assert torch.equal(ours != 0, stock != 0)


@on_device
def test_offsets_past_two_to_the_31(device):
    """Rows 2^29 elements apart: the product of row and stride passes int32, of each dimension."""
    index, dd = torch.tensor([5, 0, 4, 5], device=device), torch.ones(4, device=device)
    options = {"dtype": torch.float16, "device": device}
    uses, targets = uses_of(index, 6), normal(4, 16, **options, seed=1)

    def assert_same(near, far):
        """Of states and targets."""
        assert all(map(torch.equal, *(_triton.alignment_squares_fwd(*x, index) for x in (near, far))))
        assert torch.equal(*(_triton.alignment_squares_bwd(dd, dd, *x, *uses) for x in (near, far)))

    for shape in ((1, 6, 16), (6, 1, 16)):
        states = normal(*shape, **options)
        assert_same((states, targets), (far_rows(states), targets))
    assert_same((states, targets), (states, far_rows(targets)))


@on_device
def test_launches(device):
    """One a layer and pass, and one sort for all of them; without gradients no sort and no other launch."""
    states = [normal(2, 13, 40, dtype=torch.float32, device=device) for _ in range(3)]
    targets = [normal(26, 40, dtype=torch.float32, device=device, seed=1) for _ in range(3)]
    mask = torch.ones(2, 13, dtype=torch.bool, device=device)
    fn = functools.partial(alignment_loss, targets=targets, rows=mask, impl="triton")
    sort = mock.patch.object(torch, "sort", wraps=torch.sort)
    with launches(*KERNELS) as launched, sort as sorts:
        fn(states)
        assert launched == [FORWARD] * 3 and sorts.call_count == 0
        launched.clear()
        loss = fn([x.requires_grad_() for x in states])
        torch.autograd.grad(loss, states)
        assert launched == [FORWARD] * 3 + [BACKWARD] * 3 and sorts.call_count == 1


# ---- machine code, without a GPU ----


def compiled(capability, C, dtype, layout="dense", target_dtype=None):
    """What the launchers would launch on a CUDA device, in their order."""
    states = hidden_states(2, 64, C, dtype=dtype, layout=layout)
    index, targets = torch.arange(40), normal(40, C, dtype=target_dtype or dtype)
    uses = uses_of(index, 128)
    with compiling_for(capability, KERNELS) as kernels:
        d, s = _triton.alignment_squares_fwd(states, targets, index)
        _triton.alignment_squares_bwd(d, s, states, targets, *uses)
    return [machine_code(kernel) for kernel in kernels]


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_registers_and_vector_accesses(dtype, capability):
    """Registers leave room for 24 warps on an SM of 65536; rows are touched 16 bytes at a time."""
    assert_machine_code(compiled(capability, 4096, dtype), KERNELS, 80, writes_nothing=FORWARD)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("C", "layout", "target_dtype"),
    (
        (1, "dense", None),
        (40, "sliced", torch.float32),
        (3584, "tokens_first", torch.float16),
        (8192, "dense", torch.float64),
    ),
)
def test_no_spills_at_other_sizes(C, layout, target_dtype):
    for code in compiled(90, C, torch.bfloat16, layout, target_dtype):
        assert code.spilled_bytes == 0, (code.name, code.registers)


# ---- on a GPU alone ----


def step_on_cuda():
    """Forward and backward of every form, and the mask they read."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    states = [normal(4, 300, 1024, **options, seed=i) for i in range(3)]
    targets = [normal(256, 1024, **options, seed=3 + i) for i in range(3)]
    mask = normal(4, 300, dtype=torch.float32, device="cuda") > 1
    index = torch.arange(256, device="cuda") % 100
    dout = torch.ones((), device="cuda")

    def step():
        results = []
        for form in ("relative", "mean_square"):
            for rows in (mask, index):

                def fn(*states, form=form, rows=rows):
                    return alignment_loss(states, targets, rows, form=form)

                results += gradients(fn, states, (dout,))
        return sum(results, ())

    return step, mask


@on_gpu_alone
def test_cuda_graph_replay_without_synchronisation():
    assert_replays(*step_on_cuda())
