"""Entries of every token, and vectors of every batch row, in both residual ops: as rows, as tokens by hand.

test_residual_shift_triton.py runs this file interpreted.
"""

import functools

import pytest
import torch

from mmicl_kernels.ops import residual_shift, residual_shift_rms_norm
from mmicl_kernels.testing.budgets import assert_within_budget, gradients, product_error
from mmicl_kernels.testing.inputs import normal, residual_shift_inputs, token_ids
from tests.ops.triton_process import INTERPRETED

B, T, C, A, FP32 = 3, 13, 40, 3, torch.float32


def added(x, vector, scale, **options):
    return residual_shift(x, vector, scale, **options)


def with_norm(x, vector, scale, **options):
    return residual_shift(x, vector, scale, preserve_norm=True, **options)


def normed(x, vector, scale, **options):
    weight = torch.linspace(0.5, 1.5, x.shape[2], dtype=FP32)
    return residual_shift_rms_norm(x, x.detach(), vector, scale, weight, eps=1e-5, **options)


OPS = {"added": added, "norm": with_norm, "rms": normed}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def run(op, x, vector, scale, strengths=None, dout=None, **options):
    """The outputs, ``dx``, and the gradients of vector, scale and, if given, strengths."""
    inputs = (x, vector, scale) if strengths is None else (x, vector, scale, strengths)

    def fn(x, vector, scale, strengths=None):
        return op(x, vector, scale, strengths=strengths, **options)

    dout = normal(*x.shape, dtype=x.dtype, seed=9) if dout is None else dout
    outputs, (dx, *grads) = gradients(fn, inputs, (dout,) * (2 if op is normed else 1))
    return outputs, dx, grads


def assert_near(actual, low, exact, vector, scale):
    """As near to fp64 as the same sums in another order; numbers that are products as their factors."""
    error = float((low[0].double() - exact[0]).norm() / exact[0].norm())
    product = product_error(error, exact[0] / scale[..., None], vector)
    assert_within_budget("dvector", actual[0], low[0], exact[0])
    for name, x, other, wide in zip(("dscale", "dstrengths"), actual[1:], low[1:], exact[1:], strict=False):
        assert_within_budget(name, x, (other, wide + product), wide)


def double(*tensors):
    return [x.double() for x in tensors]


@every_op
@pytest.mark.parametrize("K", (1, 3))
def test_tokens_that_are_alike_are_the_row(op, K, impl):
    """Value and dx bit for bit; strengths' gradients add up."""
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=A)
    ids, strengths = token_ids(B, 1, K, adapters=A)[:, 0], normal(B, K, dtype=FP32, seed=5)
    of_tokens = (x[:, None].expand(B, T, K) for x in (ids, strengths))
    token, token_strengths = (x.contiguous() for x in of_tokens)
    outputs, dx, grads = run(op, x, vector, scale, strengths, adapter_ids=ids, impl=impl)
    others, dx_too, token_grads = run(op, x, vector, scale, token_strengths, adapter_ids=token, impl=impl)
    assert all(map(torch.equal, outputs, others)) and torch.equal(dx, dx_too)
    token_grads[2] = token_grads[2].sum(1)
    dout = normal(*x.shape, dtype=FP32, seed=9).double()
    wide = double(x, vector, scale, strengths)
    _, _, exact = run(op, *wide, dout, adapter_ids=ids, impl="reference")
    assert_near(token_grads, grads, exact, vector, scale)


@every_op
@pytest.mark.parametrize("K", (1, 3))
def test_a_token_is_the_token_alone(op, K, impl):
    """Bit for bit, whatever the others have."""
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=A)
    ids, strengths = token_ids(B, T, K, adapters=A), normal(B, T, K, dtype=FP32, seed=5)
    outputs, dx, grads = run(op, x, vector, scale, strengths, adapter_ids=ids, impl=impl)
    dout = normal(B, T, C, dtype=FP32, seed=9)
    for b, t in ((0, 0), (1, 7), (2, 12)):
        one = (slice(b, b + 1), slice(t, t + 1))
        alone, dx_alone, grads_alone = run(
            op, x[one], vector, scale, strengths[one], dout[one], adapter_ids=ids[one], impl=impl
        )
        assert all(torch.equal(y[one], z) for y, z in zip(outputs, alone, strict=True))
        assert torch.equal(dx[one], dx_alone)
        torch.testing.assert_close(grads[2][one], grads_alone[2])


@every_op
def test_tokens_chosen_by_hand(op, impl):
    """Of each adapter its tokens, gathered into a batch row; those of none are plain."""
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=A)
    ids, dout = token_ids(B, T, 1, adapters=A), normal(B, T, C, dtype=FP32, seed=9)
    outputs, dx, (dvector, dscale) = run(op, x, vector, scale, adapter_ids=ids, impl=impl)
    for a in range(A):
        chosen = ids[..., 0] == a
        hand, dx_hand, low = run(op, x[chosen][None], vector[a], scale[a], dout=dout[chosen][None], impl=impl)
        assert all(torch.equal(y[chosen], z[0]) for y, z in zip(outputs, hand, strict=True))
        assert torch.equal(dx[chosen], dx_hand[0])
        wide = double(x[chosen][None], vector[a], scale[a])
        _, _, exact = run(op, *wide, dout=dout[chosen][None].double(), impl="reference")
        assert_near((dvector[a], dscale[a]), low, exact, vector[a], scale[a])
    none = ids[..., 0] < 0
    plain, dx_plain, _ = run(op, x[none][None], vector[0], scale[0] * 0, dout=dout[none][None], impl=impl)
    assert all(torch.equal(y[none], z[0]) for y, z in zip(outputs, plain, strict=True))
    assert torch.equal(dx[none], dx_plain[0])
    if op is not normed:
        assert torch.equal(outputs[0][none], x[none])
        assert impl == "reference" or torch.equal(dx[none], dout[none])


