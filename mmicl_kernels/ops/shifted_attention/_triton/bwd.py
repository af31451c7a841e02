"""The gradients of q, k and v, given ``delta`` and ``dg`` of every query: no atomics, so bit-reproducible.

    ds_ij = P_ij (dout_i.v_j - delta_i)      dq_i = scale sum_j ds_ij k_j + dg_i weight
    dk_j  = scale sum_i ds_ij q_i            dv_j = sum_i P_ij dout_i

With ALL_KEYS the gate's normaliser has a softmax of its own: ``ds_ij -= dg_i Pall_ij``. The pass before
these (``attention_shift``'s backward) computes delta, dg and the gradients of the parameters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import adapter
from mmicl_kernels.ops._core._triton_keys import BLOCK, adapters, add_values, first_key, key_constants
from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys, backend_kernels
from mmicl_kernels.ops.shifted_attention._triton import launch
from mmicl_kernels.ops.shifted_attention._triton.tiles import (
    LOG2E,
    add_mask,
    bounds,
    head,
    key_ranges,
    load_tile,
    query_ranges,
    score_unit,
    scores,
    sequence,
    visible,
)
from mmicl_kernels.ops.shifted_attention.options import Options


@triton.jit
def _rows(x, o_x, m_x, other: tl.constexpr):
    """Numbers of queries; a blind one's lse of -inf becomes +inf, from which any score has exp 0."""
    b_x = tl.load(x + o_x, mask=m_x, other=other)
    return tl.where(b_x == float("-inf"), float("inf"), b_x)


@triton.jit
def _exp(b_s, b_lse, b_low, unit, FOLD: tl.constexpr):
    """``exp(s - lse)``; ``b_low`` is what rounding took from lse, or None."""
    if b_low is not None:
        b_e = tl.exp2(((b_s - b_lse) - b_low) * LOG2E)
    elif FOLD:
        b_e = tl.exp2(b_s * unit - b_lse * LOG2E)
    else:
        b_e = tl.exp2((b_s - b_lse) * LOG2E)
    return b_e


