"""A vector added to the residual stream: the specification.

    d_b = sum_k strength_bk * scale_a * vector_a,  a = adapter_ids_bk
    y = x + d        out = y, or with preserve_norm  y * |x| / |y|

Sources: M2IV (arXiv 2504.04633), and with ``preserve_norm`` LIVE (arXiv 2406.13185).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def residual_shift_reference(
    x: Tensor,
    vector: Tensor,
    scale: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    strengths: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.residual_shift`; fp64 in, fp64 out.

    Args:
        scale: ``[]``, ``[A]`` or None for 1. adapter_ids, strengths: ``[B, K]`` or None.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        d, off = total_entry(vector.to(acc), scale, adapter_ids, strengths)
        wide = x.to(acc)
        y = wide + d
        if preserve_norm:
            y = _with_norm_of(wide, y, off)
        return _Valued.apply(y.to(x.dtype), x, off)


def total_entry(
    vector: Tensor, scale: Tensor | None, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum of a row's entries ``[B, 1, C]``, and where all are off, ``[B, 1, 1]``; B is 1 without ids.

    An entry whose coefficient is 0 has no part in the value, but its coefficient has its gradient.
    """
    if adapter_ids is None:
        stacked = vector[None, None]
        coefficient = vector.new_ones(1, 1) if scale is None else scale.to(vector.dtype).reshape(1, 1)
    else:
        ids = adapter_ids.long()  # -1 is the last row, which is one of zeros
        stacked = pad(vector, (0, 0, 0, 1))[ids]  # [B, K, C]
        coefficient = torch.ones_like(ids, dtype=vector.dtype)
        if scale is not None:
            coefficient = pad(scale.to(vector.dtype).expand(vector.shape[0]), (0, 1))[ids]
        if strengths is not None:
            coefficient = coefficient * strengths.to(vector.dtype)
        coefficient = coefficient.masked_fill(ids < 0, 0.0)
    zero = (coefficient == 0)[..., None]
    terms = coefficient[..., None] * stacked
    d = _Valued.apply(terms, torch.zeros_like(terms), zero).sum(1, keepdim=True)
    return d, zero.all(1, keepdim=True)


def _with_norm_of(x: Tensor, y: Tensor, off: Tensor) -> Tensor:
    """``y`` with the norm of ``x``; 0 where either has none, which ``off`` leaves as ``x``."""
    x_square, y_square = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    zero = (x_square == 0) | (y_square == 0)
    # A norm of zero is replaced before the root so that its gradient is 0, not NaN.
    ratio = x_square.masked_fill(zero, 1.0).sqrt() / y_square.masked_fill(zero, 1.0).sqrt()
    return torch.where(zero, x.masked_fill(~off, 0.0), y * ratio)


class _Valued(torch.autograd.Function):
    """``formula`` with other values in some places, and its gradient everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(formula, value, where):
        return torch.where(where, value, formula)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None

    @staticmethod
    def jvp(ctx, formula, value, where):
        return formula.clone()
