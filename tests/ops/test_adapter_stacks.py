"""Stacks of adapters that a row has no part in: none at all, slots that nobody uses, rows that are NaN.

Every op that takes adapter ids, by every implementation, forward and every gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from mmicl_kernels.ops import attention_shift, residual_shift, residual_shift_rms_norm, shifted_attention
from mmicl_kernels.testing.inputs import (
    attention_shift_inputs,
    normal,
    residual_shift_inputs,
    shifted_attention_inputs,
)
from tests.ops.triton_process import INTERPRETED, slow_if_interpreted

B, FP32 = 3, torch.float32


@dataclass(frozen=True)
class Op:
    """``call(inputs, **options)``; the last ``parameters`` of ``inputs(A)`` are stacked."""

    call: Callable
    inputs: Callable
    parameters: int
    plain: Callable  # the outputs without any adapter


def attention_inputs(A):
    return shifted_attention_inputs(B=B, H=2, G=1, T=5, S=7, D=8, adapters=A)


def shift_inputs(A):
    return attention_shift_inputs(B=B, H=2, T=5, D=8, adapters=A)


def residual_inputs(A):
    return residual_shift_inputs(B=B, T=5, C=12, adapters=A)


def norm_inputs(A):
    x, vector, scale = residual_inputs(A)
    return x, normal(*x.shape, dtype=FP32, seed=3), normal(12, dtype=FP32, seed=4), vector, scale


def residual(x, vector, scale, **options):
    return residual_shift(x, vector, scale, **options)


def plain_norm(x, skip, norm_weight, impl):
    return normed(x, skip, norm_weight, x.new_zeros(12), 0.0, impl=impl)


def normed(x, skip, norm_weight, vector, scale, **options):
    return residual_shift_rms_norm(x, skip, vector, scale, norm_weight, eps=1e-5, **options)


def of_tokens(call):
    """The same with a row's id at each of its tokens."""

    def with_ids(*inputs, adapter_ids, **options):
        return call(*inputs, adapter_ids=adapter_ids[:, None, None].expand(B, 5, 1), **options)

    return with_ids


def with_norm(x, vector, scale, **options):
    return residual_shift(x, vector, scale, preserve_norm=True, **options)


def attention(*inputs, **options):
    return shifted_attention(*inputs, causal=True, return_lse=True, **options)


def plain_attention(q, k, v, impl):
    nothing = (q.new_zeros(2, 8), q.new_zeros(2), q.new_zeros(2, 8))
    return shifted_attention(q, k, v, *nothing, causal=True, return_lse=True, impl=impl)


OPS = {
    "shifted_attention": Op(attention, attention_inputs, 3, plain_attention),
    "all_keys": Op(
        lambda *x, **o: attention(*x, normalizer="all_keys", **o), attention_inputs, 3, plain_attention
    ),
    "attention_shift": Op(attention_shift, shift_inputs, 3, lambda out, lse, q, impl: out),
    "residual_shift": Op(residual, residual_inputs, 2, lambda x, impl: x),
    "residual_shift_tokens": Op(of_tokens(residual), residual_inputs, 2, lambda x, impl: x),
    "preserve_norm": Op(with_norm, residual_inputs, 2, lambda x, impl: x),
    "preserve_norm_tokens": Op(of_tokens(with_norm), residual_inputs, 2, lambda x, impl: x),
    "rms_norm": Op(normed, norm_inputs, 2, plain_norm),
    "rms_norm_tokens": Op(of_tokens(normed), norm_inputs, 2, plain_norm),
}
every_op = pytest.mark.parametrize("name", OPS)


