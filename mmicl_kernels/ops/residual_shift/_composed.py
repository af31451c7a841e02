"""The residual shift's kernels: which set of them runs, and the set in plain PyTorch.

A set is any namespace with the functions ``residual_shift_fwd`` and ``_bwd`` below: this module,
``torch.ops.mmicl_cpu`` (csrc/cpu) and ``_triton``, which has its own ``entry_grads`` too. Arguments are
normalised before they are called: ``vector [A, C]``, ``scale [1]`` or ``[A]`` (None for 1),
``adapter_ids`` and ``strengths [B, K]``, contiguous, in the accumulation dtype (Triton: in any);
``A = 1`` where there are no ids.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmicl_kernels import _extension
from mmicl_kernels.ops._impl import uses_triton
from mmicl_kernels.ops._sums import sum_rows
from mmicl_kernels.ops.attention_shift._composed import accumulation_dtype


def kernels(impl: str, device: torch.device) -> ModuleType:
    """The set of kernels for ``impl`` ("composed" or "triton") on ``device``."""
    if uses_triton(impl, device):
        from mmicl_kernels.ops.residual_shift import _triton

        return _triton
    if device.type == "cpu" and _extension.load():
        return torch.ops.mmicl_cpu
    return sys.modules[__name__]


def prepared(x: Tensor, impl: str, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """The parameters as the kernels take them: contiguous, and unless Triton reads them in fp32 or fp64."""
    if uses_triton(impl, x.device):
        return [p if p is None else p.contiguous() for p in parameters]
    dtype = accumulation_dtype(x)
    # Asked first: calls that change nothing cost more than a decoded token's shift.
    return [
        p if p is None or (p.dtype == dtype and p.is_contiguous()) else p.to(dtype).contiguous()
        for p in parameters
    ]


def new_output(x: Tensor) -> Tensor:
    """An uninitialised tensor like ``x [B, T, C]``: its layout if that is dense, else contiguous."""
    B, T, C = x.shape
    if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return x.new_empty(T, B, C).transpose(0, 1)
    return x.new_empty(B, T, C)


def residual_shift_fwd(
    x: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    preserve_norm: bool,
) -> Tensor:
    d, off = row_entries(vector, scale, adapter_ids, strengths)
    y = x + d
    if preserve_norm:
        x_square, y_square = _square_norms(x, y)
        zero = (x_square == 0) | (y_square == 0)
        y = (y * (x_square.sqrt() / y_square.sqrt())).masked_fill(zero, 0.0)
    return new_output(x).copy_(torch.where(off, x, y))


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
    """``dx [B, T, C]`` and ``sums [B, N, C]``: the gradient of every row's entry, in N parts.

    Without ``x`` the norm is not preserved: ``dx`` is ``dout``, and empty here. What is not needed is empty.
    """
    dx = sums = dout.new_empty(0)
    if x is None:
        return dx, dout.sum(1, keepdim=True, dtype=vector.dtype) if need_sums else sums
    d, off = row_entries(vector, scale, adapter_ids, strengths)
    y = x + d
    x_square, y_square = _square_norms(x, y)
    zero = (x_square == 0) | (y_square == 0)
    ratio = x_square.sqrt() / y_square.sqrt()
    along = (y * dout).sum(-1, keepdim=True)
    dd = (ratio * (dout - y * (along / y_square))).masked_fill(zero, 0.0)
    if need_dx:
        grad = (dd + x * (ratio * along / x_square)).masked_fill(zero, 0.0)
        dx = new_output(x).copy_(torch.where(off, dout, grad))
    return dx, dd.sum(1, keepdim=True) if need_sums else sums


def row_entries(
    vector: Tensor, scale: Tensor | None, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is added to the rows of each batch row ``[B, 1, C]``, and where nothing is; B is 1 without ids."""
    if adapter_ids is None:
        coefficient = vector.new_ones(1, 1) if scale is None else scale[:, None]
        stacked = vector[None]
    else:
        stacked = _of_entries(vector, adapter_ids)
        coefficient = vector.new_ones(adapter_ids.shape) if strengths is None else strengths
        if scale is not None:
            coefficient = coefficient * _of_entries(scale.expand(vector.shape[0]), adapter_ids)
        coefficient = coefficient.masked_fill(adapter_ids < 0, 0.0)
    zero = (coefficient == 0)[..., None]
    d = (coefficient[..., None] * stacked).masked_fill(zero, 0.0).sum(1, keepdim=True)
    return d, zero.all(1, keepdim=True)


def entry_grads(
    sums: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``dvector`` and ``dscale`` from the gradients of the rows' entries ``[B, N, C]``.

    In the shapes of ``vector [C]`` or ``[A, C]`` and ``scale []`` or ``[A]``; None where there is no scale.
    """
    one = adapter_ids is None
    total = sums.sum((0, 1)) if one else _per_adapter(sums, adapter_ids, strengths, len(vector))
    if scale is None:
        return total, None
    dscale = (total * vector).sum(-1)
    if one:
        return total * scale, dscale
    unused = torch.isin(torch.arange(len(vector), device=sums.device), adapter_ids, invert=True)
    dvector = (total * scale.unsqueeze(-1)).masked_fill(unused[:, None], 0.0)
    return dvector, dscale.masked_fill(unused, 0.0).sum_to_size(scale.shape)


def strength_grads(sums: Tensor, vector: Tensor, scale: Tensor | None, adapter_ids: Tensor) -> Tensor:
    """``dstrengths [B, K]``; 0 where an id is -1."""
    grads = torch.einsum("bc,bkc->bk", sums.sum(1), _of_entries(vector, adapter_ids).to(sums.dtype))
    if scale is not None:
        grads = grads * _of_entries(scale.expand(vector.shape[0]), adapter_ids)
    return grads.masked_fill(adapter_ids < 0, 0.0)


def _of_entries(parameter: Tensor, adapter_ids: Tensor) -> Tensor:
    """The ``[A, ...]`` parameter of every entry ``[B, K, ...]``; anything where the id is -1."""
    if parameter.shape[0] == 0:
        return parameter.new_zeros(*adapter_ids.shape, *parameter.shape[1:])
    return parameter[adapter_ids.clamp(min=0).long()]


def _per_adapter(sums: Tensor, adapter_ids: Tensor, strengths: Tensor | None, A: int) -> Tensor:
    B, K = adapter_ids.shape
    entries = sums.sum(1)[:, None].expand(B, K, -1)
    if strengths is not None:
        entries = entries * strengths[..., None]
    return sum_rows(entries.flatten(0, 1), adapter_ids.flatten(), A)


def _square_norms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(y.dtype)
    return wide.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
