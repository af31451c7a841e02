"""Attention and shift in one pass over the keys, and the combine of a pass that was split among programs.

A tile's rows are (query, head) pairs: PACK neighbouring heads, which share their keys, of each query.
Prefill has PACK = 1; decode packs a key head's whole group, so that the keys are read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import adapter, gate
from mmicl_kernels.ops._core._triton_keys import (
    BLOCK,
    adapters,
    attend,
    first_key,
    is_prefix,
    key_constants,
)
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys
from mmicl_kernels.ops.shifted_attention._triton import launch
from mmicl_kernels.ops.shifted_attention._triton.tiles import (
    add_mask,
    bounds,
    exp_scores,
    head,
    key_ranges,
    load_tile,
    score_unit,
    scores,
    sequence,
    visible,
)
from mmicl_kernels.ops.shifted_attention.options import Options, new_results


@triton.jit
def _accumulate(b_m, b_l, b_s, unit, FOLD: tl.constexpr):
    """One step of the online softmax: new maximum and sum, probabilities, factor of what came before."""
    b_max = tl.maximum(b_m, tl.max(b_s, 1))
    # A row that has seen no key yet subtracts 0: exp(-inf) is 0, exp(-inf + inf) would be NaN.
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_p = exp_scores(b_s, b_base[:, None], unit, FOLD)
    b_factor = exp_scores(b_m, b_base, unit, FOLD)
    return b_max, b_l * b_factor + tl.sum(b_p, 1), b_p, b_factor


@triton.jit
def _attend(
    b_acc, b_m, b_l, b_gate_m, b_gate_l, b_q,
    k, v, p_mask, s_k_t, s_v_t, s_mask_t, s_mask_n,
    i_b, i_g, row_k, o_t, n_q, n_k, position, first, end, lo, hi,
    scale, softcap, window, unit,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, ALL_KEYS: tl.constexpr, GATE_ONLY: tl.constexpr,
    FOLD: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Attend to keys ``lo..hi``. Not EDGE: every row sees all of them. GATE_ONLY: no row sees any."""
    for i_n in range(lo, hi, BN):
        o_n = i_n + tl.arange(0, BN)
        # [BN, BD]
        b_k = load_tile(k, i_b, i_g, row_k, s_k_t, i_n, end, D, BN, BD, TMA, EDGE, BOUNDED)
        # [BM, BN]
        b_s = scores(b_q, b_k, scale, softcap, FOLD, PRECISION)
        if ALL_KEYS:
            b_gate_s = tl.where((o_n < end)[None, :], b_s, float("-inf"))
            b_gate_m, b_gate_l, _, _ = _accumulate(b_gate_m, b_gate_l, b_gate_s, unit, FOLD)
        if not GATE_ONLY:
            if EDGE:
                m_s = visible(o_t, o_n[None, :], position, first, end, window, CAUSAL)
                b_s = tl.where(m_s, b_s, float("-inf"))
            if p_mask is not None:
                b_s = add_mask(b_s, p_mask, s_mask_t, s_mask_n, o_t, o_n[None, :], n_q, n_k)
            b_m, b_l, b_p, b_factor = _accumulate(b_m, b_l, b_s, unit, FOLD)
            # [BN, BD]
            b_v = load_tile(v, i_b, i_g, row_k, s_v_t, i_n, end, D, BN, BD, TMA, EDGE, BOUNDED)
            # [BM, BD]
            b_acc = b_acc * b_factor[:, None]
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_m, b_l, b_gate_m, b_gate_l


@triton.jit
def _gate_logit(b_q, weight, bias, adapter_ids, i_b, o_h, H, D: tl.constexpr, BD: tl.constexpr):
    """``q.weight + bias`` [BM], the adapter, and the parameters' rows [1 or BM, 1] of heads ``o_h``."""
    o_d = tl.arange(0, BD)
    i_a = adapter(adapter_ids, 1, i_b)
    o_ah = (tl.maximum(i_a, 0) * H + o_h + tl.zeros([1], tl.int64))[:, None]
    m_d = (o_d < D)[None, :] & (i_a >= 0)
    b_weight = tl.load(weight + o_ah * D + o_d[None, :], mask=m_d, other=0.0)
    b_bias = tl.load(bias + o_ah, mask=i_a >= 0, other=0.0)
    b_logit = tl.sum(b_q.to(tl.float32) * b_weight, 1) + tl.sum(b_bias, 1)
    return b_logit, i_a, o_ah


