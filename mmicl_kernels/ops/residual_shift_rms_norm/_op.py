"""``residual_shift_rms_norm`` as registered operators, forward and backward, under one autograd function."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    distinct,
    kernels_of,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import accumulation_dtype, last_dim_contiguous, new_tokens
from mmicl_kernels.ops.residual_shift.entries import per_token, prepared, stacked
from mmicl_kernels.ops.residual_shift.gradients import (
    fake_entry_grads,
    outputs,
    parameter_grads,
    strength_grads,
)
from mmicl_kernels.ops.residual_shift_rms_norm import _torch

torch.library.define(
    "mmicl::residual_shift_rms_norm_fwd",
    "(Tensor x, Tensor residual, Tensor vector, Tensor? scale, Tensor norm_weight, Tensor? adapter_ids,"
    " Tensor? strengths, float eps, float weight_offset, str impl)"
    " -> (Tensor normed, Tensor new_residual, Tensor rstd)",
)
torch.library.define(
    "mmicl::residual_shift_rms_norm_bwd",
    "(Tensor dnormed, Tensor? dnew_residual, Tensor new_residual, Tensor rstd, Tensor vector, Tensor? scale,"
    " Tensor norm_weight, Tensor? adapter_ids, Tensor? strengths, float weight_offset, str impl,"
    " bool need_dentry, bool need_dweight, bool need_dstrengths)"
    " -> (Tensor dx, Tensor dvector, Tensor dscale, Tensor dnorm_weight, Tensor dstrengths)",
)

_kernels = kernels_of(__package__, _torch)


def _fwd(x, residual, vector, scale, norm_weight, adapter_ids, strengths, eps, weight_offset, impl):
    vector, scale, norm_weight, strengths = prepared(x, impl, vector, scale, norm_weight, strengths)
    with no_autocast(x.device):
        return _kernels(impl, x.device).residual_shift_rms_norm_fwd(
            x, residual, *stacked(vector, scale), norm_weight, adapter_ids, strengths, eps, weight_offset
        )


torch.library.impl("mmicl::residual_shift_rms_norm_fwd", ("cpu", "cuda"), _fwd)


@torch.library.register_fake("mmicl::residual_shift_rms_norm_fwd")
def _fwd_fake(x, residual, vector, scale, norm_weight, adapter_ids, strengths, eps, weight_offset, impl):
    return new_tokens(x), new_tokens(x), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))


def _bwd(
    dnormed, dnew_residual, new_residual, rstd, vector, scale, norm_weight, adapter_ids, strengths,
    weight_offset, impl, need_dentry, need_dweight, need_dstrengths,
):  # fmt: skip
    given, device = (vector, scale, norm_weight, strengths), dnormed.device
    vector, scale, norm_weight, strengths = prepared(dnormed, impl, *given)
    need_sums = need_dentry or need_dstrengths
    with no_autocast(device):
        dx, sums, weight_sums = _kernels(impl, device).residual_shift_rms_norm_bwd(
            dnormed, dnew_residual, new_residual, rstd, norm_weight, weight_offset,
            need_sums and not per_token(adapter_ids), need_dweight,
        )  # fmt: skip
        sums = dx if per_token(adapter_ids) else sums  # a token's own, rounded: it is there already
        grads = parameter_grads(
            impl, sums if need_dentry else None, vector, scale, adapter_ids, strengths,
            weight_sums if need_dweight else None, norm_weight,
        )  # fmt: skip
        dstrengths = None
        if need_dstrengths:
            dstrengths = strength_grads(impl, sums, *stacked(vector, scale), adapter_ids)
        return dx, *outputs((*grads, dstrengths), given, rstd)


torch.library.impl("mmicl::residual_shift_rms_norm_bwd", ("cpu", "cuda"), _bwd)


@torch.library.register_fake("mmicl::residual_shift_rms_norm_bwd")
def _bwd_fake(
    dnormed, dnew_residual, new_residual, rstd, vector, scale, norm_weight, adapter_ids, strengths,
    weight_offset, impl, need_dentry, need_dweight, need_dstrengths,
):  # fmt: skip
    dweight = norm_weight.new_empty(norm_weight.shape) if need_dweight else rstd.new_empty(0)
    dstrengths = strengths.new_empty(strengths.shape) if need_dstrengths else rstd.new_empty(0)
    dentry = fake_entry_grads(vector, scale, need_dentry, rstd)
    return new_tokens(new_residual), *dentry, dweight, dstrengths


def _of_the_sum_alone(
    ctx, dnew_residual: Tensor | None, need_dentry: bool, need_dstrengths: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``dvector``, ``dscale``, no ``dweight``, ``dstrengths``: of a norm that is not used.

    It may be one without finite gradient.
    """
    if dnew_residual is None or not (need_dentry or need_dstrengths):
        return None, None, None, None
    _, _, vector, scale, _, adapter_ids, strengths = ctx.saved_tensors
    _, dvector, dscale, dstrengths = torch.ops.mmicl.residual_shift_bwd(
        last_dim_contiguous(dnew_residual), None, vector, scale, adapter_ids, strengths, ctx.impl,
        False, need_dentry, need_dstrengths,
    )  # fmt: skip
    return dvector, dscale, None, dstrengths


class _ResidualShiftRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # see residual_shift
        return torch.ops.mmicl.residual_shift_rms_norm_fwd(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, vector, scale, norm_weight, adapter_ids, strengths, _, ctx.weight_offset, ctx.impl = inputs
        _, new_residual, rstd = output
        ctx.save_for_backward(new_residual, rstd, vector, scale, norm_weight, adapter_ids, strengths)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @refuse_double_backward("residual_shift_rms_norm")
    def backward(ctx, dnormed, dnew_residual, _):
        needs = ctx.needs_input_grad
        need_dentry, need_dweight, need_dstrengths = needs[2] or needs[3], needs[4], needs[6]
        if dnormed is None:
            dx = dnew_residual
            dentry = _of_the_sum_alone(ctx, dnew_residual, need_dentry, need_dstrengths)
        else:
            if dnew_residual is not None:
                dnew_residual = last_dim_contiguous(dnew_residual)
            dx, *dentry = torch.ops.mmicl.residual_shift_rms_norm_bwd(
                last_dim_contiguous(dnormed), dnew_residual, *ctx.saved_tensors, ctx.weight_offset, ctx.impl,
                need_dentry, need_dweight, need_dstrengths,
            )  # fmt: skip
        dvector, dscale, dweight, dstrengths = dentry
        grads = (dx, dx, dvector, dscale, dweight, None, dstrengths)
        grads = (grad if need else None for grad, need in zip(grads, needs[:7], strict=True))
        return *grads, None, None, None

    vmap = staticmethod(refuse_vmap("residual_shift_rms_norm"))


torch.library.register_vmap("mmicl::residual_shift_rms_norm_fwd", refuse_vmap("residual_shift_rms_norm"))


def residual_shift_rms_norm_op(
    x, residual, vector, scale, norm_weight, adapter_ids, strengths, eps, weight_offset, impl
) -> tuple[Tensor, Tensor]:
    inputs = (x, residual, vector, scale, norm_weight, adapter_ids, strengths, eps, weight_offset, impl)
    if needs_grad(*(p for p in (*inputs[:5], strengths) if p is not None)):
        return _ResidualShiftRMSNormFunction.apply(*distinct(*inputs))[:2]
    return torch.ops.mmicl.residual_shift_rms_norm_fwd(*inputs)[:2]
