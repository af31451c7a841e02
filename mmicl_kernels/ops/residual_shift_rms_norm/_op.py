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
from mmicl_kernels.ops.residual_shift.entries import (
    fake_entry_grads,
    outputs,
    parameter_grads,
    prepared,
    stacked,
)
from mmicl_kernels.ops.residual_shift_rms_norm import _torch

torch.library.define(
    "mmicl::residual_shift_rms_norm_fwd",
    "(Tensor x, Tensor residual, Tensor vector, Tensor? scale, Tensor norm_weight, Tensor? adapter_ids,"
    " float eps, float weight_offset, str impl) -> (Tensor normed, Tensor new_residual, Tensor rstd)",
)
torch.library.define(
    "mmicl::residual_shift_rms_norm_bwd",
    "(Tensor dnormed, Tensor? dnew_residual, Tensor new_residual, Tensor rstd, Tensor vector, Tensor? scale,"
    " Tensor norm_weight, Tensor? adapter_ids, float weight_offset, str impl, bool need_dentry,"
    " bool need_dweight) -> (Tensor dx, Tensor dvector, Tensor dscale, Tensor dnorm_weight)",
)

_kernels = kernels_of(__package__, _torch)


def _fwd(x, residual, vector, scale, norm_weight, adapter_ids, eps, weight_offset, impl):
    vector, scale, norm_weight = prepared(x, impl, vector, scale, norm_weight)
    with no_autocast(x.device):
        return _kernels(impl, x.device).residual_shift_rms_norm_fwd(
            x, residual, *stacked(vector, scale), norm_weight, adapter_ids, eps, weight_offset
        )


torch.library.impl("mmicl::residual_shift_rms_norm_fwd", ("cpu", "cuda"), _fwd)


@torch.library.register_fake("mmicl::residual_shift_rms_norm_fwd")
def _fwd_fake(x, residual, vector, scale, norm_weight, adapter_ids, eps, weight_offset, impl):
    return new_tokens(x), new_tokens(x), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x))


def _bwd(
    dnormed, dnew_residual, new_residual, rstd, vector, scale, norm_weight, adapter_ids, weight_offset, impl,
    need_dentry, need_dweight,
):  # fmt: skip
    given, device = (vector, scale, norm_weight), dnormed.device
    vector, scale, norm_weight = prepared(dnormed, impl, *given)
    with no_autocast(device):
        dx, sums, weight_sums = _kernels(impl, device).residual_shift_rms_norm_bwd(
            dnormed, dnew_residual, new_residual, rstd, norm_weight, weight_offset, need_dentry, need_dweight
        )
        grads = parameter_grads(
            impl, sums if need_dentry else None, vector, scale, adapter_ids, None,
            weight_sums if need_dweight else None, norm_weight,
        )  # fmt: skip
        return dx, *outputs(grads, given, rstd)


torch.library.impl("mmicl::residual_shift_rms_norm_bwd", ("cpu", "cuda"), _bwd)


@torch.library.register_fake("mmicl::residual_shift_rms_norm_bwd")
def _bwd_fake(
    dnormed, dnew_residual, new_residual, rstd, vector, scale, norm_weight, adapter_ids, weight_offset, impl,
    need_dentry, need_dweight,
):  # fmt: skip
    dweight = norm_weight.new_empty(norm_weight.shape) if need_dweight else rstd.new_empty(0)
    return new_tokens(new_residual), *fake_entry_grads(vector, scale, need_dentry, rstd), dweight


def _of_the_sum_alone(
    ctx, dnew_residual: Tensor | None, need_dentry: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx``, ``dvector``, ``dscale`` where the norm is not used: it may be one without finite gradient."""
    if dnew_residual is None or not need_dentry:
        return dnew_residual, None, None
    _, _, vector, scale, _, adapter_ids = ctx.saved_tensors
    dout, needs = last_dim_contiguous(dnew_residual), (False, True, False)
    _, dvector, dscale, _ = torch.ops.mmicl.residual_shift_bwd(
        dout, None, vector, scale, adapter_ids, None, ctx.impl, *needs
    )
    return dnew_residual, dvector, dscale


class _ResidualShiftRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # see residual_shift
        return torch.ops.mmicl.residual_shift_rms_norm_fwd(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, vector, scale, norm_weight, adapter_ids, _, ctx.weight_offset, ctx.impl = inputs
        _, new_residual, rstd = output
        ctx.save_for_backward(new_residual, rstd, vector, scale, norm_weight, adapter_ids)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @refuse_double_backward("residual_shift_rms_norm")
    def backward(ctx, dnormed, dnew_residual, _):
        need_dx, need_dresidual, need_dvector, need_dscale, need_dweight, *_ = ctx.needs_input_grad
        need_dentry = need_dvector or need_dscale
        if dnormed is None:
            dx, dvector, dscale = _of_the_sum_alone(ctx, dnew_residual, need_dentry)
            dweight, need_dweight = None, False
        else:
            if dnew_residual is not None:
                dnew_residual = last_dim_contiguous(dnew_residual)
            dx, dvector, dscale, dweight = torch.ops.mmicl.residual_shift_rms_norm_bwd(
                last_dim_contiguous(dnormed), dnew_residual, *ctx.saved_tensors, ctx.weight_offset, ctx.impl,
                need_dentry, need_dweight,
            )  # fmt: skip
        return (
            dx if need_dx else None,
            dx if need_dresidual else None,
            dvector if need_dvector else None,
            dscale if need_dscale else None,
            dweight if need_dweight else None,
            *(None,) * 4,
        )

    vmap = staticmethod(refuse_vmap("residual_shift_rms_norm"))


torch.library.register_vmap("mmicl::residual_shift_rms_norm_fwd", refuse_vmap("residual_shift_rms_norm"))


def residual_shift_rms_norm_op(
    x, residual, vector, scale, norm_weight, adapter_ids, eps, weight_offset, impl
) -> tuple[Tensor, Tensor]:
    inputs = (x, residual, vector, scale, norm_weight, adapter_ids, eps, weight_offset, impl)
    if needs_grad(*(p for p in inputs[:5] if p is not None)):
        return _ResidualShiftRMSNormFunction.apply(*distinct(*inputs))[:2]
    return torch.ops.mmicl.residual_shift_rms_norm_fwd(*inputs)[:2]
