"""``row_projection`` as registered operators, forward and backward, under one autograd function."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    distinct,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import accumulation_dtype
from mmicl_kernels.ops.row_projection import _composed

_PARAMETERS = "Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"
torch.library.define(
    "mmicl::row_projection_fwd",
    f"(Tensor hidden, Tensor index, {_PARAMETERS}, float eps, ScalarType dtype, str impl)"
    " -> (Tensor out, Tensor x, Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "mmicl::row_projection_bwd",
    f"(Tensor dout, Tensor index, Tensor? x, Tensor y, Tensor mean, Tensor rstd, {_PARAMETERS}, SymInt B,"
    " SymInt T, bool[] needs, str impl)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
)


def _row_projection_fwd(hidden, *arguments):
    with no_autocast(hidden.device):
        return _composed.row_projection_fwd(hidden, *arguments)


torch.library.impl("mmicl::row_projection_fwd", ("cpu", "cuda"), _row_projection_fwd)


@torch.library.register_fake("mmicl::row_projection_fwd")
def _row_projection_fwd_fake(hidden, index, weight, bias, norm_weight, norm_bias, eps, dtype, impl):
    N, (D, C), normed = index.shape[0], weight.shape, norm_weight is not None
    y = hidden.new_empty((N, D) if normed else 0)
    statistics = [
        hidden.new_empty((N, 1) if normed else 0, dtype=accumulation_dtype(hidden)) for _ in range(2)
    ]
    return hidden.new_empty(N, D, dtype=dtype), hidden.new_empty(N, C), y, *statistics


def _row_projection_bwd(
    dout, index, x, y, mean, rstd, weight, bias, norm_weight, norm_bias, B, T, needs, impl
):
    with no_autocast(dout.device):
        dhidden, *grads = _composed.row_projection_bwd(
            dout, index, x, y, mean, rstd, weight, norm_weight, norm_bias, B, T, needs, impl
        )
    grads = [
        dout.new_empty(0) if grad is None else grad.to(parameter.dtype)
        for grad, parameter in zip(grads, (weight, bias, norm_weight, norm_bias), strict=True)
    ]
    return dout.new_empty(0) if dhidden is None else dhidden, *grads


torch.library.impl("mmicl::row_projection_bwd", ("cpu", "cuda"), _row_projection_bwd)


@torch.library.register_fake("mmicl::row_projection_bwd")
def _row_projection_bwd_fake(
    dout, index, x, y, mean, rstd, weight, bias, norm_weight, norm_bias, B, T, needs, impl
):
    dhidden = y.new_empty(B, T, weight.shape[1]) if needs[0] else dout.new_empty(0)
    parameters = zip(needs[1:], (weight, bias, norm_weight, norm_bias), strict=True)
    return dhidden, *(p.new_empty(p.shape) if needed else dout.new_empty(0) for needed, p in parameters)


class _RowProjectionFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return torch.ops.mmicl.row_projection_fwd(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, index, *parameters, _, _, ctx.impl = inputs
        _, x, *saved = output
        ctx.sizes = hidden.shape[:2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(index, x if ctx.needs_input_grad[2] else None, *saved, *parameters)

    @staticmethod
    @refuse_double_backward("row_projection")
    def backward(ctx, dout, *_):
        need_dhidden, _, *needs = ctx.needs_input_grad[:6]
        needs = [need_dhidden, *needs]
        grads = torch.ops.mmicl.row_projection_bwd(dout, *ctx.saved_tensors, *ctx.sizes, needs, ctx.impl)
        dhidden, *rest = (g if needed else None for g, needed in zip(grads, needs, strict=True))
        return dhidden, None, *rest, None, None, None

    vmap = staticmethod(refuse_vmap("row_projection"))


torch.library.register_vmap("mmicl::row_projection_fwd", refuse_vmap("row_projection"))


def row_projection_op(hidden, index, weight, bias, norm_weight, norm_bias, eps, dtype, impl) -> Tensor:
    inputs = (hidden, index, weight, bias, norm_weight, norm_bias, eps, dtype, impl)
    if needs_grad(*(x for x in (hidden, weight, bias, norm_weight, norm_bias) if x is not None)):
        return _RowProjectionFunction.apply(*distinct(*inputs))[0]
    return torch.ops.mmicl.row_projection_fwd(*inputs)[0]
