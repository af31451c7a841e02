"""Dtypes and memory layouts of the tensors that kernels take and make."""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulated(x: Tensor, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """``parameters`` contiguous, in the accumulation dtype of ``x``: all kernels but Triton's need that."""
    dtype = accumulation_dtype(x)
    # Asked first: calls that change nothing cost more than a decoded token's shift.
    return [
        p if p is None or (p.dtype == dtype and p.is_contiguous()) else p.to(dtype).contiguous()
        for p in parameters
    ]


def last_dim_contiguous(x: Tensor) -> Tensor:
    """Gradients come in any layout (``sum().backward()`` expands a scalar); kernels need unit stride."""
    if x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def new_heads(x: Tensor) -> Tensor:
    """Uninitialised, ``[B, H, T, D]`` like ``x``; ``transpose(1, 2)`` is contiguous, as o_proj reads it."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def new_tokens(x: Tensor) -> Tensor:
    """Uninitialised, ``[B, T, C]`` like ``x``: in its layout if that is dense, else contiguous."""
    B, T, C = x.shape
    if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return x.new_empty(T, B, C).transpose(0, 1)
    return x.new_empty(B, T, C)
