"""Stock products and LayerNorm between copies of rows, by ``_core/rows.py`` or ``_triton``."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.ops._core import rows
from mmicl_kernels.ops._core.dispatch import backend
from mmicl_kernels.ops._core.layout import accumulation_dtype


def _kernels(impl: str, device: torch.device) -> ModuleType:
    if backend(impl, device) == "triton":
        from mmicl_kernels.ops.row_projection import _triton

        return _triton
    return rows


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
    copies = _kernels(impl, hidden.device)
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
    copies = _kernels(impl, dout.device)
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
