"""The residual shift's kernels in plain PyTorch; C++ (csrc/cpu) and ``_triton`` have the same functions.

They take entries as ``entries.py`` says; ``_triton`` has ``entry_grads`` beside them.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_tokens
from mmicl_kernels.ops.residual_shift.entries import row_entries


def residual_shift_fwd(
    x: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    preserve_norm: bool,
) -> Tensor:
    d, off = row_entries(vector, scale, adapter_ids, strengths)
    y = x + d
    if preserve_norm:
        x_square, y_square = _square_norms(x, y)
        zero = (x_square == 0) | (y_square == 0)
        y = (y * (x_square.sqrt() / y_square.sqrt())).masked_fill(zero, 0.0)
    return new_tokens(x).copy_(torch.where(off, x, y))


def residual_shift_bwd(
    dout: Tensor,
    x: Tensor | None,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    need_dx: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """``dx [B, T, C]`` and ``sums [B, N, C]``: the gradient of every row's entry, in N parts.

    Without ``x`` the norm is not preserved: ``dx`` is ``dout``, and empty here. What is not needed is empty.
    """
    dx = sums = dout.new_empty(0)
    if x is None:
        return dx, dout.sum(1, keepdim=True, dtype=vector.dtype) if need_sums else sums
    d, off = row_entries(vector, scale, adapter_ids, strengths)
    y = x + d
    x_square, y_square = _square_norms(x, y)
    zero = (x_square == 0) | (y_square == 0)
    ratio = x_square.sqrt() / y_square.sqrt()
    along = (y * dout).sum(-1, keepdim=True)
    dd = (ratio * (dout - y * (along / y_square))).masked_fill(zero, 0.0)
    if need_dx:
        grad = (dd + x * (ratio * along / x_square)).masked_fill(zero, 0.0)
        dx = new_tokens(x).copy_(torch.where(off, dout, grad))
    return dx, dd.sum(1, keepdim=True) if need_sums else sums


def _square_norms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(y.dtype)
    return wide.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