def ids_of(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def evaluate(op, inputs, ids, impl, douts=None):
    """Outputs and gradients; ``douts`` are ones unless given."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op.call(*leaves, adapter_ids=ids, impl=impl)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.ones_like(y) for y in outputs] if douts is None else douts
    grads = torch.autograd.grad(outputs, leaves, douts, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in outputs], list(grads)


def bits(x):
    """As integers: a zero's sign and a NaN count too."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@every_op
@pytest.mark.parametrize("A", (0, 2))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_rows_without_adapter_are_plain(name, A, dtype, impl):
    """Bit for bit; A = 0 is a stack of no adapters, whose memory is a null pointer."""
    op = OPS[name]
    inputs = op.inputs(A)
    own = inputs[: -op.parameters]
    outputs, grads = evaluate(op, inputs, ids_of(*[-1] * B, dtype=dtype), impl)
    expected = op.plain(*own, impl=impl)
    for y, wanted in zip(outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert torch.equal(bits(y), bits(wanted))
    for x, grad in zip(inputs[-op.parameters :], grads[-op.parameters :], strict=True):
        assert grad.shape == x.shape and not grad.any()
    leaves = [x.detach().requires_grad_() for x in own]
    plain = op.plain(*leaves, impl=impl)
    plain = plain if isinstance(plain, tuple) else (plain,)
    douts = [torch.ones_like(y) for y in plain]
    wanted = torch.autograd.grad(plain, leaves, douts, allow_unused=True, materialize_grads=True)
    for grad, other in zip(grads, wanted, strict=False):
        torch.testing.assert_close(grad, other)


@every_op
@pytest.mark.parametrize("unused", (0, 1, 3))
def test_slots_that_no_row_uses_have_no_part(name, unused, impl):
    """NaN there changes nothing, and gets gradient 0."""
    op, ids = OPS[name], ids_of(2, -1, 2)
    clean = op.inputs(4)
    dirty = [x.clone() for x in clean]
    for x in dirty[-op.parameters :]:
        x[unused] = torch.nan
    (outputs, grads), (wanted, wanted_grads) = (evaluate(op, x, ids, impl) for x in (dirty, clean))
    for x, y in zip(outputs + grads, wanted + wanted_grads, strict=True):
        assert torch.equal(x, y)
    for grad in grads[-op.parameters :]:
        assert not grad[unused].any() and grad[2].any()


@slow_if_interpreted
@every_op
@pytest.mark.parametrize("value", (torch.nan,) if INTERPRETED else (torch.nan, torch.inf))
@pytest.mark.parametrize("where", ("row", "token", "dout", "without_adapter"))
def test_a_row_that_is_not_finite_reaches_its_own_adapter_alone(name, where, value, impl):
    """0 times NaN is not 0: no sum over rows may contain the row of another adapter."""
    op, ids = OPS[name], ids_of(1, -1 if where == "without_adapter" else 0, 1)
    inputs = [x.clone() for x in op.inputs(2)]
    outputs, _ = evaluate(op, inputs, ids, impl)
    douts = [normal(*y.shape, dtype=FP32, seed=7) for y in outputs]
    wanted, wanted_grads = evaluate(op, inputs, ids, impl, douts)
    if where == "dout":
        for dy in douts:
            dy[1] = value
    else:
        for x in inputs[:1] if where == "token" else inputs[: -op.parameters]:
            if x.dim() > 2:
                x[(1, ..., 0, 0) if where == "token" else 1] = value
    outputs, grads = evaluate(op, inputs, ids, impl, douts)
    for y, other in zip(outputs, wanted, strict=True):
        assert torch.equal(y[::2], other[::2])
    for grad, other in zip(grads[: -op.parameters], wanted_grads, strict=False):
        if grad.dim() > 2:  # a norm's weight is every row's
            assert torch.equal(grad[::2], other[::2])
    for grad, other in zip(grads[-op.parameters :], wanted_grads[-op.parameters :], strict=True):
        assert torch.equal(grad[1], other[1])
        if where == "without_adapter":
            assert not grad[0].any()


def test_entries_of_several_adapters(impl):
    """``[B, K]`` ids: no slot, unused slots of NaN, a row of NaN."""
    x, vector, scale = residual_inputs(0)
    none = ids_of(*[-1] * 2 * B).view(B, 2)
    assert torch.equal(residual_shift(x, vector, scale, adapter_ids=none, impl=impl), x)

    x, vector, scale = (y.detach().clone() for y in residual_inputs(4))
    ids, strengths = torch.tensor([[1, 2], [-1, 3], [2, -1]]), normal(B, 2, dtype=FP32, seed=5)

    def run(x, vector, scale, strengths):
        leaves = [y.detach().requires_grad_() for y in (x, vector, scale, strengths)]
        out = residual_shift(*leaves[:3], adapter_ids=ids, strengths=leaves[3], preserve_norm=True, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    wanted = run(x, vector, scale, strengths)
    vector[0], scale[0] = torch.nan, torch.nan
    for y, other in zip(run(x, vector, scale, strengths), wanted, strict=True):
        assert torch.equal(y, other)
    x[1] = torch.nan  # whose adapter is 3
    for y, other in zip(run(x, vector, scale, strengths)[1:], wanted[1:], strict=True):
        rows = [0, 2] if len(y) == B else [0, 1, 2]
        assert torch.equal(y[rows], other[rows])
