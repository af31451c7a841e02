"""The residual shift's kernels in plain PyTorch; C++ (csrc/cpu) and ``_triton`` have the same functions.

They take entries as ``entries.py`` says, and give ``sums`` as ``gradients.py`` says; ``_triton`` has
``entry_grads`` beside them.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import accumulation_dtype, new_tokens
from mmicl_kernels.ops._core.rows import sum_rows
from mmicl_kernels.ops.residual_shift.entries import added_entries, of_entries, per_token


def residual_shift_fwd(
    x: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    preserve_norm: bool,
) -> Tensor:
    d, off = added_entries(vector, scale, adapter_ids, strengths)
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
    """``dx [B, T, C]`` and ``sums``, the gradients of what was added.

    Without ``x`` the norm is not preserved: ``dx`` is ``dout``, and empty here; entries are those of batch
    rows, since a token's gradient is ``dout`` too. What is not needed is empty.
    """
    dx = sums = dout.new_empty(0)
    if x is None:
        return dx, dout.sum(1, keepdim=True, dtype=vector.dtype) if need_sums else sums
    d, off = added_entries(vector, scale, adapter_ids, strengths)
    y = x + d
    x_square, y_square = _square_norms(x, y)
    zero = (x_square == 0) | (y_square == 0)
    ratio = x_square.sqrt() / y_square.sqrt()
    along = (y * dout).sum(-1, keepdim=True)
    dd = (ratio * (dout - y * (along / y_square))).masked_fill(zero, 0.0)
    if need_dx:
        grad = (dd + x * (ratio * along / x_square)).masked_fill(zero, 0.0)
        dx = new_tokens(x).copy_(torch.where(off, dout, grad))
    if need_sums:
        sums = dd if per_token(adapter_ids) else dd.sum(1, keepdim=True)
    return dx, sums


def adapter_sums(dd: Tensor, adapter_ids: Tensor, strengths: Tensor | None, A: int) -> tuple[Tensor, Tensor]:
    """Of every adapter the sum ``[A, N, C]`` of its tokens' ``dd``, each times its strength, in N parts.

    And ids for these A rows, ``[A, 1]`` int32: the adapter, or -1 where no token has it.

    Args:
        dd: ``[B, T, C]``, contiguous last dimension. adapter_ids, strengths: ``[B, T, K]``.
    """
    dd = dd.to(accumulation_dtype(dd))
    sums = dd.new_zeros(A, dd.shape[2])
    for k in range(adapter_ids.shape[2]):
        rows = dd if strengths is None else dd * strengths[:, :, k, None]
        sums += sum_rows(rows.flatten(0, 1), adapter_ids[:, :, k].flatten(), A)
    named = torch.where(adapter_ids < 0, A, adapter_ids).flatten().long()
    used = adapter_ids.new_full((A + 1,), -1).index_copy(0, named, named.int())
    return sums[:, None], used[:A, None]


def entry_products(dd: Tensor, vector: Tensor, adapter_ids: Tensor) -> Tensor:
    """Every token's ``dd . vector_a [B, T, K]``; anything where the id is -1."""
    products = [(dd * of_entries(vector, ids)).sum(-1) for ids in adapter_ids.unbind(2)]
    return torch.stack(products, 2) if products else vector.new_empty(adapter_ids.shape)


def _square_norms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(y.dtype)
    return wide.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
