"""The kernels of the fused norm: which set of them runs, and the set in plain PyTorch.

A set is any namespace with the two functions below; arguments are normalised as in
``ops/residual_shift/_composed.py``, and ``norm_weight [C]`` is contiguous in the accumulation dtype.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

from mmicl_kernels import _extension
from mmicl_kernels.ops._impl import uses_triton
from mmicl_kernels.ops.residual_shift._composed import new_output, row_entries


def kernels(impl: str, device: torch.device) -> ModuleType:
    """The set of kernels for ``impl`` ("composed" or "triton") on ``device``."""
    if uses_triton(impl, device):
        from mmicl_kernels.ops.residual_shift_rms_norm import _triton

        return _triton
    if device.type == "cpu" and _extension.load():
        return torch.ops.mmicl_cpu
    return sys.modules[__name__]


def residual_shift_rms_norm_fwd(
    x: Tensor,
    residual: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    norm_weight: Tensor,
    adapter_ids: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normed``, ``new_residual``, and ``rstd [B, T]`` for the backward."""
    d, _ = row_entries(vector, scale, adapter_ids, None)
    new_residual = new_output(x).copy_(residual.to(d.dtype) + x + d)
    h = new_residual.to(d.dtype)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    n = h * rstd
    if weight_offset == 0:
        n = n.to(x.dtype)
    normed = new_output(x).copy_(n * (weight_offset + norm_weight))
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

    ``sums`` adds up to the gradient of every row's entry. What is not needed is empty.
    """
    n = new_residual * rstd[..., None]
    dn = dnormed * (weight_offset + norm_weight)
    dh = rstd[..., None] * (dn - n * (dn * n).mean(-1, keepdim=True))
    dh = dh if dnew_residual is None else dh + dnew_residual
    empty = rstd.new_empty(0)
    return (
        new_output(new_residual).copy_(dh),
        dh.sum(1, keepdim=True) if need_sums else empty,
        (dnormed * n).sum(1, keepdim=True) if need_dweight else empty,
    )
