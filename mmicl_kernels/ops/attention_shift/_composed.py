"""The shift's kernels: which set of them runs, and the set in plain PyTorch.

A set is any namespace with the four functions below: this module, ``torch.ops.mmicl_cpu`` (csrc/cpu)
and ``_triton``. Shapes are normalised before they are called: ``weight, shift [A, H, D]`` and
``bias [A, H]`` contiguous in the accumulation dtype, ``A = 1`` where there are no ``adapter_ids``.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

from mmicl_kernels import _extension
from mmicl_kernels.ops._impl import uses_triton


def kernels(impl: str, device: torch.device) -> ModuleType:
    """The set of kernels for ``impl`` ("composed" or "triton") on ``device``."""
    if uses_triton(impl, device):
        from mmicl_kernels.ops.attention_shift import _triton

        return _triton
    if device.type == "cpu" and _extension.load():
        return torch.ops.mmicl_cpu
    return sys.modules[__name__]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def stacked_parameters(
    q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters as the kernels take them: ``[A, H, D]``, ``[A, H]``, ``[A, H, D]``, contiguous."""
    acc = accumulation_dtype(q)
    if weight.dim() == 2:
        weight, bias, shift = weight[None], bias[None], shift[None]
    # Asked first: six calls that change nothing cost more than a decoded token's shift.
    if all(x.dtype == acc and x.is_contiguous() for x in (weight, bias, shift)):
        return weight, bias, shift
    return tuple(x.to(acc).contiguous() for x in (weight, bias, shift))


def new_output(q: Tensor) -> Tensor:
    """An uninitialised ``[B, H, T, D]`` whose ``transpose(1, 2)`` is contiguous, as o_proj reads it."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def attention_shift_fwd(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
) -> Tensor:
    shifted = new_output(out).copy_(out)
    attention_shift_fwd_(shifted, lse, q, weight, bias, shift, adapter_ids)
    return shifted


def attention_shift_fwd_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
) -> None:
    mu = _gate(lse, q, weight, bias, adapter_ids)
    out.copy_(out + mu[..., None] * _rows(shift, adapter_ids)[:, :, None])


def attention_shift_bwd(
    dout: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    out: Tensor | None,
    gate_power: int,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything the gate's backward needs, and what a stock attention backward needs from it.

    Returns ``dg [B, H, T]``, ``dq`` (empty unless ``need_dq``), ``base = out - mu**gate_power * shift``
    (empty without ``out``), ``dweight``, ``dbias``, ``dshift``. With gate power 2 a stock backward that
    computes ``delta = dout . base`` includes the gradient through lse; with 1 ``base`` is the attention
    output before the shift.
    """
    mu = _gate(lse, q, weight, bias, adapter_ids)
    row_shift = _rows(shift, adapter_ids)[:, :, None]
    dout_acc = dout.to(lse.dtype)
    dg = mu * (1 - mu) * (dout_acc * row_shift).sum(-1)
    dweight = _sum_rows(torch.einsum("bht,bhtd->bhd", dg, q.to(lse.dtype)), adapter_ids, weight)
    dbias = _sum_rows(dg.sum(-1), adapter_ids, bias)
    dshift = _sum_rows(torch.einsum("bht,bhtd->bhd", mu, dout_acc), adapter_ids, shift)

    dq = base = q.new_empty(0)
    if need_dq:
        dq = new_output(q).zero_()
        add_gate_grad_(dq, dg, weight, adapter_ids)
    if out is not None:
        base = new_output(out).copy_(out - mu[..., None] ** gate_power * row_shift)
    return dg, dq, base, dweight, dbias, dshift


def add_gate_grad_(dq: Tensor, dg: Tensor, weight: Tensor, adapter_ids: Tensor | None) -> None:
    """``dq += dg * weight``: the gradient of the gate's logit with respect to the query."""
    dq.copy_(dq + dg[..., None] * _rows(weight, adapter_ids)[:, :, None])


def _gate(lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, adapter_ids: Tensor | None) -> Tensor:
    logit = torch.einsum("bhtd,bhd->bht", q.to(lse.dtype), _rows(weight, adapter_ids, q.shape[0]))
    mu = torch.sigmoid(logit + _rows(bias, adapter_ids)[:, :, None] - lse)
    active = ~torch.isinf(lse)
    if adapter_ids is not None:
        active = active & (adapter_ids >= 0)[:, None, None]
    return mu.masked_fill(~active, 0.0)


def _rows(stacked: Tensor, adapter_ids: Tensor | None, B: int = 1) -> Tensor:
    """The parameters of every batch row; ``[1, ...]`` broadcasts where all rows share them."""
    if adapter_ids is None:
        return stacked.expand(B, *stacked.shape[1:])
    inactive = (adapter_ids < 0).view(-1, *[1] * (stacked.dim() - 1))
    return stacked[adapter_ids.clamp(min=0).long()].masked_fill(inactive, 0.0)


def _sum_rows(per_row: Tensor, adapter_ids: Tensor | None, stacked: Tensor) -> Tensor:
    if adapter_ids is None:
        return per_row.sum(0, keepdim=True)
    # A matmul with the one-hot ids sums in a fixed order, index_add_ on CUDA does not.
    ids = torch.arange(stacked.shape[0], device=stacked.device)
    one_hot = (adapter_ids[None] == ids[:, None]).to(per_row.dtype)
    return (one_hot @ per_row.flatten(1)).unflatten(1, stacked.shape[1:])
