"""Chosen rows of hidden states through a linear layer and an optional LayerNorm: the specification.

    x_n = hidden_{index_n}      y_n = weight x_n + bias
    out_n = y_n, or with a norm  norm_weight * (y_n - mean(y_n)) / sqrt(var(y_n) + eps) + norm_bias

Source: AIM (arXiv 2406.07588), the projection of a demonstration's text positions to fused tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def row_projection_reference(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.row_projection`; fp64 in, fp64 out.

    Args:
        index: ``[N]`` int64, rows of ``hidden.flatten(0, 1)``; what is outside of them is no row.
    """
    acc = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias, norm_weight, norm_bias = (
        x if x is None else x.to(acc) for x in (weight, bias, norm_weight, norm_bias)
    )
    flat = hidden.flatten(0, 1).to(acc)
    outside = (index < 0) | (index >= flat.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        # A row of zeros at the end is what "no row" reads.
        x = F.pad(flat, (0, 0, 0, 1))[index.masked_fill(outside, flat.shape[0])]
        y = F.linear(x, weight, bias)
        if norm_weight is not None:
            y = F.layer_norm(y, y.shape[1:], norm_weight, norm_bias, eps)
        return y.masked_fill(outside[:, None], 0.0).to(dtype or hidden.dtype)
