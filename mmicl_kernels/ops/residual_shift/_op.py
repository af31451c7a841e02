"""``residual_shift`` as registered operators, forward and backward, under one autograd function."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    calls_cpp,
    distinct,
    kernels_of,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import last_dim_contiguous, new_tokens
from mmicl_kernels.ops.residual_shift import _torch
from mmicl_kernels.ops.residual_shift.entries import per_token, prepared, stacked
from mmicl_kernels.ops.residual_shift.gradients import (
    fake_entry_grads,
    outputs,
    parameter_grads,
    strength_grads,
)

_ENTRIES = "Tensor vector, Tensor? scale, Tensor? adapter_ids, Tensor? strengths"
torch.library.define(
    "mmicl::residual_shift_fwd", f"(Tensor x, {_ENTRIES}, bool preserve_norm, str impl) -> Tensor"
)
torch.library.define(
    "mmicl::residual_shift_bwd",
    f"(Tensor dout, Tensor? x, {_ENTRIES}, str impl, bool need_dx, bool need_dentry, bool need_dstrengths)"
    " -> (Tensor dx, Tensor dvector, Tensor dscale, Tensor dstrengths)",
)
# Without gradients on CPU: C++'s own, with no Python before it, so that a compiled graph calls it itself.
torch.library.define(
    "mmicl::residual_shift_inference", f"(Tensor x, {_ENTRIES}, bool preserve_norm) -> Tensor"
)

_kernels = kernels_of(__package__, _torch)


def _residual_shift_fwd(x, vector, scale, adapter_ids, strengths, preserve_norm, impl):
    vector, scale, strengths = prepared(x, impl, vector, scale, strengths)
    with no_autocast(x.device):
        return _kernels(impl, x.device).residual_shift_fwd(
            x, *stacked(vector, scale), adapter_ids, strengths, preserve_norm
        )


torch.library.impl("mmicl::residual_shift_fwd", ("cpu", "cuda"), _residual_shift_fwd)


@torch.library.register_fake("mmicl::residual_shift_fwd")
def _residual_shift_fwd_fake(x, vector, scale, adapter_ids, strengths, preserve_norm, impl):
    return new_tokens(x)


@torch.library.register_fake("mmicl::residual_shift_inference")
def _residual_shift_inference_fake(x, vector, scale, adapter_ids, strengths, preserve_norm):
    return new_tokens(x)


def _residual_shift_bwd(
    dout, x, vector, scale, adapter_ids, strengths, impl, need_dx, need_dentry, need_dstrengths
):
    given = vector, scale, strengths
    vector, scale, strengths = prepared(dout, impl, *given)
    grads = [None, None, None]
    with no_autocast(dout.device):
        if x is None and per_token(adapter_ids):
            dx, sums = dout.new_empty(0), dout
        else:
            dx, sums = _kernels(impl, dout.device).residual_shift_bwd(
                dout, x, *stacked(vector, scale), adapter_ids, strengths, need_dx,
                need_dentry or need_dstrengths,
            )  # fmt: skip
        if need_dentry:
            grads[0], grads[1], _ = parameter_grads(impl, sums, vector, scale, adapter_ids, strengths)
        if need_dstrengths:
            grads[2] = strength_grads(impl, sums, *stacked(vector, scale), adapter_ids)
        return dx, *outputs(grads, given, dx)


torch.library.impl("mmicl::residual_shift_bwd", ("cpu", "cuda"), _residual_shift_bwd)


@torch.library.register_fake("mmicl::residual_shift_bwd")
def _residual_shift_bwd_fake(
    dout, x, vector, scale, adapter_ids, strengths, impl, need_dx, need_dentry, need_dstrengths
):
    empty = dout.new_empty(0)
    dx = new_tokens(x) if need_dx and x is not None else empty
    dstrengths = strengths.new_empty(strengths.shape) if need_dstrengths else dout.new_empty(0)
    return dx, *fake_entry_grads(vector, scale, need_dentry, dout), dstrengths


class _ResidualShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # without names, which torch would bind anew at every call
        return torch.ops.mmicl.residual_shift_fwd(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, vector, scale, adapter_ids, strengths, preserve_norm, ctx.impl = inputs
        # Without the norm the gradient of x is that of the output, and x itself is not needed.
        ctx.save_for_backward(x if preserve_norm else None, vector, scale, adapter_ids, strengths)

    @staticmethod
    @refuse_double_backward("residual_shift")
    def backward(ctx, dout):
        x, *entries = ctx.saved_tensors
        need_dx, need_dvector, need_dscale, _, need_dstrengths, *_ = ctx.needs_input_grad
        need_dentry = need_dvector or need_dscale
        dx, need_dx = (dout, False) if x is None else (None, need_dx)
        if not (need_dx or need_dentry or need_dstrengths):
            return dx, None, None, None, None, None, None
        grads = torch.ops.mmicl.residual_shift_bwd(
            last_dim_contiguous(dout), x, *entries, ctx.impl, need_dx, need_dentry, need_dstrengths
        )
        return (
            grads[0] if need_dx else dx,
            grads[1] if need_dvector else None,
            grads[2] if need_dscale else None,
            None,
            grads[3] if need_dstrengths else None,
            None,
            None,
        )

    vmap = staticmethod(refuse_vmap("residual_shift"))


for _name in ("residual_shift_fwd", "residual_shift_inference"):
    torch.library.register_vmap(f"mmicl::{_name}", refuse_vmap("residual_shift"))


def residual_shift_op(x, vector, scale, adapter_ids, strengths, preserve_norm, impl) -> Tensor:
    inputs = (x, vector, scale, adapter_ids, strengths, preserve_norm, impl)
    if needs_grad(*(p for p in (x, vector, scale, strengths) if p is not None)):
        return _ResidualShiftFunction.apply(*distinct(*inputs))
    if impl == "composed" and calls_cpp(x):
        vector, scale, strengths = prepared(x, impl, vector, scale, strengths)
        entries = (*stacked(vector, scale), adapter_ids, strengths)
        return torch.ops.mmicl.residual_shift_inference.default(x, *entries, preserve_norm)
    return torch.ops.mmicl.residual_shift_fwd(*inputs)
