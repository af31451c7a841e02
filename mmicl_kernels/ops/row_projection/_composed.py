"""Stock products and LayerNorm between copies of rows.

A set of kernels for the copies is any namespace with ``gather_rows``, ``scatter_rows`` and ``clear_rows_``:
this module, or ``_triton``. An index outside of the ``B * T`` rows is none: it reads zeros and adds nothing.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.ops._impl import uses_triton
from mmicl_kernels.ops._sums import sum_rows
from mmicl_kernels.ops.attention_shift._composed import accumulation_dtype


def kernels(impl: str, device: torch.device) -> ModuleType:
    """The set of kernels for ``impl`` ("composed" or "triton") on ``device``."""
    if uses_triton(impl, device):
        from mmicl_kernels.ops.row_projection import _triton

        return _triton
    return sys.modules[__name__]


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """``[N, C]``: the rows ``index`` of ``hidden [B, T, C]``."""
    B, T, C = hidden.shape
    if B * T == 0:
        return hidden.new_zeros(index.shape[0], C)
    inside = index.clamp(0, B * T - 1)
    # Not of the flattened tensor, which would be a copy of it where batch rows are not next to each other.
    return clear_rows_(hidden[inside // T, inside % T], index, B * T)


def scatter_rows(dx: Tensor, index: Tensor, B: int, T: int) -> Tensor:
    """``[B, T, C]`` contiguous: every row's sum of the ``dx [N, C]`` that belong to it, in their order."""
    return sum_rows(dx, index, B * T).view(B, T, dx.shape[1])


def clear_rows_(x: Tensor, index: Tensor, R: int) -> Tensor:
    """``x [N, D]``, contiguous, with zeros where ``index`` is none of R rows; in place."""
    outside = (index < 0) | (index >= R)
    if x.device.type == "cpu":  # where counting them is free, few rows or none are touched instead of all
        return x.index_fill_(0, outside.nonzero()[:, 0], 0)
    return x.masked_fill_(outside[:, None], 0)


def row_projection_fwd(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out [N, D]``; for the backward ``x [N, C]``, and of a norm (else empty) ``y [N, D]``, mean, rstd."""
    copies = kernels(impl, hidden.device)
    x = copies.gather_rows(hidden, index)
    out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y, mean, rstd = out.new_empty(0), *(x.new_empty(0, dtype=accumulation_dtype(x)) for _ in range(2))
    if norm_weight is not None:
        y = out
        parameters = _as_the_norm_takes_them(y, norm_weight, norm_bias)
        out, mean, rstd = torch.native_layer_norm(y, y.shape[1:], *parameters, eps)
    R = hidden.shape[0] * hidden.shape[1]
    return copies.clear_rows_(out.to(dtype), index, R), x, y, mean, rstd


def row_projection_bwd(
    dout: Tensor,
    index: Tensor,
    x: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    B: int,
    T: int,
    needs: Sequence[bool],
    impl: str,
) -> list[Tensor | None]:
    """Gradients of hidden, weight, bias, norm_weight, norm_bias: those that ``needs`` names, else None.

    ``y`` has the dtype of hidden, even where it is empty.
    """
    need_dhidden, need_dweight, need_dbias, *need_norm = needs
    need_dy = need_dhidden or need_dweight or need_dbias
    grads = [None] * 5
    copies = kernels(impl, dout.device)
    dy = dout.to(y.dtype, copy=True, memory_format=torch.contiguous_format)
    dy = copies.clear_rows_(dy, index, B * T)
    if norm_weight is not None:
        parameters = _as_the_norm_takes_them(y, norm_weight, norm_bias)
        dy, *grads[3:] = torch.ops.aten.native_layer_norm_backward(
            dy, y, y.shape[1:], mean, rstd, *parameters, [need_dy, *need_norm]
        )
    if need_dhidden:
        grads[0] = copies.scatter_rows(dy @ weight.to(dy.dtype), index, B, T)
    if need_dweight:
        grads[1] = dy.t() @ x
    if need_dbias:
        grads[2] = dy.sum(0, dtype=accumulation_dtype(dy))
    return grads


def _as_the_norm_takes_them(y: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """In the dtype of ``y`` on CUDA; in fp32 (fp64) on CPU, whose statistics have the parameters' dtype."""
    dtype = accumulation_dtype(y) if y.device.type == "cpu" else y.dtype
    return [p if p is None else p.to(dtype) for p in parameters]
