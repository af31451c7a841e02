"""The shift's kernels in plain PyTorch; C++ (csrc/cpu) and ``_triton`` have the same functions.

They take virtual keys: ``weight, shift [A, P, N, D]`` and ``bias [A, P, N]`` contiguous in the accumulation
dtype; ``adapter_ids`` int32 ``[B]`` or ``[B, T]``, or None where ``A = 1``; and ``prefix``, which of the
adapters are one, bool ``[A]``, or None for none.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops._core.rows import sum_rows
from mmicl_kernels.ops._core.virtual_keys import of_queries, of_tokens

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
    prefix: Tensor | None,
) -> Tensor:
    shifted = new_heads(out).copy_(out)
    attention_shift_fwd_(shifted, lse, q, weight, bias, shift, adapter_ids, prefix)
    return shifted


def attention_shift_fwd_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: Tensor | None,
) -> None:
    gate = _gate(lse, q, weight, bias, adapter_ids, prefix)
    mean = _mean_shift(gate, of_tokens(shift, adapter_ids, q.shape[1]))
    shifted = gate.mu[..., None] * mean
    if prefix is not None:
        kept = torch.where(gate.is_prefix, gate.rest, 1.0)[..., None] * out
        shifted = torch.where(gate.is_prefix[..., None], kept + shifted, out + shifted)
    else:
        shifted = out + shifted
    out.copy_(torch.where(gate.is_shifted[..., None], shifted.to(out.dtype), out))


def attention_shift_bwd(
    dout: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: Tensor | None,
    a: Tensor | None,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything the gate's backward needs, and what a stock attention backward needs from it.

    Returns ``dg [B, H, T, N]``, its ``total [B, H, T]`` (empty for N = 1), ``dq`` (empty unless
    ``need_dq``), ``base`` (empty without ``a``, the attention output before the shift, which a prefix needs),
    ``lift [B, H, T]`` (empty without ``prefix``), ``dweight``, ``dbias``, ``dshift``. A stock backward that
    is given ``base`` and ``lse + lift`` is exact, the gradient through lse included: ``lift`` is what a
    prefix adds to lse, and ``delta = dout . base``.
    """
    H, gate = q.shape[1], _gate(lse, q, weight, bias, adapter_ids, prefix)
    shift_rows = of_tokens(shift, adapter_ids, H)
    # 0 times NaN: a query that is not shifted has no part in any sum.
    hidden = ~gate.is_shifted[..., None]
    dout_acc, q = (x.to(lse.dtype).masked_fill(hidden, 0.0) for x in (dout, q))
    # Key by key: one product of all would be N times as large as dout.
    slopes = torch.stack([(dout_acc * x).sum(-1) for x in shift_rows.unbind(-2)], -1)
    if prefix is not None:
        along = (dout_acc * a).sum(-1, keepdim=True)
        slopes = torch.where(gate.is_prefix[..., None], slopes - along, slopes)
    slopes = slopes.masked_fill(hidden | (gate.shares == 0), 0.0)
    mean = (gate.shares * slopes).sum(-1, keepdim=True)
    p, dmu = gate.mu[..., None] * gate.shares, (gate.mu * gate.rest)[..., None]
    dg = (p * (slopes - mean) + dmu * gate.shares * mean).masked_fill(hidden, 0.0)
    grads = [
        sum_per_adapter(equation, factors, adapter_ids, weight)
        for equation, factors in (
            ("bhtn,bhtd->bhnd", (dg, q)),
            ("bhtn->bhn", (dg,)),
            ("bhtn,bhtd->bhnd", (p, dout_acc)),
        )
    ]

    dq, base, lift = dout.new_empty(0), dout.new_empty(0), lse.new_empty(0)
    # Not the sum of dg, in which what sets the keys apart would cancel.
    total = lse.new_empty(0) if dg.shape[-1] == 1 else (dmu * mean)[..., 0].masked_fill(hidden[..., 0], 0.0)
    if need_dq:
        dq = new_heads(dout).zero_()
        add_gate_grad_(dq, dg, weight, adapter_ids)
    if a is not None:
        mean_shift = _mean_shift(gate, shift_rows)
        exact = a + dmu * mean_shift
        if prefix is not None:
            joint = gate.rest[..., None] * a + gate.mu[..., None] * mean_shift
            exact = torch.where(gate.is_prefix[..., None], joint, exact)
        base = torch.where(gate.is_shifted[..., None], _rounded_for(dout_acc, exact, a.dtype), a)
        base = new_heads(a).copy_(base)
    if prefix is not None:
        lift = -gate.log_rest.masked_fill(~(gate.is_shifted & gate.is_prefix), 0.0)
    return dg, total, dq, base, lift, *grads


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
    """``dq += sum_n dg_n weight_n``: the gradient of the logits with respect to the query."""
    weight = of_tokens(weight, adapter_ids, dq.shape[1])
    dq.copy_(dq + sum(dg[..., n, None] * x for n, x in enumerate(weight.unbind(-2))))


