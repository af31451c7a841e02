"""The squares of a layer as registered operators, forward and backward, under one autograd function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    kernels_of,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import accumulation_dtype
from mmicl_kernels.ops._core.rows import uses_of
from mmicl_kernels.ops.alignment_loss import _torch

torch.library.define(
    "mmicl::alignment_squares_fwd",
    "(Tensor states, Tensor targets, Tensor index, str impl) -> (Tensor d, Tensor s)",
)
torch.library.define(
    "mmicl::alignment_squares_bwd",
    "(Tensor dd, Tensor ds, Tensor states, Tensor targets, Tensor order, Tensor starts, str impl) -> Tensor",
)

_kernels = kernels_of(__package__, _torch)


def _alignment_squares_fwd(states, targets, index, impl):
    with no_autocast(states.device):
        return _kernels(impl, states.device).alignment_squares_fwd(states, targets, index.contiguous())


torch.library.impl("mmicl::alignment_squares_fwd", ("cpu", "cuda"), _alignment_squares_fwd)


@torch.library.register_fake("mmicl::alignment_squares_fwd")
def _alignment_squares_fwd_fake(states, targets, index, impl):
    d, s = (states.new_empty(index.shape[0], dtype=accumulation_dtype(states)) for _ in range(2))
    return d, s


def _alignment_squares_bwd(dd, ds, states, targets, order, starts, impl):
    with no_autocast(states.device):
        return _kernels(impl, states.device).alignment_squares_bwd(
            dd.contiguous(), ds.contiguous(), states, targets, order, starts
        )


torch.library.impl("mmicl::alignment_squares_bwd", ("cpu", "cuda"), _alignment_squares_bwd)


@torch.library.register_fake("mmicl::alignment_squares_bwd")
def _alignment_squares_bwd_fake(dd, ds, states, targets, order, starts, impl):
    return states.new_empty(states.shape)


class _AlignmentSquaresFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):  # without names, which torch would bind anew at every call
        states, targets, index, *_, impl = inputs
        return torch.ops.mmicl.alignment_squares_fwd(states, targets, index, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        states, targets, _, order, starts, ctx.impl = inputs
        ctx.save_for_backward(states, targets, order, starts)

    @staticmethod
    @refuse_double_backward("alignment_loss")
    def backward(ctx, dd, ds):
        dstates = torch.ops.mmicl.alignment_squares_bwd(dd, ds, *ctx.saved_tensors, ctx.impl)
        return dstates, None, None, None, None, None

    vmap = staticmethod(refuse_vmap("alignment_loss"))


torch.library.register_vmap("mmicl::alignment_squares_fwd", refuse_vmap("alignment_loss"))


def alignment_squares_op(
    states: Sequence[Tensor], targets: Sequence[Tensor], index: Tensor, impl: str
) -> tuple[list[Tensor], list[Tensor]]:
    """``d [N]`` and ``s [N]`` of every layer, on its device."""
    trained, places, squares = needs_grad(*states), {}, []
    R = states[0].shape[0] * states[0].shape[1]
    for x, y in zip(states, targets, strict=True):
        if x.device not in places:
            own = index.to(x.device)
            # Sorted once for all layers: a sort takes longer than a layer's backward.
            places[x.device] = (own, *uses_of(own, R)) if trained else (own,)
        apply = _AlignmentSquaresFunction.apply if trained else torch.ops.mmicl.alignment_squares_fwd
        squares.append(apply(x, y, *places[x.device], impl))
    d, s = zip(*squares, strict=True)
    return list(d), list(s)
