"""``attention_shift`` as registered operators, forward and backward, under one autograd function."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    distinct,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import last_dim_contiguous, new_heads
from mmicl_kernels.ops.attention_shift.kernels import (
    backend_kernels,
    logit_grad,
    parameter_grads,
    virtual_keys,
)

_KEYS = (
    "Tensor weight, Tensor bias, Tensor shift, Tensor? adapter_ids, bool prefix, Tensor? prefixes, str impl"
)
torch.library.define("mmicl::attention_shift_fwd", f"(Tensor out, Tensor lse, Tensor q, {_KEYS}) -> Tensor")
torch.library.define(
    "mmicl::attention_shift_bwd",
    f"(Tensor dout, Tensor? out, Tensor lse, Tensor q, {_KEYS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _attention_shift_fwd(out, lse, q, *keys):
    *keys, impl = keys
    with no_autocast(q.device):
        return backend_kernels(impl, q.device).attention_shift_fwd(out, lse, q, *virtual_keys(q, *keys))


torch.library.impl("mmicl::attention_shift_fwd", ("cpu", "cuda"), _attention_shift_fwd)


@torch.library.register_fake("mmicl::attention_shift_fwd")
def _attention_shift_fwd_fake(out, lse, q, *keys):
    return new_heads(out)


def _attention_shift_bwd(dout, out, lse, q, weight, bias, shift, *which):
    *which, impl = which
    keys = virtual_keys(q, weight, bias, shift, *which)
    with no_autocast(q.device):
        dg, total, dq, _, lift, *grads = backend_kernels(impl, q.device).attention_shift_bwd(
            dout, lse, q, *keys, out, True
        )
        dkept = dout.new_empty(0)
        if keys.prefix is not None:
            dkept = (dout * torch.exp(-lift)[..., None]).to(dout.dtype)
    return (dkept, -logit_grad(dg, total), dq, *parameter_grads(grads, weight, bias, shift))


torch.library.impl("mmicl::attention_shift_bwd", ("cpu", "cuda"), _attention_shift_bwd)


@torch.library.register_fake("mmicl::attention_shift_bwd")
def _attention_shift_bwd_fake(dout, out, lse, q, weight, bias, shift, adapter_ids, prefix, prefixes, impl):
    dkept = torch.empty_like(dout) if prefix or prefixes is not None else dout.new_empty(0)
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weight, bias, shift))
    return (dkept, lse.new_empty(lse.shape), new_heads(q), *grads)


class _AttentionShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return torch.ops.mmicl.attention_shift_fwd(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, *keys, ctx.prefix, prefixes, ctx.impl = inputs
        # Where all of the attention is kept, its gradient is that of the output, and itself is not needed.
        ctx.keeps_all = not ctx.prefix and prefixes is None
        ctx.save_for_backward(None if ctx.keeps_all else out, *keys, prefixes)

    @staticmethod
    @refuse_double_backward("attention_shift")
    def backward(ctx, dout):
        *tensors, prefixes = ctx.saved_tensors
        dkept, *grads = torch.ops.mmicl.attention_shift_bwd(
            last_dim_contiguous(dout), *tensors, ctx.prefix, prefixes, ctx.impl
        )
        return dout if ctx.keeps_all else dkept, *grads, None, None, None, None

    vmap = staticmethod(refuse_vmap("attention_shift"))


torch.library.register_vmap("mmicl::attention_shift_fwd", refuse_vmap("attention_shift"))


def attention_shift_op(out, lse, q, weight, bias, shift, *keys) -> Tensor:
    """``keys``: adapter ids, whether all are prefixes, which are, and the implementation."""
    inputs = (out, lse, q, weight, bias, shift)
    if needs_grad(*inputs):
        return _AttentionShiftFunction.apply(*distinct(*inputs), *keys)
    return torch.ops.mmicl.attention_shift_fwd(*inputs, *keys)
