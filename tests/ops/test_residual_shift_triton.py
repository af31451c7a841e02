"""The residual ops' Triton kernels: values in the interpreter and on a GPU, machine code without one.

``test_values_in_the_interpreter`` starts a process on the value tests of both ops and on those here.
"""

import functools
import re

import pytest
import torch

pytest.importorskip("triton")

from mmicl_kernels.ops import residual_shift, residual_shift_rms_norm  # noqa: E402
from mmicl_kernels.ops._core._triton import MAX_ROW  # noqa: E402
from mmicl_kernels.ops.residual_shift._triton import gradients as entry  # noqa: E402
from mmicl_kernels.ops.residual_shift._triton import shift  # noqa: E402
from mmicl_kernels.ops.residual_shift_rms_norm import _triton as norm  # noqa: E402
from mmicl_kernels.testing.budgets import gradients  # noqa: E402
from mmicl_kernels.testing.cross_compile import compiling_for, machine_code  # noqa: E402
from mmicl_kernels.testing.inputs import hidden_states, normal, residual_shift_inputs, token_ids  # noqa: E402
from tests.ops.triton_process import (  # noqa: E402
    CAPABILITIES,
    INTERPRETED,
    assert_passes_interpreted,
    assert_replays,
    compiles,
    far_rows,
    launches,
    on_device,
    on_gpu_alone,
)

KERNELS = (
    shift.residual_shift_fwd_kernel,
    shift.residual_shift_bwd_kernel,
    entry.entry_grads_kernel,
    norm.residual_shift_rms_norm_fwd_kernel,
    norm.residual_shift_rms_norm_bwd_kernel,
)
# Of entries of every token.
TOKEN_KERNELS = (entry.adapter_sums_kernel, entry.entry_products_kernel)


@compiles
@pytest.mark.parametrize(
    "name",
    (
        "residual_shift",
        "entries",
        pytest.param("residual_shift_rms_norm", marks=pytest.mark.slow),
        "residual_shift_triton",
    ),
)
def test_values_in_the_interpreter(name):
    """Runs every value test of one file on the CPU."""
    at_least = {"residual_shift_triton": 5, "entries": 30}.get(name, 100)
    assert_passes_interpreted("not bad_input", name, at_least=at_least)


# ---- values: the interpreter's, or a GPU's ----


@on_device
@pytest.mark.parametrize(
    ("preserve_norm", "tokens"),
    ((False, False), (True, True), *(() if INTERPRETED else ((False, True), (True, False)))),
)
def test_many_blocks_and_adapters(preserve_norm, tokens, device):
    """Several programs per row, per sequence and in every sum, whatever the tiling: against the reference."""
    x, vector, scale = (p.to(device) for p in residual_shift_inputs(3, 150, 600, adapters=5))
    ids = torch.tensor([[4, 0, -1], [1, 1, 0], [-1, -1, -1]], device=device)
    if tokens:  # most of them of slot 4, one in four of any
        ids = token_ids(3, 150, 3, adapters=5, device=device)
        ids[:, torch.arange(150, device=device) % 4 > 0] = 4
    strengths = normal(*ids.shape, dtype=torch.float32, device=device)
    inputs, dout = (x, vector, scale, strengths), hidden_states(3, 150, 600, dtype=x.dtype, device=device)

    def fn(impl):
        return lambda x, v, s, w: residual_shift(
            x, v, s, adapter_ids=ids, strengths=w, preserve_norm=preserve_norm, impl=impl
        )

    pairs = (sum(gradients(fn(impl), inputs, (dout,)), ()) for impl in ("triton", "reference"))
    for ours, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@on_device
def test_many_blocks_of_rows_with_vectors(device):
    """With a norm's weight, whose sum is over all rows beside those of each."""
    x, vector, scale = (p.to(device) for p in residual_shift_inputs(3, 150, 600, adapters=3))
    weight = normal(600, dtype=torch.float32, device=device, seed=2)
    dout = hidden_states(3, 150, 600, dtype=x.dtype, device=device)

    def results(impl):
        def fn(x, v, s, w):
            return residual_shift_rms_norm(x, x, v, s, w, eps=1e-5, impl=impl)

        return sum(gradients(fn, (x, vector, scale, weight), (dout, x)), ())

    for ours, reference in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@on_device
