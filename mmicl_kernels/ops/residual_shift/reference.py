"""A vector added to the residual stream: the specification.

    d_bt = sum_k strength_btk * scale_a * vector_a,  a = adapter_ids_btk,  or of all tokens of a row the same
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
        vector: ``[A, C]``; without ids ``[C]`` or ``[B, C]``. scale: ``[]``, ``[A]``, ``[B]`` or None for 1.
        adapter_ids, strengths: ``[B, K]``, ``[B, T, K]`` or None.
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
    """The sum of entries, and where all are off: ``[B, N, C]`` and ``[B, N, 1]``.

    N is T where every token has entries of its own, else 1; B is 1 for one vector without ids. An entry whose
    coefficient is 0 has no part in the value, but its coefficient has its gradient.
    """
    if adapter_ids is None:
        stacked = (vector if vector.dim() == 2 else vector[None])[:, None, None]  # [1 or B, 1, 1, C]
        coefficient = vector.new_ones(()) if scale is None else scale.to(vector.dtype)
        coefficient = coefficient.reshape(-1, 1, 1)
    else:
        ids = adapter_ids.long()  # -1 is the last row, which is one of zeros
        ids = ids[:, None] if ids.dim() == 2 else ids
        stacked = pad(vector, (0, 0, 0, 1))[ids]  # [B, 1 or T, K, C]
        coefficient = torch.ones_like(ids, dtype=vector.dtype)
        if scale is not None:
            coefficient = pad(scale.to(vector.dtype).expand(vector.shape[0]), (0, 1))[ids]
        if strengths is not None:
            coefficient = coefficient * strengths.to(vector.dtype).reshape(ids.shape)
        coefficient = coefficient.masked_fill(ids < 0, 0.0)
    zero = (coefficient == 0)[..., None]
    terms = coefficient[..., None] * stacked
    d = _Valued.apply(terms, torch.zeros_like(terms), zero).sum(2)
    return d, zero.all(2)


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
