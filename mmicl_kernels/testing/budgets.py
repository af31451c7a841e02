"""Tolerances derived from what plain PyTorch loses at the same dtype, and that plain PyTorch.

The eager forms share no code with the ops: one boolean ``[B, 1, T, S]`` map of what is visible, made from
diagonals and slices, block-diagonal where sequences are packed. Products are taken in the inputs' dtype,
the softmax in fp32 (fp64 for fp64), and its probabilities are rounded to the inputs' dtype.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Roundings of the accumulation dtype that a gate's gradient passes between its sums: g + bias, - lse, exp,
# 1 +, 1 /, 1 - mu, mu (1 - mu), times c. They matter in fp32 and fp64 alone, where a sum of a few terms
# can come out exact by luck in the eager form.
GATE_ROUNDINGS = 8


def assert_within_budget(
    name: str,
    actual: Tensor,
    low: Tensor | Sequence[Tensor],
    exact: Tensor,
    roundings: float = GATE_ROUNDINGS,
) -> None:
    """Fail unless ``actual`` is about as near to ``exact`` as plain PyTorch at its dtype is.

    The relative Frobenius error of ``actual`` may be twice that of ``low``, plus one rounding of the
    output (the unit roundoff of ``actual``'s dtype), plus the gate's roundings in fp32 (fp64 for fp64).
    Infinities and NaN must be in the same places, and where ``exact`` is zero throughout, ``actual``
    must be.

    Args:
        name: what is compared, for the message. actual: any dtype. low: the eager form's result at the
            dtype under test; or several, of other orders of summation, of which the worst counts.
        exact: the same in fp64.
        roundings: of the accumulation dtype. A kernel that recomputes ``exp(s - lse)`` in its backward
            adds the largest ``|lse|`` to them; the eager form keeps its probabilities.

    Raises:
        AssertionError: with the three numbers.
    """
    assert exact.dtype == torch.float64, f"{name}: exact has dtype {exact.dtype}, expected float64"
    assert actual.shape == exact.shape, f"{name}: {list(actual.shape)} != {list(exact.shape)}"
    lows = (low,) if isinstance(low, Tensor) else tuple(low)
    for x in lows:
        assert x.shape == exact.shape, f"{name}: low has shape {list(x.shape)}"
    finite = torch.isfinite(exact)
    wide = actual.double()
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    misplaced = int((torch.where(finite, ~torch.isfinite(wide), ~same)).sum())
    assert misplaced == 0, f"{name}: {misplaced} of {exact.numel()} infinities or NaN misplaced"

    exact, wide = exact.where(finite, 0.0), wide.where(finite, 0.0)
    norm = exact.norm()
    if norm == 0:
        assert not wide.any(), f"{name}: largest is {wide.abs().max():.3e}, expected exactly 0"
        return
    error = float((wide - exact).norm() / norm)
    low_error = max(float((x.double().where(finite, 0.0) - exact).norm() / norm) for x in lows)
    budget = 2 * low_error + unit_roundoff(actual.dtype)
    budget += roundings * unit_roundoff(_acc(actual))
    assert error <= budget, (
        f"{name}: relative error {error:.3e} exceeds the budget {budget:.3e}"
        f" (twice plain PyTorch's {low_error:.3e} plus the roundings of {actual.dtype})"
    )


def assert_all_within_budget(
    names: Sequence[str],
    actual: Sequence[Tensor],
    lows: Sequence[Sequence[Tensor]],
    exact: Sequence[Tensor],
    roundings: float = GATE_ROUNDINGS,
) -> None:
    """:func:`assert_within_budget` of several results at once; ``lows`` has the eager ones of every order."""
    for name, x, *low, wide in zip(names, actual, *lows, exact, strict=True):
        assert_within_budget(name, x, low, wide, roundings)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gradients(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    douts: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs of ``fn(*inputs)`` and the gradients of ``inputs`` for the outputs' gradients ``douts``.

    Inputs are detached first (views keep their strides). An output whose ``dout`` is None is left out of
    the backward; an input that is not reached has gradient zero.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, dy) for y, dy in zip(outputs, douts, strict=True) if dy is not None]
    outs, grad_outs = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, leaves, grad_outs, allow_unused=True, materialize_grads=True)
    return tuple(y.detach() for y in outputs), grads


def eager_attention_shift(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    adapter_ids: Tensor | None = None,
    prefix: bool | Tensor = False,
) -> Tensor:
    """:func:`mmicl_kernels.ops.attention_shift` without upcasting, with autograd."""
    return _shift(out, lse, q, weight, bias, shift, _token_ids(adapter_ids, q), prefix)


def eager_shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    q_start: int | Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    adapter_ids: Tensor | None = None,
    prefix: bool | Tensor = False,
    normalizer: str = "visible",
) -> tuple[Tensor, Tensor]:
    """``out, lse`` of :func:`mmicl_kernels.ops.shifted_attention` without upcasting, with autograd."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if cu_seqlens_q is None:
        cached = torch.zeros(B, T, S, dtype=torch.bool)
        visible = cached.clone()
        for b in range(B):
            end = S if kv_end is None else int(kv_end[b])
            start = 0 if kv_start is None else int(kv_start[b])
            first = end - T if q_start is None else int(torch.as_tensor(q_start).expand(B)[b])
            cached[b, :, :end] = True
            visible[b, :, start:end] = _diagonals(T, S, first, causal, window)[:, start:end]
        ids = _token_ids(adapter_ids, q)
    else:
        cached, visible, ids = _packed(T, S, cu_seqlens_q, cu_seqlens_k, causal, window, adapter_ids)
    cached, visible = cached.to(q.device), visible.to(q.device)

    keys, values = (x[:, :, None].expand(B, G, H // G, S, D).flatten(1, 2) for x in (k, v))
    scores = (q @ keys.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.to(_acc(q))
    gate_scores = scores.masked_fill(~cached[:, None], -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible[:, None] & mask
    else:
        visible = visible[:, None]
        scores = scores if mask is None else scores + mask.to(scores.dtype)
    scores = scores.masked_fill(~visible, -torch.inf)

    probabilities, lse = _softmax(scores)
    gate_lse = lse
    if normalizer == "all_keys":
        gate_lse = _softmax(gate_scores)[1].masked_fill(lse == -torch.inf, -torch.inf)
    a = probabilities.to(q.dtype) @ values
    return _shift(a, gate_lse, q, weight, bias, shift, ids, prefix), lse


def _token_ids(adapter_ids: Tensor | None, q: Tensor) -> Tensor | None:
    if adapter_ids is None or adapter_ids.dim() == 2:
        return adapter_ids
    return adapter_ids[:, None].expand(-1, q.shape[2])


def _diagonals(T: int, S: int, first: int, causal: bool, window: int | None) -> Tensor:
    """What the query at absolute position ``first + i`` sees on either side of itself."""
    visible = torch.ones(T, S, dtype=torch.bool)
    if causal:
        visible = visible.tril(first)
    if window is not None:
        visible = visible.triu(first - window + 1)
    return visible


def _packed(T, S, cu_seqlens_q, cu_seqlens_k, causal, window, adapter_ids):
    """Block-diagonal visibility of a packed batch, and the adapter of every token."""
    cached = torch.zeros(1, T, S, dtype=torch.bool)
    visible = cached.clone()
    per_query = adapter_ids is None or adapter_ids.dim() == 2
    ids = adapter_ids if per_query else adapter_ids.new_zeros(1, T)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n, (q0, q1) in enumerate(zip(starts_q[:-1], starts_q[1:], strict=True)):
        k0, k1 = starts_k[n : n + 2]
        cached[0, q0:q1, k0:k1] = True
        visible[0, q0:q1, k0:k1] = _diagonals(q1 - q0, k1 - k0, k1 - k0 - (q1 - q0), causal, window)
        if not per_query:
            ids[0, q0:q1] = adapter_ids[n]
    return cached, visible, ids


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and lse; a row without keys has 0 and -inf."""
    top = F.pad(scores.detach(), (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    exp = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = exp.sum(-1, keepdim=True)
    total = total.clamp(min=1.0)  # it is at least 1 where there is a key: that of the largest score
    return exp / total, (total.log() + top)[..., 0]


def _shift(out, lse, q, weight, bias, shift, token_ids: Tensor | None, prefix: bool | Tensor) -> Tensor:
    """``token_ids [B, T]``: the adapter of every token, or None."""
    if weight.dim() == (3 if token_ids is None else 4) or prefix is not False:
        return _joint(out, lse, q, weight, bias, shift, token_ids, prefix)
    if token_ids is None:
        weight, bias, shift = (x[None, None] for x in (weight, bias, shift))
    else:
        rows = token_ids.clamp(min=0).long()
        weight, bias, shift = weight[rows], bias[rows], shift[rows]
    logit = torch.einsum("bhtd,bthd->bht", q, weight.expand(*_token_shape(q)).to(q.dtype))
    logit = logit.to(_acc(q)) + bias.transpose(1, 2)
    shifted = torch.isfinite(lse)
    if token_ids is not None:
        shifted = shifted & (token_ids >= 0)[:, None]
    mu = torch.where(shifted, torch.sigmoid(logit - lse.where(shifted, 0.0)), 0.0)
    return out + (mu[..., None] * shift.transpose(1, 2)).to(out.dtype)


def _joint(out, lse, q, weight, bias, shift, token_ids: Tensor | None, prefix: bool | Tensor) -> Tensor:
    """One softmax of the virtual keys' logits and of lse, which stands for all other keys."""
    (B, H, T), acc = q.shape[:3], _acc(q)
    if token_ids is None:
        weight, bias, shift = (x[None] for x in (weight, bias, shift))
        token_ids = torch.zeros(B, T, dtype=torch.long, device=q.device)
    if weight.dim() == 3:
        weight, bias, shift = (x.unsqueeze(2) for x in (weight, bias, shift))
    heads = torch.arange(H, device=q.device) // (H // weight.shape[1])
    rows = token_ids.clamp(min=0).long()[:, None], heads[None, :, None]
    logits = torch.einsum("bhtd,bhtnd->bhtn", q, weight[rows].to(q.dtype)).to(acc) + bias[rows]
    shifted = torch.isfinite(lse) & (token_ids >= 0)[:, None] & (logits > -torch.inf).any(-1)
    logits = torch.cat((logits, lse.to(acc)[..., None]), -1)
    p = torch.softmax(logits.masked_fill(~shifted[..., None], 0.0), -1)
    added = torch.einsum("bhtn,bhtnd->bhtd", p[..., :-1], shift[rows].to(acc)).to(out.dtype)
    is_prefix = prefix[rows[0]] if isinstance(prefix, Tensor) else torch.tensor(prefix, device=q.device)
    kept = torch.where(is_prefix[..., None], p[..., -1:].to(out.dtype) * out, out)
    return torch.where(shifted[..., None], kept + added, out)


def _token_shape(q: Tensor) -> tuple[int, ...]:
    B, H, T, D = q.shape
    return B, T, H, D


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def eager_residual_shift(
    x: Tensor,
    vector: Tensor,
    scale: Tensor,
    strengths: Tensor | None = None,
    *,
    adapter_ids: Tensor | None = None,
    preserve_norm: bool = False,
) -> Tensor:
    """:func:`mmicl_kernels.ops.residual_shift` without upcasting, with autograd, row by row of the batch.

    Or token by token, where every token has ids of its own.
    """
    B = x.shape[0]
    if adapter_ids is not None and adapter_ids.dim() == 3:
        adapter_ids = adapter_ids.flatten(0, 1)
        strengths = None if strengths is None else strengths.flatten(0, 1)
    rows = range(B if adapter_ids is None else len(adapter_ids))
    entries = [_row_entry(x, vector, scale, strengths, adapter_ids, row) for row in rows]
    y = x + torch.stack(entries).unflatten(0, (B, -1))
    if not preserve_norm:
        return y
    return y * (_lengths(x) / _lengths(y)).to(x.dtype)


def _row_entry(x, vector, scale, strengths, adapter_ids, b: int) -> Tensor:
    if adapter_ids is None:
        if vector.dim() == 2:
            vector, scale = vector[b], scale.expand(len(vector))[b]
        return (scale * vector).to(x.dtype)
    total = 0 * (scale.sum() * vector.sum(0))
    for k, a in enumerate(adapter_ids[b].reshape(-1).tolist()):
        strength = 1 if strengths is None else strengths[b].reshape(-1)[k]
        if a >= 0:
            total = total + strength * scale.expand(len(vector))[a] * vector[a]
    return total.to(x.dtype)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_acc(x))


def eager_residual_shift_rms_norm(
    x: Tensor,
    residual: Tensor,
    vector: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    strengths: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    adapter_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mmicl_kernels.ops.residual_shift_rms_norm` as a model computes it, every step rounded."""
    h = residual + eager_residual_shift(x, vector, scale, strengths, adapter_ids=adapter_ids)
    n = h.to(_acc(h))
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
    return n.to(h.dtype) * (weight_offset + norm_weight).to(h.dtype), h


def assert_base(base: Tensor, dout: Tensor, inputs: Sequence[Tensor], adapter_ids: Tensor | None) -> None:
    """Fail unless ``dout . base`` of every row is ``dout . a + dg``, and ``base`` no larger than it must be.

    Three columns carry what rounding to ``base``'s dtype took from the product. What is left is what three
    roundings leave of it (as many as columns), and what its sum over D in the accumulation dtype loses.

    Args:
        inputs: ``a, lse, q, weight, bias, shift`` of the gate.
    """
    a, lse, q, weight, bias, shift = (x.double() for x in inputs)
    ones = torch.ones_like(shift)
    leaf = lse.clone().requires_grad_()
    shifted = eager_attention_shift(a, leaf, q, weight, bias, shift, adapter_ids=adapter_ids)
    (dlse,) = torch.autograd.grad(shifted, leaf, dout.double())
    mu = eager_attention_shift(torch.zeros_like(a), lse, q, weight, bias, ones, adapter_ids=adapter_ids)
    rows = shift[:, None] if adapter_ids is None else shift[adapter_ids.clamp(min=0).long()][:, :, None]
    exact = a.abs() + mu * (1 - mu) * rows.abs()
    wanted = (dout.double() * a).sum(-1) - dlse

    D, u = dout.shape[-1], unit_roundoff(base.dtype)
    columns = min(3, D) if base.dtype != _acc(base) else 1
    sizes = (dout.double().abs() * exact).sum(-1)
    bound = (2 * u**columns + (D + GATE_ROUNDINGS) * unit_roundoff(_acc(base))) * sizes
    error = ((dout.double() * base.double()).sum(-1) - wanted).abs()
    worst = float((error / bound).nan_to_num().max())
    assert (error <= bound).all(), f"dout . base is off by {worst:.3g} times its bound"
    largest = exact.amax(-1) * (columns + D * u + 1)
    assert (base.double().abs().amax(-1) <= largest).all(), "base is larger than its product needs"


def product_error(factor_error: float, a: Tensor, b: Tensor) -> float:
    """Two standard deviations of ``a.b`` where ``a`` has a relative error of random signs, ``factor_error``.

    For single numbers, which can come out exact by luck in the eager form while their factors do not.
    """
    return 2 * factor_error * float(a.norm() * b.norm()) / a.numel() ** 0.5
