"""The shift's kernels in plain PyTorch, four functions; C++ (csrc/cpu) and ``_triton`` have the same.

They take ``weight, shift [A, H, D]`` and ``bias [A, H]`` contiguous in the accumulation dtype, ``A = 1``
where there are no ``adapter_ids``.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops._core.rows import sum_rows

# Of a rounded row: two of them keep a product to 18 bits in bf16 and 22 in fp16, three to those of fp32.
CARRYING_COLUMNS = 3


def attention_shift_fwd(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
) -> Tensor:
    shifted = new_heads(out).copy_(out)
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
    mu, _, is_shifted = _gate(lse, q, weight, bias, adapter_ids)
    shifted = (out + mu[..., None] * _rows(shift, adapter_ids)[:, :, None]).to(out.dtype)
    out.copy_(torch.where(is_shifted[..., None], shifted, out))


def attention_shift_bwd(
    dout: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    a: Tensor | None,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything the gate's backward needs, and what a stock attention backward needs from it.

    Returns ``dg [B, H, T]``, ``dq`` (empty unless ``need_dq``), ``base`` (empty without ``a``, the
    attention output before the shift), ``dweight``, ``dbias``, ``dshift``. ``base`` is what a stock
    backward is given for its ``delta = dout . base`` to be ``dout . a + dg``, which includes the gradient
    through lse.
    """
    mu, dmu, is_shifted = _gate(lse, q, weight, bias, adapter_ids)
    row_shift = _rows(shift, adapter_ids)[:, :, None]
    # 0 times NaN: a query that is not shifted has no part in any sum.
    dout_acc = dout.to(lse.dtype).masked_fill(~is_shifted[..., None], 0.0)
    q = q.to(lse.dtype).masked_fill(~is_shifted[..., None], 0.0)
    dg = (dmu * (dout_acc * row_shift).sum(-1)).masked_fill(~is_shifted, 0.0)
    dweight = _sum_rows(torch.einsum("bht,bhtd->bhd", dg, q), adapter_ids, weight)
    dbias = _sum_rows(dg.sum(-1), adapter_ids, bias)
    dshift = _sum_rows(torch.einsum("bht,bhtd->bhd", mu, dout_acc), adapter_ids, shift)

    dq, base = dout.new_empty(0), dout.new_empty(0)
    if need_dq:
        dq = new_heads(dout).zero_()
        add_gate_grad_(dq, dg, weight, adapter_ids)
    if a is not None:
        exact = a + dmu[..., None] * row_shift
        base = torch.where(is_shifted[..., None], _rounded_for(dout_acc, exact, a.dtype), a)
        base = new_heads(a).copy_(base)
    return dg, dq, base, dweight, dbias, dshift


def _rounded_for(dout: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact`` in ``dtype`` with the product ``dout . exact`` of every row kept.

    The three columns in which ``dout`` is largest take up what rounding took from the product, the second
    what is left by the first. Their own values do not matter: a stock backward reads the product alone.
    """
    base = exact.to(dtype)
    if base.dtype == exact.dtype:
        return base
    weights, columns = dout.abs().topk(min(CARRYING_COLUMNS, dout.shape[-1]), -1)
    weights = dout.gather(-1, columns)
    own = base.gather(-1, columns)
    left = (dout * (exact - base)).sum(-1) + (weights * own).sum(-1)
    for i in range(columns.shape[-1]):
        weight = weights[..., i]
        own[..., i] = torch.where(weight == 0, own[..., i], left / weight)
        left = left - weight * own[..., i]
    return base.scatter(-1, columns, own)


def add_gate_grad_(dq: Tensor, dg: Tensor, weight: Tensor, adapter_ids: Tensor | None) -> None:
    """``dq += dg * weight``: the gradient of the gate's logit with respect to the query."""
    dq.copy_(dq + dg[..., None] * _rows(weight, adapter_ids)[:, :, None])


def _gate(
    lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, adapter_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``mu``, its derivative ``mu (1 - mu)`` without cancellation, and where there is a shift at all."""
    logit = torch.einsum("bhtd,bhd->bht", q.to(lse.dtype), _rows(weight, adapter_ids, q.shape[0]))
    x = logit + _rows(bias, adapter_ids)[:, :, None] - lse
    is_shifted = ~torch.isinf(lse)
    if adapter_ids is not None:
        is_shifted = is_shifted & (adapter_ids >= 0)[:, None, None]
    mu = torch.sigmoid(x).masked_fill(~is_shifted, 0.0)
    return mu, mu * torch.sigmoid(-x).masked_fill(~is_shifted, 0.0), is_shifted


def _rows(stacked: Tensor, adapter_ids: Tensor | None, B: int = 1) -> Tensor:
    """The parameters of every batch row; ``[1, ...]`` broadcasts where all rows share them."""
    if adapter_ids is None:
        return stacked.expand(B, *stacked.shape[1:])
    if stacked.shape[0] == 0:
        return stacked.new_zeros(adapter_ids.shape[0], *stacked.shape[1:])
    inactive = (adapter_ids < 0).view(-1, *[1] * (stacked.dim() - 1))
    return stacked[adapter_ids.clamp(min=0).long()].masked_fill(inactive, 0.0)


def _sum_rows(per_row: Tensor, adapter_ids: Tensor | None, stacked: Tensor) -> Tensor:
    if adapter_ids is None:
        return per_row.sum(0, keepdim=True)
    return sum_rows(per_row, adapter_ids, stacked.shape[0])
