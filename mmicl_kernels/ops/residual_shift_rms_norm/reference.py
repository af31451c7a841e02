"""Residual add, shift and RMSNorm: the specification.

h = residual + x + d          d as in residual_shift; rounded to the dtype of x, as the next layer reads it
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
    strengths: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.residual_shift_rms_norm`; fp64 in, fp64 out.

    Args:
        vector, scale, adapter_ids, strengths: as of :func:`.residual_shift_reference`.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        d, _ = total_entry(vector.to(acc), scale, adapter_ids, strengths)
        new_residual = (residual.to(acc) + x.to(acc) + d).to(x.dtype)
        h = new_residual.to(acc)
        n = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        if weight_offset == 0:
            n = n.to(x.dtype).to(acc)
        return (n * (weight_offset + norm_weight.to(acc))).to(x.dtype), new_residual
