"""The fused norm's kernels in plain PyTorch; C++ (csrc/cpu) and ``_triton`` have the same functions.

They take entries as ``residual_shift/entries.py`` says, and ``norm_weight [C]`` likewise.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_tokens
from mmicl_kernels.ops.residual_shift.entries import added_entries


def residual_shift_rms_norm_fwd(
    x: Tensor,
    residual: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    norm_weight: Tensor,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normed``, ``new_residual``, and ``rstd [B, T]`` for the backward."""
    d, _ = added_entries(vector, scale, adapter_ids, strengths)
    new_residual = new_tokens(x).copy_(residual.to(d.dtype) + x + d)
    h = new_residual.to(d.dtype)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    n = h * rstd
    if weight_offset == 0:
        n = n.to(x.dtype)
    normed = new_tokens(x).copy_(n * (weight_offset + norm_weight))
    return normed, new_residual, rstd[..., 0].contiguous()


def residual_shift_rms_norm_bwd(
    dnormed: Tensor,
    dnew_residual: Tensor | None,
    new_residual: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    weight_offset: float,
    need_sums: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx [B, T, C]``, also that of the residual; ``sums`` and ``dweight_sums [B, N, C]`` in N parts.

    ``sums`` adds up to the gradient of every row's entries. What is not needed is empty.
    """
    n = new_residual * rstd[..., None]
    dn = dnormed * (weight_offset + norm_weight)
    dh = rstd[..., None] * (dn - n * (dn * n).mean(-1, keepdim=True))
    dh = dh if dnew_residual is None else dh + dnew_residual
    empty = rstd.new_empty(0)
    return (
        new_tokens(new_residual).copy_(dh),
        dh.sum(1, keepdim=True) if need_sums else empty,
        (dnormed * n).sum(1, keepdim=True) if need_dweight else empty,
    )
