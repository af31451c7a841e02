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
from mmicl_kernels.ops.attention_shift.kernels import backend_kernels, parameter_grads, stacked_parameters

torch.library.define(
    "mmicl::attention_shift_fwd",
    "(Tensor out, Tensor lse, Tensor q, Tensor weight, Tensor bias, Tensor shift,"
    " Tensor? adapter_ids, str impl) -> Tensor",
)
torch.library.define(
    "mmicl::attention_shift_bwd",
    "(Tensor dout, Tensor lse, Tensor q, Tensor weight, Tensor bias, Tensor shift,"
    " Tensor? adapter_ids, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _attention_shift_fwd(out, lse, q, weight, bias, shift, adapter_ids, impl):
    parameters = stacked_parameters(q, weight, bias, shift)
    with no_autocast(q.device):
        return backend_kernels(impl, q.device).attention_shift_fwd(out, lse, q, *parameters, adapter_ids)


torch.library.impl("mmicl::attention_shift_fwd", ("cpu", "cuda"), _attention_shift_fwd)


@torch.library.register_fake("mmicl::attention_shift_fwd")
def _attention_shift_fwd_fake(out, lse, q, weight, bias, shift, adapter_ids, impl):
    return new_heads(out)


def _attention_shift_bwd(dout, lse, q, weight, bias, shift, adapter_ids, impl):
    parameters = stacked_parameters(q, weight, bias, shift)
    with no_autocast(q.device):
        dg, dq, _, *grads = backend_kernels(impl, q.device).attention_shift_bwd(
            dout, lse, q, *parameters, adapter_ids, None, True
        )
    return (-dg, dq, *parameter_grads(grads, weight, bias, shift))


torch.library.impl("mmicl::attention_shift_bwd", ("cpu", "cuda"), _attention_shift_bwd)


@torch.library.register_fake("mmicl::attention_shift_bwd")
def _attention_shift_bwd_fake(dout, lse, q, weight, bias, shift, adapter_ids, impl):
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weight, bias, shift))
    return (lse.new_empty(lse.shape), new_heads(q), *grads)


class _AttentionShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(out, lse, q, weight, bias, shift, adapter_ids, impl):
        return torch.ops.mmicl.attention_shift_fwd(out, lse, q, weight, bias, shift, adapter_ids, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, lse, q, weight, bias, shift, adapter_ids, ctx.impl = inputs
        ctx.save_for_backward(lse, q, weight, bias, shift, adapter_ids)

    @staticmethod
    @refuse_double_backward("attention_shift")
    def backward(ctx, dout):
        dlse, dq, dweight, dbias, dshift = torch.ops.mmicl.attention_shift_bwd(
            last_dim_contiguous(dout), *ctx.saved_tensors, ctx.impl
        )
        return dout, dlse, dq, dweight, dbias, dshift, None, None

    vmap = staticmethod(refuse_vmap("attention_shift"))


torch.library.register_vmap("mmicl::attention_shift_fwd", refuse_vmap("attention_shift"))


def attention_shift_op(out, lse, q, weight, bias, shift, adapter_ids, impl) -> Tensor:
    inputs = (out, lse, q, weight, bias, shift)
    if needs_grad(*inputs):
        return _AttentionShiftFunction.apply(*distinct(*inputs), adapter_ids, impl)
    return torch.ops.mmicl.attention_shift_fwd(*inputs, adapter_ids, impl)