@triton.jit
def _probabilities(
    b_s, b_lse, b_low, p_mask, s_mask_t, s_mask_n,
    o_t, o_n, n_q, n_k, position, first, end, window, unit,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Of scores, whichever way round the tile lies: what is a query's is 2-D like ``o_t``, ``o_n`` across."""
    if p_mask is not None:
        b_s = add_mask(b_s, p_mask, s_mask_t, s_mask_n, o_t, o_n, n_q, n_k)
    b_p = _exp(b_s, b_lse, b_low, unit, FOLD)
    if EDGE:
        b_p = tl.where(visible(o_t, o_n, position, first, end, window, CAUSAL), b_p, 0.0)
    return b_p


@triton.jit
def _dscores(
    b_p, b_dp, b_delta, b_s, b_gate_lse, b_dg, o_n, end, softcap, unit,
    ALL_KEYS: tl.constexpr, GATE_ONLY: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The gradient of the scaled scores."""
    b_ds = tl.zeros_like(b_s) if GATE_ONLY else b_p * (b_dp - b_delta)
    if ALL_KEYS:
        b_ds -= b_dg * tl.where(o_n < end, _exp(b_s, b_gate_lse, None, unit, FOLD), 0.0)
    if softcap is not None:
        b_ds *= 1.0 - (b_s / softcap) * (b_s / softcap)
    return b_ds


@triton.jit
def _accumulate_dkdv(
    b_dk, b_dv, b_k, b_v, q, dout, lse, lse_low, delta, gate_lse, dg, p_mask,
    s_q_t, s_dout_t, s_mask_t, s_mask_n, i_x, i_h, row_q, o_row, o_n, n_q, n_k, position, first, end, lo, hi,
    scale, softcap, window, unit,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, ALL_KEYS: tl.constexpr, GATE_ONLY: tl.constexpr,
    FOLD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Add what queries ``lo..hi`` of one head send to the keys ``o_n``."""
    for i_t in range(lo, hi, BM):
        o_t = i_t + tl.arange(0, BM)
        m_t = o_t < n_q
        # [BM, BD]
        b_q = load_tile(q, i_x, i_h, row_q, s_q_t, i_t, n_q, D, BM, BD, TMA, True, PACKED and EDGE)
        # [BM, 1]
        b_lse = _rows(lse, o_row + o_t, m_t, float("inf"))[:, None]
        b_delta = tl.load(delta + o_row + o_t, mask=m_t, other=0.0)[:, None]
        b_low, b_gate_lse, b_dg = None, None, None
        if lse_low is not None:
            b_low = tl.load(lse_low + o_row + o_t, mask=m_t, other=0.0)[:, None]
        if ALL_KEYS:
            b_gate_lse = _rows(gate_lse, o_row + o_t, m_t, float("inf"))[:, None]
            b_dg = tl.load(dg + o_row + o_t, mask=m_t, other=0.0)[:, None]
        # [BM, BN]
        b_s = scores(b_q, b_k, scale, softcap, FOLD, PRECISION)
        b_p, b_dp = None, None
        if not GATE_ONLY:
            b_p = _probabilities(
                b_s, b_lse, b_low, p_mask, s_mask_t, s_mask_n,
                o_t[:, None], o_n[None, :], n_q, n_k, position, first, end, window, unit, CAUSAL, EDGE, FOLD,
            )  # fmt: skip
            b_do = load_tile(dout, i_x, i_h, row_q, s_dout_t, i_t, n_q, D, BM, BD, TMA, True, PACKED and EDGE)
            # [BN, BD]; before the next product, so that fewer tiles live at once
            b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = _dscores(
            b_p, b_dp, b_delta, b_s, b_gate_lse, b_dg, o_n[None, :], end, softcap, unit,
            ALL_KEYS, GATE_ONLY, FOLD,
        )  # fmt: skip
        # [BN, BD]
        b_dk = tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["scale", "softcap", "window", "q_start", "B", "H", "T", "S", "N", "N_K"])
def shifted_attention_dkdv_kernel(
    q, k, v, dout, lse, lse_low, delta, gate_lse, dg,
    q_starts, kv_start, kv_end, mask, cu_seqlens_q, cu_seqlens_k, dk, dv,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_g, s_k_t, s_v_b, s_v_g, s_v_t, s_dout_b, s_dout_h, s_dout_t,
    s_mask_b, s_mask_h, s_mask_t, s_mask_n,
    scale, softcap, window, q_start, B, H, T, S, N, N_K,
    D: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ALL_KEYS: tl.constexpr,
    FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A program owns BN keys and sums over HEADS of the GROUP query heads that share them.

    Stores ``dk, dv [B, N_K, H / HEADS, D]``; N, N_K: rows of q's and k's storage, S: keys of the longest
    sequence. Early keys come first: where causal, they have the most queries.
    """
    PACKED: tl.constexpr = cu_seqlens_q is not None
    BOUNDED: tl.constexpr = PACKED or kv_end is not None
    i_p, HP = tl.program_id(0), H // HEADS
    i_hp, i_b, i_n = i_p % HP, i_p // HP % B, i_p // HP // B
    i_x, row_q, row_k, n_q, n_k = sequence(cu_seqlens_q, cu_seqlens_k, i_b, T, S)
    n_0 = i_n * BN
    if n_0 >= n_k:
        return
    position, first, end = bounds(q_start, q_starts, kv_start, kv_end, i_b, n_q, n_k)
    lo, a, b, hi = query_ranges(first, end, position, n_0, n_q, window, CAUSAL, PACKED, BM, BN)

    i_g = i_hp * HEADS // GROUP
    p_k, p_v = head(k, i_x, i_g, s_k_b, s_k_g, TMA), head(v, i_x, i_g, s_v_b, s_v_g, TMA)
    # [BN, BD]
    b_k = load_tile(p_k, i_x, i_g, row_k, s_k_t, n_0, end, D, BN, BD, TMA, True, BOUNDED)
    b_v = load_tile(p_v, i_x, i_g, row_k, s_v_t, n_0, end, D, BN, BD, TMA, True, BOUNDED)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    o_n, o_d = n_0 + tl.arange(0, BN), tl.arange(0, BD)

    unit = score_unit(scale, FOLD)
    # Queries that see some of the keys, all, some; then those whose gate alone counts the keys.
    MASKED: tl.constexpr = mask is not None
    RIGHT: tl.constexpr = not MASKED and (window is not None or PACKED)
    if MASKED:
        a = hi
    starts, stops = (lo, a, b, 0, hi), (a, b, hi, lo, tl.cdiv(n_q, BM) * BM)
    for i_j in range(HEADS):
        i_h = i_hp * HEADS + i_j
        o_row = (i_x * H + i_h) * N + row_q
        p_mask = None
        if MASKED:
            p_mask = mask + i_x * s_mask_b + i_h.to(tl.int64) * s_mask_h
        p_q = head(q, i_x, i_h, s_q_b, s_q_h, TMA)
        p_dout = head(dout, i_x, i_h, s_dout_b, s_dout_h, TMA)
        for i_r in tl.static_range(5):
            if not MASKED if i_r == 1 else (RIGHT if i_r == 2 else (i_r == 0 or ALL_KEYS)):
                b_dk, b_dv = _accumulate_dkdv(
                    b_dk, b_dv, b_k, b_v, p_q, p_dout, lse, lse_low, delta, gate_lse, dg, p_mask,
                    s_q_t, s_dout_t, s_mask_t, s_mask_n, i_x, i_h, row_q, o_row, o_n, n_q, n_k,
                    position, first, end, starts[i_r], stops[i_r], scale, softcap, window, unit,
                    CAUSAL, i_r != 1, ALL_KEYS, i_r > 2, FOLD, D, BM, BD, PRECISION, TMA, PACKED,
                )  # fmt: skip

    m_nd = (o_n < n_k)[:, None] & (o_d < D)[None, :]
    o_nd = (((i_x * N_K + row_k + o_n) * HP + i_hp) * D)[:, None] + o_d[None, :]
    tl.store(dk + o_nd, (b_dk * scale).to(dk.dtype.element_ty), mask=m_nd)
    tl.store(dv + o_nd, b_dv.to(dv.dtype.element_ty), mask=m_nd)


@triton.jit
def _accumulate_dq(
    b_dq, b_q, b_do, b_lse, b_low, b_delta, b_gate_lse, b_dg, k, v, p_mask,
    s_k_t, s_v_t, s_mask_t, s_mask_n, i_x, i_g, row_k, o_t, n_q, n_k, position, first, end, lo, hi,
    scale, softcap, window, unit,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, ALL_KEYS: tl.constexpr, GATE_ONLY: tl.constexpr,
    FOLD: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add what keys ``lo..hi`` send to the queries ``o_t``."""
    for i_n in range(lo, hi, BN):
        o_n = i_n + tl.arange(0, BN)
        # [BN, BD]
        b_k = load_tile(k, i_x, i_g, row_k, s_k_t, i_n, end, D, BN, BD, TMA, EDGE, BOUNDED)
        # [BM, BN]
        b_s = scores(b_q, b_k, scale, softcap, FOLD, PRECISION)
        b_p, b_dp = None, None
        if not GATE_ONLY:
            b_p = _probabilities(
                b_s, b_lse, b_low, p_mask, s_mask_t, s_mask_n,
                o_t, o_n[None, :], n_q, n_k, position, first, end, window, unit, CAUSAL, EDGE, FOLD,
            )  # fmt: skip
            b_v = load_tile(v, i_x, i_g, row_k, s_v_t, i_n, end, D, BN, BD, TMA, EDGE, BOUNDED)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = _dscores(
            b_p, b_dp, b_delta, b_s, b_gate_lse, b_dg, o_n[None, :], end, softcap, unit,
            ALL_KEYS, GATE_ONLY, FOLD,
        )  # fmt: skip
        # [BM, BD]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(
    do_not_specialize=[
        "scale", "softcap", "window", "q_start", "B", "H", "T", "S", "N", "s_ids", "s_ids_t",
    ]
)  # fmt: skip
def shifted_attention_dq_kernel(
    q, k, v, dout, weight, dlogits, lse, lse_low, delta, gate_lse, dg,
    q_starts, kv_start, kv_end, mask, cu_seqlens_q, cu_seqlens_k, adapter_ids, dq,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_g, s_k_t, s_v_b, s_v_g, s_v_t, s_dout_b, s_dout_h, s_dout_t,
    s_mask_b, s_mask_h, s_mask_t, s_mask_n, s_ids, s_ids_t,
    scale, softcap, window, q_start, B, H, T, S, N,
    SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALL_KEYS: tl.constexpr,
    FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A program owns BM queries of one head. Stores ``dq [B, N, H, D]``, the gate's part included.

    ``dlogits [B, H, N, KEYS]`` are the virtual keys', ``dg`` their sum: without KEYS there is one.
    """
    PACKED: tl.constexpr = cu_seqlens_q is not None
    BOUNDED: tl.constexpr = PACKED or kv_end is not None
    i_p = tl.program_id(0)
    i_h, i_b = i_p % H, i_p // H % B
    i_t = tl.cdiv(T, BM) - 1 - i_p // H // B
    i_x, row_q, row_k, n_q, n_k = sequence(cu_seqlens_q, cu_seqlens_k, i_b, T, S)
    t_0 = i_t * BM
    if t_0 >= n_q:
        return
    position, first, end = bounds(q_start, q_starts, kv_start, kv_end, i_b, n_q, n_k)
    p_last = position + tl.minimum(t_0 + BM, n_q) - 1
    lo, a, b, hi = key_ranges(first, end, position + t_0, p_last, window, CAUSAL, BN)
    i_g = i_h // GROUP

    p_q = head(q, i_x, i_h, s_q_b, s_q_h, TMA)
    p_dout = head(dout, i_x, i_h, s_dout_b, s_dout_h, TMA)
    # [BM, BD]
    b_q = load_tile(p_q, i_x, i_h, row_q, s_q_t, t_0, n_q, D, BM, BD, TMA, True, PACKED)
    b_do = load_tile(p_dout, i_x, i_h, row_q, s_dout_t, t_0, n_q, D, BM, BD, TMA, True, PACKED)
    b_dq = tl.zeros([BM, BD], tl.float32)
    o_t, o_d = t_0 + tl.arange(0, BM), tl.arange(0, BD)
    m_t, o_row = o_t < n_q, (i_x * H + i_h) * N + row_q + o_t
    # [BM, 1]
    b_lse = _rows(lse, o_row, m_t, float("inf"))[:, None]
    b_delta = tl.load(delta + o_row, mask=m_t, other=0.0)[:, None]
    b_dg = tl.load(dg + o_row, mask=m_t, other=0.0)[:, None]
    b_low, b_gate_lse = None, None
    if lse_low is not None:
        b_low = tl.load(lse_low + o_row, mask=m_t, other=0.0)[:, None]
    if ALL_KEYS:
        b_gate_lse = _rows(gate_lse, o_row, m_t, float("inf"))[:, None]

    p_k, p_v = head(k, i_x, i_g, s_k_b, s_k_g, TMA), head(v, i_x, i_g, s_v_b, s_v_g, TMA)
    p_mask = None
    MASKED: tl.constexpr = mask is not None
    LEFT: tl.constexpr = MASKED or (kv_start is not None or window is not None)
    if MASKED:
        p_mask = mask + i_x * s_mask_b + i_h.to(tl.int64) * s_mask_h
        a = hi
    unit = score_unit(scale, FOLD)
    starts, stops = (lo, a, b, 0, hi), (a, b, hi, lo, tl.cdiv(end, BN) * BN)
    for i_r in tl.static_range(5):
        if LEFT if i_r == 0 else (ALL_KEYS if i_r > 2 else not MASKED):
            b_dq = _accumulate_dq(
                b_dq, b_q, b_do, b_lse, b_low, b_delta, b_gate_lse, b_dg, p_k, p_v, p_mask,
                s_k_t, s_v_t, s_mask_t, s_mask_n, i_x, i_g, row_k, o_t[:, None], n_q, n_k,
                position, first, end, starts[i_r], stops[i_r], scale, softcap, window, unit,
                CAUSAL, i_r != 1, ALL_KEYS, i_r > 2, FOLD, D, BN, BD, PRECISION, TMA, BOUNDED,
            )  # fmt: skip

    if KEYS == 0:
        i_a = adapter(adapter_ids, 1, i_b)
        p_weight = weight + (tl.maximum(i_a, 0) * H + i_h) * D + o_d
        b_weight = tl.load(p_weight, mask=(o_d < D) & (i_a >= 0), other=0.0)
        b_dq = b_dq * scale + b_dg * b_weight[None, :]
    else:
        b_dq *= scale
        i_a = adapters(adapter_ids, s_ids, s_ids_t, i_x if PER_QUERY else i_b, row_q + o_t, m_t, PER_QUERY)
        o_first = first_key(i_a, i_h, H, SHARE, KEYS)
        for i_n in range(0, KEYS, BK):
            o_k = i_n + tl.arange(0, BK)
            m_k = m_t[:, None] & (o_k < KEYS)[None, :]
            b_c = tl.load(dlogits + o_row[:, None] * KEYS + o_k[None, :], mask=m_k, other=0.0)
            b_dq = add_values(b_dq, b_c, weight, o_first, i_a >= 0, i_n, KEYS, BK, D, BD)
    p_dq = dq + (((i_x * N + row_q + o_t) * H + i_h) * D)[:, None] + o_d[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


def backward(dout, dlse, results, need_dqkv, qkv, keys: VirtualKeys, options: Options):
    """``dq, dk, dv`` (empty unless needed) and the gradients of the stacked parameters.

    ``results`` are ``a``, ``lse``, ``gate_lse`` and ``lse_low`` of the forward, with lse in place of an empty
    gate_lse.
    """
    q, k, v = qkv
    a, lse, gate_lse, lse_low = results
    apart = dlse is not None and keys.prefix is not None
    deltas, dparameters = backend_kernels("triton", q.device).attention_delta(
        dout, None if apart else dlse, gate_lse, q, *keys, a, not options.all_keys,
        options.cu_seqlens_q, options.max_seqlen_q,
    )  # fmt: skip
    if not need_dqkv:
        return [x.new_empty(0) for x in qkv], dparameters
    low, kept, delta = launch.or_none(lse_low), dout, deltas.delta
    if deltas.lift is not None and options.all_keys:
        # The gate's lse may be of another size: lse + lift could round to lse.
        kept = (dout * torch.exp(-deltas.lift)[..., None]).to(dout.dtype)
        delta = (kept.to(lse.dtype) * a.to(lse.dtype)).sum(-1).masked_fill(lse == -torch.inf, 0.0)
    elif deltas.lift is not None:
        lse, low = _raised(lse, low, deltas.lift)
    gate = gate_lse if options.all_keys else None
    dqkv = _through_scores(kept, (lse, low, delta, gate, deltas.total), deltas.dg, qkv, keys, options)
    if apart:
        # A prefix takes from the keys what the gradient of their own lse does not know of.
        rows = results[1], launch.or_none(lse_low), -dlse.contiguous(), None, torch.zeros_like(deltas.total)
        plain, none = options._replace(all_keys=False), torch.zeros_like(deltas.dg)
        for total, part in zip(
            dqkv, _through_scores(torch.zeros_like(dout), rows, none, qkv, keys, plain), strict=True
        ):
            total += part
    return dqkv, dparameters


def _raised(lse: Tensor, low: Tensor | None, lift: Tensor) -> tuple[Tensor, Tensor | None]:
    """``lse + lift``, and what rounding took from it where that is kept."""
    total = lse + lift
    if low is None:
        return total, None
    # Where lse is that of finfo.min, a lift is 0 or leaves the keys nothing.
    return total, torch.where(lift == 0, low, 0.0)


def _through_scores(dout, rows, dlogits, qkv, keys: VirtualKeys, options: Options) -> list[Tensor]:
    """``dq, dk, dv`` of ``rows``: lse, its low part, delta, the gate's lse, and ``dlogits`` summed."""
    q, k, v = qkv
    dqkv = [new_heads(x) for x in qkv]
    problem = launch.Problem.of(q, k, options)
    B, H, G, T, S, N, N_K, D, *_ = problem
    if q.numel() == 0 or k.numel() == 0 or B * T == 0 or S == 0:
        dqkv = [x.zero_() for x in dqkv]
    if q.numel() == 0 or B * T == 0:
        return dqkv

    scalars = options.scale, options.softcap, problem.window, problem.q_start, B, H, T, S, N
    visibility = launch.visibility(problem, options)
    strides = *launch.strides(q, k, v, dout), *problem.mask_strides
    BD, constants = launch.block_head_dim(D), (problem.causal, options.all_keys, problem.fold)
    key_form = key_constants(H, keys.weight, keys.adapter_ids, keys.prefix)
    BK = BLOCK if q.itemsize == 2 and not key_form[2] else 1
    with torch.cuda.device_of(q):
        config = launch.config("dq", problem.is_general, BD, q, k, v, dout)
        operands = (q, config.BM), (k, config.BN), (v, config.BN), (dout, config.BM)
        tiles, use_tma = launch.tiles(config, BD, *operands)
        shifted_attention_dq_kernel[(B * H * triton.cdiv(T, config.BM),)](
            *tiles, keys.weight, dlogits if key_form[1] else None, *rows, *visibility, keys.adapter_ids,
            dqkv[0], *strides, *launch.key_strides(H, keys)[:2], *scalars, *key_form, BK,
            D, H // G, *constants, config.BM, config.BN, BD,
            problem.precision, use_tma, **launch.options(config),
        )  # fmt: skip
        if B * S == 0 or k.numel() == 0:
            return dqkv
        config = launch.config("dkdv", problem.is_general, BD, q, k, v, dout)
        programs = B * G * triton.cdiv(S, config.BN)
        heads = H // G if programs >= launch.multiprocessors(q.device) else 1
        dk, dv = dqkv[1:]
        if heads < H // G:
            dk, dv = (q.new_empty(x.shape[0], N_K, H, D, dtype=torch.float32) for x in (k, v))
        operands = (q, config.BM), (k, config.BN), (v, config.BN), (dout, config.BM)
        tiles, use_tma = launch.tiles(config, BD, *operands)
        shifted_attention_dkdv_kernel[(programs * (H // G) // heads,)](
            *tiles, *rows, *visibility, dk, dv,
            *strides, *scalars, N_K, D, H // G, heads, *constants, config.BM, config.BN, BD,
            problem.precision, use_tma, **launch.options(config),
        )  # fmt: skip
    if heads < H // G:
        for total, part in zip(dqkv[1:], (dk, dv), strict=True):
            total.copy_(part.unflatten(2, (G, -1)).sum(3).transpose(1, 2))
    return dqkv