def test_offsets_past_two_to_the_31(device):
    """Five rows, 2^29 elements apart: the product of row and stride passes int32."""
    x, vector, scale = residual_shift_inputs(1, 5, 16, dtype=torch.float16, device=device)
    far, weight = far_rows(x), torch.ones(16, device=device)
    for preserve_norm in (False, True):
        results = [
            residual_shift(y, vector, scale, preserve_norm=preserve_norm, impl="triton") for y in (x, far)
        ]
        assert torch.equal(*results)
    results = [
        residual_shift_rms_norm(y, y, vector, scale, weight, eps=1e-5, impl="triton") for y in (x, far)
    ]
    assert all(map(torch.equal, *results))
    stack = (vector[None], scale[None], None, None)
    near = shift.residual_shift_bwd(x, x, *stack, True, True)
    assert all(map(torch.equal, shift.residual_shift_bwd(far, far, *stack, True, True), near))
    ids = torch.zeros(1, 5, 1, dtype=torch.int32, device=device)
    stack = (vector[None], scale[None], ids, None)
    near = shift.residual_shift_bwd(x, x, *stack, True, True)
    assert all(map(torch.equal, shift.residual_shift_bwd(far, far, *stack, True, True), near))
    for fn, arguments in ((entry.adapter_sums, (ids, None, 1)), (entry.entry_products, (vector[None], ids))):
        near, ours = (fn(y, *arguments) for y in (x, far))
        assert all(map(torch.equal, near, ours))


@on_device
def test_rows_too_long_for_a_norm_are_refused(device):
    x = torch.zeros(1, 1, MAX_ROW + 1, device=device)
    vector = torch.zeros(x.shape[2], device=device)
    assert torch.equal(residual_shift(x, vector, impl="triton"), x)
    with pytest.raises(NotImplementedError, match="C is 32769, expected at most 32768"):
        residual_shift(x, vector, preserve_norm=True, impl="triton")
    with pytest.raises(NotImplementedError, match="C is 32769"):
        residual_shift_rms_norm(x, x, vector, 1.0, vector, eps=0.0, impl="triton")


@on_device
@pytest.mark.parametrize("preserve_norm", (False, True))
def test_launches(preserve_norm, device):
    """One forward; one backward and one small reduction. Frozen entries leave the reduction out."""
    x, vector, scale = (p.to(device).requires_grad_() for p in residual_shift_inputs())
    with launches(*KERNELS[:3]) as launched:
        out = residual_shift(x, vector, scale, preserve_norm=preserve_norm, impl="triton")
        assert launched == [KERNELS[0]]
        torch.autograd.grad(out, (x, vector, scale), out)
        assert launched == list(KERNELS[:3])
        launched.clear()
        out = residual_shift(x, vector.detach(), scale.detach(), preserve_norm=preserve_norm, impl="triton")
        torch.autograd.grad(out, x, out)
        assert launched == [KERNELS[0], *([KERNELS[1]] if preserve_norm else [])]


@on_device
@pytest.mark.parametrize("preserve_norm", (False, True))
def test_launches_of_tokens(preserve_norm, device):
    """One forward; backward the norm's, a sum by adapter and one of its parts, and one for the strengths."""
    x, vector, scale = (p.to(device) for p in residual_shift_inputs(adapters=2))
    ids = token_ids(2, 13, 2, adapters=2, device=device)
    strengths = torch.ones(ids.shape, device=device)

    def launched_by(*trained):
        inputs = [
            y.detach().requires_grad_(any(y is z for z in trained)) for y in (x, vector, scale, strengths)
        ]
        with launches(*KERNELS[:3], *TOKEN_KERNELS) as launched:
            options = {"adapter_ids": ids, "strengths": inputs[3], "preserve_norm": preserve_norm}
            out = residual_shift(*inputs[:3], **options, impl="triton")
            torch.autograd.grad(out, [y for y in inputs if y.requires_grad], out)
        return launched

    first = [KERNELS[0], *([KERNELS[1]] if preserve_norm else [])]
    assert launched_by(x) == first
    assert launched_by(x, vector, scale) == [*first, TOKEN_KERNELS[0], KERNELS[2]]
    assert launched_by(x, strengths) == [*first, TOKEN_KERNELS[1]]


@on_device
def test_launches_of_the_fused_norm(device):
    x, vector, scale = (p.to(device).requires_grad_() for p in residual_shift_inputs())
    weight = torch.ones_like(vector).requires_grad_()
    leaves = (x, vector, scale, weight)
    with launches(*KERNELS[2:]) as launched:
        outputs = residual_shift_rms_norm(x, x, vector, scale, weight, eps=1e-5, impl="triton")
        assert launched == [KERNELS[3]]
        torch.autograd.grad(outputs, leaves, outputs)
        assert launched == [KERNELS[3], KERNELS[4], KERNELS[2]]


# ---- machine code, without a GPU ----