@triton.jit
def _finish(
    b_acc, b_m, b_l, b_gate_m, b_gate_l, b_logit, i_a, o_ah,
    p_q, weight, bias, shift, adapter_ids, prefix, s_ids, s_ids_t, s_prefix, out, lse, gate_lse, lse_low, a,
    i_x, i_b, o_h, row_q, o_t, m_t, scale, H, N,
    SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr, BK: tl.constexpr,
    FOLD: tl.constexpr, ALL_KEYS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Normalise, shift and store rows ``(o_t, o_h)``; ``o_h`` is one head or one per row.

    ``a`` is what they are before the shift, if it is not None. Without KEYS there is one key of each head,
    whose logit and parameters' rows are given.
    """
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if not FOLD:
        scale = 1.0
    m_blind = b_l == 0
    b_lse = b_m * scale + tl.log(b_l)
    b_gate_lse = b_lse
    if ALL_KEYS:
        b_gate_lse = tl.where(m_blind, float("-inf"), b_gate_m * scale + tl.log(b_gate_l))

    # [BM, BD]
    b_out = b_acc * tl.where(m_blind, 0.0, 1.0 / b_l)[:, None]

    # out and a are stored [B, N, H, D], the normalisers [B, H, N]
    o_row = i_x * N + row_q + o_t
    o_out = ((o_row * H + o_h) * D)[:, None] + o_d[None, :]
    m_out = m_t[:, None] & m_d[None, :]
    if a is not None:
        tl.store(a + o_out, b_out.to(a.dtype.element_ty), mask=m_out)
    if KEYS == 0:
        # [1 or BM, BD]
        b_shift = tl.load(shift + o_ah * D + o_d[None, :], mask=m_d[None, :] & (i_a >= 0), other=0.0)
        # [BM]
        b_mu, _ = gate(b_logit, b_gate_lse, i_a)
        b_out += b_mu[:, None] * b_shift
    else:
        # Once more: kept through the loops over keys it would take registers.
        x = p_q
        if BK == 1:
            x = tl.load(p_q[:, None] + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0).to(
                tl.float32
            )
        i_of = i_x if PER_QUERY else i_b
        i_a = adapters(adapter_ids, s_ids, s_ids_t, i_of, row_q + o_t, m_t, PER_QUERY)
        o_first = first_key(i_a, o_h, H, SHARE, KEYS)
        b_out, _ = attend(
            b_out, x, m_t, b_gate_lse, weight, bias, shift, o_first, i_a >= 0,
            is_prefix(prefix, s_prefix, i_a), KEYS, BK, D, BD,
        )  # fmt: skip
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_out)
    o_lse = (i_x * H + o_h) * N + row_q + o_t
    tl.store(lse + o_lse, b_lse, mask=m_t)
    if ALL_KEYS:
        tl.store(gate_lse + o_lse, b_gate_lse, mask=m_t)
    if lse_low is not None:
        b_low = tl.where(m_blind, 0.0, (b_m * scale - b_lse) + tl.log(b_l))
        tl.store(lse_low + o_lse, b_low, mask=m_t)


@triton.jit(
    do_not_specialize=[
        "scale", "softcap", "window", "q_start", "T", "S", "H", "N", "B", "SPLITS",
        "s_ids", "s_ids_t", "s_prefix",
    ]
)  # fmt: skip
def shifted_attention_fwd_kernel(
    q, k, v, weight, bias, shift,
    q_starts, kv_start, kv_end, mask, cu_seqlens_q, cu_seqlens_k, adapter_ids, prefix,
    out, lse, gate_lse, lse_low, a, part_acc, part_norms,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_g, s_k_t, s_v_b, s_v_g, s_v_t,
    s_mask_b, s_mask_h, s_mask_t, s_mask_n, s_ids, s_ids_t, s_prefix,
    scale, softcap, window, q_start, B, H, T, S, N, SPLITS,
    SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, ALL_KEYS: tl.constexpr,
    FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A program owns BM rows of one group of PACK heads, and one of SPLITS parts of their keys.

    T: queries of the longest sequence; N: rows of q's storage, T unless packed. With ``part_acc`` given it
    stores the unnormalised sums ``[SPLITS, B, H / PACK, rows, D]`` and ``part_norms [2 or 4, SPLITS, ...]``.
    """
    # Long tiles first: causal ones at the end of the sequence, of all heads.
    i_p, HP = tl.program_id(0), H // PACK
    i_hp, i_b = i_p % HP, i_p // HP % B
    i_s = i_p // HP // B % SPLITS
    NT = tl.cdiv(T * PACK, BM)
    i_t = NT - 1 - i_p // HP // B // SPLITS
    i_x, row_q, row_k, n_q, n_k = sequence(cu_seqlens_q, cu_seqlens_k, i_b, T, S)
    if i_t * BM >= n_q * PACK:
        return
    position, first, end = bounds(q_start, q_starts, kv_start, kv_end, i_b, n_q, n_k)

    # [BM]
    o_r, o_d = i_t * BM + tl.arange(0, BM), tl.arange(0, BD)
    o_t, m_t = o_r // PACK, o_r < n_q * PACK
    o_h = (i_hp * PACK).to(tl.int64)
    if PACK > 1:
        o_h = o_h + o_r % PACK
    # [BM, BD]
    p_q = q + i_x * s_q_b + o_h * s_q_h + (row_q + o_t).to(tl.int64) * s_q_t
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)

    # Here, because q's registers are free in the loops that follow.
    b_logit, i_a, o_ah = None, None, None
    if part_acc is None and KEYS == 0:
        b_logit, i_a, o_ah = _gate_logit(b_q, weight, bias, adapter_ids, i_b, o_h, H, D, BD)

    p_last = position + tl.minimum((i_t * BM + BM - 1) // PACK, n_q - 1)
    lo, full_lo, full_hi, hi = key_ranges(first, end, position + i_t * BM // PACK, p_last, window, CAUSAL, BN)
    last = tl.cdiv(end, BN) * BN  # of all keys, which the gate may count
    start = 0
    if part_acc is not None:
        # Each part is a run of whole tiles of the keys that this tile may count.
        lowest, highest = lo, hi
        if ALL_KEYS:
            lowest, highest = 0, last
        NS = tl.cdiv(tl.cdiv(highest - lowest, BN), SPLITS) * BN
        start = lowest + i_s * NS
        last = tl.minimum(start + NS, highest)
        lo, full_lo, full_hi, hi = (
            tl.maximum(tl.minimum(lo, last), start),
            tl.maximum(tl.minimum(full_lo, last), start),
            tl.maximum(tl.minimum(full_hi, last), start),
            tl.maximum(tl.minimum(hi, last), start),
        )

    i_g = i_hp * PACK // GROUP
    p_k, p_v = head(k, i_x, i_g, s_k_b, s_k_g, TMA), head(v, i_x, i_g, s_v_b, s_v_g, TMA)
    p_mask = None
    if mask is not None:
        p_mask = mask + i_x * s_mask_b + (o_h * s_mask_h + tl.zeros([1], tl.int64))[:, None]
    unit = score_unit(scale, FOLD)

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_gate_m, b_gate_l = b_m, b_l
    # Keys that some of the rows see, all see, some see; then those that the gate alone counts.
    MASKED: tl.constexpr = mask is not None
    BOUNDED: tl.constexpr = cu_seqlens_q is not None or kv_end is not None
    LEFT: tl.constexpr = MASKED or (kv_start is not None or window is not None)
    if MASKED:
        full_lo = hi
    starts, stops = (lo, full_lo, full_hi, start, hi), (full_lo, full_hi, hi, lo, last)
    for i_r in tl.static_range(5):
        if LEFT if i_r == 0 else (ALL_KEYS if i_r > 2 else not MASKED):
            b_acc, b_m, b_l, b_gate_m, b_gate_l = _attend(
                b_acc, b_m, b_l, b_gate_m, b_gate_l, b_q, p_k, p_v, p_mask, s_k_t, s_v_t, s_mask_t, s_mask_n,
                i_x, i_g, row_k, o_t[:, None], n_q, n_k, position, first, end, starts[i_r], stops[i_r],
                scale, softcap, window, unit,
                CAUSAL, i_r != 1, ALL_KEYS, i_r > 2, FOLD, D, BN, BD, PRECISION, TMA, BOUNDED,
            )  # fmt: skip

    if part_acc is not None:
        i_n = ((i_s * B + i_b) * HP + i_hp).to(tl.int64) * T * PACK
        o_part, n_parts = i_n + o_r, SPLITS.to(tl.int64) * B * HP * T * PACK
        tl.store(part_acc + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_t[:, None] & (o_d < D)[None, :])
        tl.store(part_norms + o_part, b_m, mask=m_t)
        tl.store(part_norms + n_parts + o_part, b_l, mask=m_t)
        if ALL_KEYS:
            tl.store(part_norms + 2 * n_parts + o_part, b_gate_m, mask=m_t)
            tl.store(part_norms + 3 * n_parts + o_part, b_gate_l, mask=m_t)
    else:
        _finish(
            b_acc, b_m, b_l, b_gate_m, b_gate_l, b_logit, i_a, o_ah,
            p_q, weight, bias, shift, adapter_ids, prefix, s_ids, s_ids_t, s_prefix,
            out, lse, gate_lse, lse_low, a, i_x, i_b, o_h, row_q, o_t, m_t, scale, H, N,
            SHARE, KEYS, PER_QUERY, BK, FOLD, ALL_KEYS, D, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["scale", "B", "H", "T", "N", "SPLITS", "s_ids", "s_ids_t", "s_prefix"])
def shifted_attention_combine_kernel(
    part_acc, part_norms, q, weight, bias, shift, adapter_ids, prefix, cu_seqlens_q,
    out, lse, gate_lse, lse_low, a, s_q_b, s_q_h, s_q_t, s_ids, s_ids_t, s_prefix, scale, B, H, T, N, SPLITS,
    SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr,
    D: tl.constexpr, PACK: tl.constexpr, ALL_KEYS: tl.constexpr, FOLD: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program merges the SPLITS <= BS parts of one row."""
    i_n, HP = tl.program_id(0).to(tl.int64), H // PACK
    i_r, i_hp, i_b = i_n % (T * PACK), i_n // (T * PACK) % HP, i_n // (T * PACK) // HP
    i_x, row_q, _, n_q, _ = sequence(cu_seqlens_q, cu_seqlens_q, i_b, T, T)
    if i_r >= n_q * PACK:
        return
    o_s, o_d = tl.arange(0, BS), tl.arange(0, BD)
    m_s, n_rows = o_s < SPLITS, B * HP * T * PACK
    o_part, n_parts = o_s.to(tl.int64) * n_rows + i_n, SPLITS.to(tl.int64) * n_rows
    unit = score_unit(scale, FOLD)

    # [BS]
    b_part_m = tl.load(part_norms + o_part, mask=m_s, other=float("-inf"))
    b_part_l = tl.load(part_norms + n_parts + o_part, mask=m_s, other=0.0)
    # [1]
    b_m, b_l, b_w = _merge(b_part_m, b_part_l, unit, FOLD)
    b_gate_m, b_gate_l = b_m, b_l
    if ALL_KEYS:
        b_part_m = tl.load(part_norms + 2 * n_parts + o_part, mask=m_s, other=float("-inf"))
        b_part_l = tl.load(part_norms + 3 * n_parts + o_part, mask=m_s, other=0.0)
        b_gate_m, b_gate_l, _ = _merge(b_part_m, b_part_l, unit, FOLD)
    # [BS, BD]
    p_acc = part_acc + o_part[:, None] * D + o_d[None, :]
    b_part = tl.load(p_acc, mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
    # [1, BD]
    b_acc = tl.sum(b_part * b_w[:, None], 0)[None, :]

    o_one = tl.arange(0, 1)
    o_t, o_h = i_r // PACK + o_one, i_hp * PACK + i_r % PACK + o_one
    p_q = q + i_x * s_q_b + o_h * s_q_h + (row_q + o_t).to(tl.int64) * s_q_t
    b_logit, i_a, o_ah = None, None, None
    if KEYS == 0:
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
        b_logit, i_a, o_ah = _gate_logit(b_q, weight, bias, adapter_ids, i_b, o_h, H, D, BD)
    _finish(
        b_acc, b_m, b_l, b_gate_m, b_gate_l, b_logit, i_a, o_ah,
        p_q, weight, bias, shift, adapter_ids, prefix, s_ids, s_ids_t, s_prefix,
        out, lse, gate_lse, lse_low, a, i_x, i_b, o_h, row_q, o_t, o_t < n_q, scale, H, N,
        SHARE, KEYS, PER_QUERY, 1, FOLD, ALL_KEYS, D, BD,
    )  # fmt: skip


@triton.jit
def _merge(b_part_m, b_part_l, unit, FOLD: tl.constexpr):
    """The normaliser ``m, l`` of all parts, both [1], and the weight of each part's sums."""
    b_m = tl.max(b_part_m[None, :], 1)
    b_base = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_w = exp_scores(b_part_m, b_base, unit, FOLD)
    return b_m, tl.sum((b_w * b_part_l)[None, :], 1), b_w


def forward(q, k, v, keys: VirtualKeys, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, ``gate_lse``, ``lse_low``, ``a`` (empty where not needed)."""
    results = new_results(q, options)
    problem = launch.Problem.of(q, k, options)
    B, H, G, T, S, N, _, D, *_ = problem
    if q.numel() == 0 or B * T == 0:
        return results
    BD = launch.block_head_dim(D)
    pack = H // G if T * (H // G) <= launch.DECODE_ROWS else 1
    rows = T * pack
    config = launch.config(launch.forward_kernel(rows), problem.is_general, BD, k, v)
    programs = B * (H // pack) * triton.cdiv(rows, config.BM)
    splits = launch.splits(programs, S, q.device) if rows <= launch.DECODE_ROWS else 1
    part_acc = part_norms = None
    if splits > 1:
        part_acc = q.new_empty(splits, B, H // pack, rows, D, dtype=torch.float32)
        part_norms = part_acc.new_empty(4 if options.all_keys else 2, *part_acc.shape[:-1])

    tiles, use_tma = launch.tiles(config, BD, (k, config.BN), (v, config.BN))
    saved = *results[:2], *map(launch.or_none, results[2:])
    ids, constants = launch.key_strides(H, keys), key_constants(H, keys.weight, keys.adapter_ids, keys.prefix)
    BK = BLOCK if pack == 1 and q.itemsize == 2 and not constants[2] else 1
    with torch.cuda.device_of(q):
        shifted_attention_fwd_kernel[(programs * splits,)](
            q, *tiles, *keys.parameters, *launch.visibility(problem, options), keys.adapter_ids, keys.prefix,
            *saved, part_acc, part_norms, *launch.strides(q, k, v), *problem.mask_strides, *ids,
            options.scale, options.softcap, problem.window, problem.q_start, B, H, T, S, N, splits,
            *constants, BK, D, H // G, pack, problem.causal, options.all_keys, problem.fold,
            config.BM, config.BN, BD, problem.precision, use_tma, **launch.options(config),
        )  # fmt: skip
        if splits > 1:
            shifted_attention_combine_kernel[(B * H * T,)](
                part_acc, part_norms, q, *keys, options.cu_seqlens_q, *saved,
                *launch.strides(q), *ids, options.scale, B, H, T, N, splits,
                *constants, D, pack, options.all_keys, problem.fold, triton.next_power_of_2(splits), BD,
                **launch.combine_options(constants[1]),
            )  # fmt: skip
    return results