class _Gate(NamedTuple):
    """Of every query ``[B, H, T]``: the mass ``mu`` of its virtual keys, ``rest = 1 - mu`` without
    cancellation, each key's share of it ``[B, H, T, N]``, whether there is a shift, and whether a prefix."""

    mu: Tensor
    rest: Tensor
    log_rest: Tensor
    shares: Tensor
    is_shifted: Tensor
    is_prefix: Tensor | None


def _gate(
    lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, adapter_ids: Tensor | None, prefix: Tensor | None
) -> _Gate:
    B, H = q.shape[:2]
    weight, bias = of_tokens(weight, adapter_ids, H), of_tokens(bias, adapter_ids, H)
    equation = "bhtd,bhtd->bht"
    if weight.shape[2] == 1:  # one adapter for all queries of a row
        equation, weight = "bhtd,bhd->bht", weight[:, :, 0].expand(B, -1, -1, -1)
    logit = torch.stack([torch.einsum(equation, q.to(lse.dtype), x) for x in weight.unbind(-2)], -1) + bias
    together = torch.logsumexp(logit, -1)
    is_shifted = ~torch.isinf(lse) & (together > -torch.inf)
    is_prefix = None if prefix is None else of_tokens(prefix[:, None], adapter_ids, 1)
    if adapter_ids is not None:
        is_shifted = is_shifted & of_queries(adapter_ids >= 0)
    shares = torch.exp(logit - together[..., None]).masked_fill(~is_shifted[..., None], 0.0)
    x = together - lse
    mu, rest = (torch.sigmoid(y).masked_fill(~is_shifted, 0.0) for y in (x, -x))
    return _Gate(mu, rest, F.logsigmoid(-x), shares, is_shifted, is_prefix)


def _mean_shift(gate: _Gate, shift: Tensor) -> Tensor:
    """``[B, H, T, D]``: the virtual keys' values by their shares."""
    return sum(gate.shares[..., n, None] * x for n, x in enumerate(shift.unbind(-2)))


def sum_per_adapter(
    equation: str, factors: tuple[Tensor, ...], adapter_ids: Tensor | None, weight: Tensor
) -> Tensor:
    """``[A, P, N, ...]``: the products of each adapter's queries, summed over them and over the heads that
    share a virtual key."""
    A, P = weight.shape[:2]
    if adapter_ids is None:
        total = torch.einsum(equation, *factors).sum(0, keepdim=True)
    elif adapter_ids.dim() == 1:
        total = sum_rows(torch.einsum(equation, *factors), adapter_ids, A)
    elif 0 < A <= weight.shape[2]:  # one adapter after the other, or one key
        own = [[x.masked_fill((adapter_ids != a)[:, None, :, None], 0.0) for x in factors] for a in range(A)]
        total = torch.stack([torch.einsum(equation, *x).sum(0) for x in own])
    else:
        rows = [_products(x, *factors[1:]) for x in factors[0].unbind(-1)]
        total = torch.stack([sum_rows(x, adapter_ids.flatten(), A) for x in rows], 2)
    return total.unflatten(1, (P, -1)).sum(2)


def _products(factor: Tensor, other: Tensor | None = None) -> Tensor:
    """``factor [B, H, T]`` times ``other [B, H, T, D]``, if given, as rows ``[B * T, H, ...]``."""
    product = factor if other is None else factor[..., None] * other
    return product.transpose(1, 2).flatten(0, 1)