def compiled(capability, C, dtype, ids=None, strengths=None, *, own=False):
    """What the launchers would launch on a CUDA device, by the kernel's name and order."""
    adapters = 2 if own else None if ids is None else 4
    x, vector, scale = residual_shift_inputs(2, 256, C, dtype=dtype, adapters=adapters)
    vector = vector if adapters else vector[None]
    scale = scale if adapters else scale[None]
    weight = torch.ones(C, dtype=dtype)
    entries, tokens = (vector, scale, ids, strengths), ids is not None and ids.dim() == 3
    with compiling_for(capability, (*KERNELS, *TOKEN_KERNELS)) as kernels:
        for preserve_norm in (False, True):
            shift.residual_shift_fwd(x, *entries, preserve_norm)
            if preserve_norm or not tokens:
                _, sums = shift.residual_shift_bwd(x, x if preserve_norm else None, *entries, True, True)
        normed, h, rstd = norm.residual_shift_rms_norm_fwd(
            x, x, vector, scale, weight, ids, strengths, 1e-5, 0.0
        )
        norm.residual_shift_rms_norm_bwd(normed, h, h, rstd, weight, 0.0, not tokens, True)
        if tokens:
            for dd in (x, sums):
                by_adapter, used = entry.adapter_sums(dd, ids, strengths, 4)
                entry.entry_products(dd, vector, ids)
            entry.entry_grads(by_adapter, vector, scale, used, None)
        else:
            entry.entry_grads(sums, vector, scale, ids, strengths, sums, weight)
    return [machine_code(kernel) for kernel in kernels]


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_registers_and_vector_loads(dtype, capability):
    """Registers leave room for 16 warps on an SM of 65536; all memory is touched 16 bytes at a time."""
    codes = compiled(capability, 4096, dtype)
    names = [k.__name__ for k in KERNELS]
    assert [code.name for code in codes] == [*names[:2], *names[:2], *names[3:], names[2]]
    for code in codes:
        assert code.spilled_bytes == 0, code.name
        assert code.registers <= 128, (code.name, code.registers)
        assert "ld.global.v4.b32" in code.ptx, code.name
        if code.name != "entry_grads_kernel":  # which writes a few numbers
            assert "st.global.v4.b32" in code.ptx, code.name
            assert not re.search(r"(ld|st)\.global\.b16", code.ptx), code.name


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("C", (40, 3584, 8192))
def test_no_spills_at_other_sizes(C):
    ids, strengths = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3)
    for code in compiled(90, C, torch.bfloat16, ids, strengths):
        assert code.spilled_bytes == 0, (code.name, code.registers)


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("K", (1, 3))
def test_registers_and_vector_loads_of_tokens(K, capability):
    """As of rows; what is chosen by token is read 16 bytes at a time too."""
    ids, strengths = torch.zeros(2, 256, K, dtype=torch.int32), torch.ones(2, 256, K)
    codes = compiled(capability, 4096, torch.bfloat16, ids, strengths)
    names = [k.__name__ for k in (*KERNELS, *TOKEN_KERNELS)]
    expected = [names[0], *names[:2], *names[3:5], *names[5:], *names[5:], names[2]]
    assert [code.name for code in codes] == expected
    for code in codes:
        assert code.spilled_bytes == 0, code.name
        assert code.registers <= 128, (code.name, code.registers)
        assert "ld.global.v4.b32" in code.ptx, code.name
        assert not re.search(r"ld\.global\.b16", code.ptx), code.name


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("C", (40, 8192))
def test_no_spills_of_tokens_and_rows_with_vectors(C):
    ids, strengths = torch.zeros(2, 256, 2, dtype=torch.int32), torch.ones(2, 256, 2)
    for code in (*compiled(90, C, torch.float16, ids, strengths), *compiled(90, C, torch.float16, own=True)):
        assert code.spilled_bytes == 0, (code.name, code.registers)


# ---- on a GPU alone ----


def step_on_cuda():
    """Forward and backward of everything, and the ids it reads."""
    inputs = residual_shift_inputs(3, 300, 4096, adapters=4, dtype=torch.bfloat16, device="cuda")
    x, weight = inputs[0], torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    options = {"adapter_ids": torch.tensor([0, -1, 2], dtype=torch.int32, device="cuda"), "impl": "triton"}
    tokens = {**options, "adapter_ids": token_ids(3, 300, 2, adapters=4, device="cuda")}

    def fused(x, vector, scale, weight):
        return residual_shift_rms_norm(x, x, vector, scale, weight, eps=1e-5, **options)

    def step():
        results = [*gradients(fused, (*inputs, weight), (x, x))]
        for preserve_norm in (False, True):
            for entries in (options, tokens):
                fn = functools.partial(residual_shift, preserve_norm=preserve_norm, **entries)
                results += gradients(fn, inputs, (x,))
        return sum(results, ())

    return step, options["adapter_ids"], tokens["adapter_ids"]


@on_gpu_alone
def test_cuda_graph_replay_without_synchronisation():
    assert_replays(*step_on_cuda())