@every_op
@pytest.mark.parametrize("one_scale", (False, True), ids=("scales", "one_scale"))
def test_a_vector_of_each_row_is_that_of_its_number(op, one_scale, impl):
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=B)
    scale = scale[0] if one_scale else scale
    outputs, dx, grads = run(op, x, vector, scale, impl=impl)
    others, dx_too, low = run(op, x, vector, scale, adapter_ids=torch.arange(B), impl=impl)
    assert all(map(torch.equal, outputs, others)) and torch.equal(dx, dx_too)
    dout = normal(B, T, C, dtype=FP32, seed=9).double()
    _, _, exact = run(op, *double(x, vector, scale), dout=dout, impl="reference")
    assert_near(grads, low, exact, vector, scale)


@every_op
def test_a_row_without_finite_numbers_has_its_own_vector_alone(op, impl):
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=B)
    _, _, clean = run(op, x, vector, scale, impl=impl)
    x[1], vector[1] = torch.nan, torch.inf
    _, _, grads = run(op, x, vector, scale, impl=impl)
    for grad, wanted in zip(grads, clean, strict=True):
        assert torch.equal(grad[::2], wanted[::2])


@every_op
@pytest.mark.parametrize("bad", ("x", "dout"))
def test_a_token_that_is_not_finite_reaches_its_own_adapter_alone(op, bad, impl):
    """0 times NaN is not 0. Slot 3 is of no token and has gradient 0, whatever it holds; so has slot 0."""
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=4)
    ids = token_ids(B, T, 2, adapters=2) + 1
    ids[ids == 0] = -1
    ids[1, 3], ids[1, 4] = torch.tensor([2, -1]), -1
    strengths = normal(B, T, 2, dtype=FP32, seed=5)
    dout = normal(B, T, C, dtype=FP32, seed=9)
    clean = run(op, x, vector, scale, strengths, dout, adapter_ids=ids, impl=impl)
    vector[0::3], scale[0::3], strengths[1, 4] = torch.nan, torch.nan, torch.nan
    broken = x if bad == "x" else dout
    broken[1, 3], broken[1, 4] = torch.inf, torch.nan
    outputs, dx, grads = run(op, x, vector, scale, strengths, dout, adapter_ids=ids, impl=impl)
    others = torch.ones(B, T, dtype=torch.bool)
    others[1, 3] = others[1, 4] = False
    for y, wanted in zip((*outputs, dx, grads[2]), (*clean[0], clean[1], clean[2][2]), strict=True):
        assert torch.equal(y[others], wanted[others])
    for grad, wanted in zip(grads[:2], clean[2], strict=False):
        assert torch.equal(grad[1], wanted[1]) and not grad[0::3].any()
    assert grads[2][1, 3, 1] == 0 and not grads[2][1, 4].any()


@every_op
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_ids_and_strengths_of_any_strides(op, dtype, impl):
    x, vector, scale = residual_shift_inputs(B, T, C, adapters=A)
    ids, strengths = token_ids(B, T, 3, adapters=A), normal(B, T, 3, dtype=FP32, seed=5)
    expected = run(op, x, vector, scale, strengths, adapter_ids=ids, impl=impl)
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        strided = (y.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
                   for y in (ids.to(dtype), strengths))  # fmt: skip
        ids_too, strengths_too = strided
        assert ids_too.stride() != ids.stride()
        actual = run(op, x, vector, scale, strengths_too, adapter_ids=ids_too, impl=impl)
        for y, wanted in zip(sum(map(tuple, (*actual[::2], actual[1:2])), ()),
                             sum(map(tuple, (*expected[::2], expected[1:2])), ()), strict=True):  # fmt: skip
            assert torch.equal(y, wanted)
    one = ids[:, :1, :1].expand(B, T, 3)
    same = [run(op, x, vector, scale, strengths, adapter_ids=y, impl=impl) for y in (one, one.contiguous())]
    assert all(map(torch.equal, same[0][2], same[1][2]))


@pytest.mark.skipif(INTERPRETED, reason="allocations of the compiled kernels")
@pytest.mark.parametrize("K", (1, 3))
def test_bytes(K):
    """The forward allocates its results alone; of the added form no tensor like x is made in the backward."""
    from benchmarks.harness.timing import peak_allocated_bytes
    from mmicl_kernels import _extension

    if not _extension.load():
        pytest.skip("the C++ extension is not built")
    x, vector, scale = residual_shift_inputs(2, 256, 128, adapters=A, dtype=torch.bfloat16)
    entries = {"adapter_ids": token_ids(2, 256, K, adapters=A), "strengths": torch.ones(2, 256, K)}
    for op, results in ((added, x.nbytes), (with_norm, x.nbytes), (normed, 2 * x.nbytes + 4 * 2 * 256)):
        fn = functools.partial(op, impl="composed", **entries)
        weight = 4 * 128 if op is normed else 0
        assert peak_allocated_bytes(lambda fn=fn: fn(x, vector, scale)) == results + weight
    own = residual_shift_inputs(2, 256, 128, adapters=2, dtype=torch.bfloat16)
    assert peak_allocated_bytes(lambda: added(*own, impl="composed")) == x.nbytes

    def backward():
        return torch.ops.mmicl.residual_shift_bwd(
            x, None, vector, scale, *entries.values(), "composed", False, True, True
        )

    parts = 1 + 2 * 256 * K // (32 * A)
    sums = 4 * A * parts * 128
    assert sums <= peak_allocated_bytes(backward) < sums + x.nbytes // 4
