"""``residual_shift`` as registered operators, forward and backward, under one autograd function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_kernels.ops._impl import (
    distinct,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
    uses_triton,
)
from mmicl_kernels.ops.attention_shift._op import last_dim_contiguous
from mmicl_kernels.ops.residual_shift._composed import (
    entry_grads,
    kernels,
    new_output,
    prepared,
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


def _residual_shift_fwd(x, vector, scale, adapter_ids, strengths, preserve_norm, impl):
    vector, scale, strengths = prepared(x, impl, vector, scale, strengths)
    with no_autocast(x.device):
        return kernels(impl, x.device).residual_shift_fwd(
            x, *stacked(vector, scale), adapter_ids, strengths, preserve_norm
        )


torch.library.impl("mmicl::residual_shift_fwd", ("cpu", "cuda"), _residual_shift_fwd)


@torch.library.register_fake("mmicl::residual_shift_fwd")
def _residual_shift_fwd_fake(x, vector, scale, adapter_ids, strengths, preserve_norm, impl):
    return new_output(x)


def _residual_shift_bwd(
    dout, x, vector, scale, adapter_ids, strengths, impl, need_dx, need_dentry, need_dstrengths
):
    given = vector, scale, strengths
    vector, scale, strengths = prepared(dout, impl, *given)
    grads = [None, None, None]
    with no_autocast(dout.device):
        dx, sums = kernels(impl, dout.device).residual_shift_bwd(
            dout, x, *stacked(vector, scale), adapter_ids, strengths, need_dx, need_dentry or need_dstrengths
        )
        if need_dentry:
            grads[0], grads[1], _ = parameter_grads(impl, sums, vector, scale, adapter_ids, strengths)
        if need_dstrengths:
            grads[2] = strength_grads(sums, *stacked(vector, scale), adapter_ids)
        return dx, *outputs(grads, given, dx)


torch.library.impl("mmicl::residual_shift_bwd", ("cpu", "cuda"), _residual_shift_bwd)


@torch.library.register_fake("mmicl::residual_shift_bwd")
def _residual_shift_bwd_fake(
    dout, x, vector, scale, adapter_ids, strengths, impl, need_dx, need_dentry, need_dstrengths
):
    empty = dout.new_empty(0)
    dx = new_output(x) if need_dx and x is not None else empty
    dstrengths = strengths.new_empty(strengths.shape) if need_dstrengths else dout.new_empty(0)
    return dx, *fake_entry_grads(vector, scale, need_dentry, dout), dstrengths


def stacked(vector: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``vector [A, C]`` and ``scale [1]`` or ``[A]``, as the kernels take them."""
    vector = vector.unsqueeze(0) if vector.dim() == 1 else vector
    return vector, scale.unsqueeze(0) if scale is not None and scale.dim() == 0 else scale


def parameter_grads(
    impl: str, sums, vector, scale, adapter_ids, strengths, weight_sums=None, norm_weight=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dvector``, ``dscale`` in the parameters' shapes, ``dweight`` of a norm; None where no sums are."""
    if uses_triton(impl, vector.device):
        from mmicl_kernels.ops.residual_shift import _triton

        dvector, dscale, dweight = _triton.entry_grads(
            sums, *stacked(vector, scale), adapter_ids, strengths, weight_sums, norm_weight
        )
        if sums is None:
            return None, None, dweight
        dscale = None if scale is None else dscale.sum_to_size(scale.shape)
        return dvector.view(vector.shape), dscale, dweight
    dentry = (None, None) if sums is None else entry_grads(sums, vector, scale, adapter_ids, strengths)
    return *dentry, None if weight_sums is None else weight_sums.sum((0, 1))


def outputs(grads: Sequence[Tensor | None], given: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The gradients in the dtypes of what was given; empty, and no two one tensor, where there are none."""
    return [
        like.new_empty(0) if grad is None else grad.to(p.dtype) for grad, p in zip(grads, given, strict=True)
    ]


def fake_entry_grads(
    vector: Tensor, scale: Tensor | None, needed: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    if not needed:
        return like.new_empty(0), like.new_empty(0)
    dscale = like.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return vector.new_empty(vector.shape), dscale


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


torch.library.register_vmap("mmicl::residual_shift_fwd", refuse_vmap("residual_shift"))


def residual_shift_op(x, vector, scale, adapter_ids, strengths, preserve_norm, impl) -> Tensor:
    inputs = (x, vector, scale, adapter_ids, strengths, preserve_norm, impl)
    if needs_grad(*(p for p in (x, vector, scale, strengths) if p is not None)):
        return _ResidualShiftFunction.apply(*distinct(*inputs))
    return torch.ops.mmicl.residual_shift_fwd(*inputs)
