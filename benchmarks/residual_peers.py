"""What the residual ops are compared with: their formulas in PyTorch, and Liger's fused add and RMSNorm."""

import torch
from torch import Tensor

EPS = 1e-5


def added(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    """M2IV's shift as one would write it; see :func:`mmicl_kernels.ops.residual_shift`."""
    return (x.float() + scale * vector).to(x.dtype)


def added_with_norm(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    """LIVE's: the same with the length of x."""
    wide = x.float()
    y = wide + scale * vector
    return (y * (wide.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))).to(x.dtype)


def added_and_normed(
    x: Tensor, residual: Tensor, vector: Tensor, scale: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Add, shift and Llama's RMSNorm; see :func:`mmicl_kernels.ops.residual_shift_rms_norm`."""
    new_residual = (residual.float() + x.float() + scale * vector).to(x.dtype)
    h = new_residual.float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return norm_weight * n.to(x.dtype), new_residual


def liger(
    x: Tensor, residual: Tensor, vector: Tensor, scale: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Liger's fused add and RMSNorm: as many bytes, without a shift. Raises ImportError without Liger."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, norm_weight, EPS, 0.0, "llama", False)
