"""Residual add, shift and RMSNorm: the specification.

h = residual + x + scale_a * vector_a          rounded to the dtype of x, as the next layer reads it
n = h / sqrt(mean(h^2) + eps)
normed = n * weight  (Llama: n rounded first)  or  n * (weight_offset + weight)  (Gemma: rounded once)
"""

import torch
from torch import Tensor

from mmicl_kernels.ops.residual_shift.reference import total_entry


def residual_shift_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    norm_weight: Tensor,
    adapter_ids: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.residual_shift_rms_norm`; fp64 in, fp64 out.

    Args:
        scale: ``[]``, ``[A]`` or None for 1. adapter_ids: ``[B, 1]`` or None.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        d, _ = total_entry(vector.to(acc), scale, adapter_ids, None)
        new_residual = (residual.to(acc) + x.to(acc) + d).to(x.dtype)
        h = new_residual.to(acc)
        n = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        if weight_offset == 0:
            n = n.to(x.dtype).to(acc)
        return (n * (weight_offset + norm_weight.to(acc))).to(x.dtype), new_residual
