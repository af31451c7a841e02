"""What the forward and backward kernels share: where a sequence lies, which keys it sees, tiles, scores.

Scores are raw products ``q.k`` where FOLD (a positive scale, no softcap, no additive mask), so that the scale
costs nothing: ``exp2(raw * unit - max * unit)`` is one multiply-add. Otherwise they are the natural ones.
"""

import triton
import triton.language as tl

from mmicl_kernels.ops.shifted_attention.options import FARTHEST

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(FARTHEST)


@triton.jit
def sequence(cu_seqlens_q, cu_seqlens_k, i_b, T, S):
    """Where sequence ``i_b`` lies in the storages of queries and keys: batch row (int64, to multiply
    strides), first row of either; and its numbers of both."""
    i_x, row_q, row_k, n_q, n_k = i_b.to(tl.int64), i_b * 0, i_b * 0, T, S
    if cu_seqlens_q is not None:
        i_x = i_x * 0
        row_q, row_k = tl.load(cu_seqlens_q + i_b), tl.load(cu_seqlens_k + i_b)
        n_q, n_k = tl.load(cu_seqlens_q + i_b + 1) - row_q, tl.load(cu_seqlens_k + i_b + 1) - row_k
    return i_x, row_q, row_k, n_q, n_k


@triton.jit
def bounds(q_start, q_starts, kv_start, kv_end, i_b, n_q, n_k):
    """Position of query 0, first visible key and one past the last."""
    first, end = 0, n_k
    if kv_start is not None:
        first = tl.maximum(tl.load(kv_start + i_b).to(tl.int32), 0)
    if kv_end is not None:
        end = tl.load(kv_end + i_b).to(tl.int32)
    if q_starts is not None:
        position = tl.load(q_starts + i_b).to(tl.int64)
        position = tl.minimum(tl.maximum(position, -FAR), FAR).to(tl.int32)
    elif q_start is not None:
        position = q_start
    else:
        position = end - n_q
    return position, first, tl.minimum(end, n_k)


@triton.jit
def key_ranges(first, end, p_first, p_last, window, CAUSAL: tl.constexpr, BN: tl.constexpr):
    """Multiples of BN ``lo <= a <= b <= hi``: all keys that positions ``p_first..p_last`` see are in
    ``[lo, hi)``, and every one of them sees all of ``[a, b)``."""
    lo, hi, full_lo, full_hi = first, end, first, end
    if CAUSAL:
        hi = tl.minimum(hi, p_last + 1)
        full_hi = tl.minimum(full_hi, p_first + 1)
    if window is not None:
        lo = tl.maximum(lo, p_first - window + 1)
        full_lo = tl.maximum(full_lo, p_last - window + 1)
    lo = tl.minimum(lo // BN, tl.cdiv(tl.maximum(end, 0), BN)) * BN
    hi = tl.maximum(tl.cdiv(tl.maximum(hi, 0), BN) * BN, lo)
    a = tl.minimum(tl.cdiv(full_lo, BN) * BN, hi)
    b = tl.minimum(tl.maximum(tl.maximum(full_hi, 0) // BN * BN, a), hi)
    return lo, a, b, hi


@triton.jit
def query_ranges(
    first, end, position, n_0, n_q, window,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same for the queries that see keys ``n_0..n_0 + BN - 1``: multiples of BM.

    ``[a, b)`` may reach beyond n_q, except where PACKED: there other sequences' queries follow.
    """
    lo, hi, full_lo, full_hi = 0, n_q, 0, n_q
    n_1 = n_0 + BN - 1
    if CAUSAL:
        lo = tl.maximum(n_0 - position, 0)
        full_lo = tl.maximum(n_1 - position, 0)
    if window is not None:
        hi = tl.minimum(hi, n_1 + window - position)
        full_hi = tl.minimum(full_hi, n_0 + window - position) // BM * BM
    if PACKED:
        full_hi = full_hi // BM * BM
    is_inside = (n_0 >= first) & (n_1 < end)
    has_keys = (n_0 < end) & (n_1 >= first)
    lo = tl.minimum(lo // BM, tl.cdiv(n_q, BM)) * BM
    hi = tl.where(has_keys, tl.maximum(tl.cdiv(tl.maximum(hi, 0), BM) * BM, lo), lo)
    a = tl.where(is_inside, tl.minimum(tl.cdiv(full_lo, BM) * BM, hi), hi)
    b = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_hi, 0), BM) * BM, a), hi)
    return lo, a, b, hi


@triton.jit
def visible(o_t, o_n, position, first, end, window, CAUSAL: tl.constexpr):
    """Whether queries ``o_t`` see keys ``o_n``; both 2-D, to be broadcast."""
    m_s = (o_n >= first) & (o_n < end) & (o_t >= 0)
    if CAUSAL:
        m_s &= o_n <= position + o_t
    if window is not None:
        m_s &= o_n > position + o_t - window
    return m_s


@triton.jit
def head(x, i_x, i_h, s_b, s_h, TMA: tl.constexpr):
    """``x`` for :func:`load_tile`: a descriptor as it is, or a pointer to the first row of head ``i_h``."""
    return x if TMA else x + i_x * s_b + i_h.to(tl.int64) * s_h


@triton.jit
def load_tile(
    x, i_b, i_h, row, s_t, i_t, n, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    TMA: tl.constexpr, EDGE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows ``i_t..i_t + BT`` of the head of a sequence that starts at ``row``: ``[BT, BD]``.

    ``x`` is a descriptor of ``[B, heads, rows, D]``, or a pointer to the head's first row. Columns from D on
    are 0, and rows from n on: not EDGE says that there are none, not BOUNDED that the tensor ends there,
    beyond which a descriptor reads 0 by itself.
    """
    o_t, o_d = i_t + tl.arange(0, BT), tl.arange(0, BD)
    if TMA:
        b_x = x.load([i_b.to(tl.int32), i_h, row + i_t, 0]).reshape([BT, BD])
        if EDGE and BOUNDED:
            b_x = tl.where((o_t < n)[:, None], b_x, 0.0)
    else:
        # int64, because a tile of a sliced cache may span more than 2^31 elements
        p_x = x + ((row + o_t).to(tl.int64) * s_t)[:, None] + o_d[None, :]
        if EDGE or D < BD:
            b_x = tl.load(p_x, mask=(o_t < n)[:, None] & (o_d < D)[None, :], other=0.0)
        else:
            b_x = tl.load(p_x)
    return b_x


@triton.jit
def tanh(b_x):
    """To fp32's precision: near 0, where ``1 - exp`` cancels, by its series."""
    b_z = tl.exp2(tl.abs(b_x) * (-2 * LOG2E))
    b_r = (1.0 - b_z) / (1.0 + b_z)
    b_y = b_x * b_x
    b_series = 0.02186948853615520 + b_y * (-0.008863235529902197 + b_y * 0.003592128036572481)
    b_series = 0.1333333333333333 + b_y * (-0.05396825396825397 + b_y * b_series)
    b_series = b_x * (1.0 + b_y * (-0.3333333333333333 + b_y * b_series))
    return tl.where(tl.abs(b_x) < 0.3, b_series, tl.where(b_x < 0, -b_r, b_r))


@triton.jit
def score_unit(scale, FOLD: tl.constexpr):
    """What a score is multiplied by for ``exp2``."""
    return scale * LOG2E if FOLD else LOG2E


@triton.jit
def scores(b_a, b_b, scale, softcap, FOLD: tl.constexpr, PRECISION: tl.constexpr):
    """Products of the rows of two tiles, raw where FOLD, else scaled and capped."""
    b_s = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    if not FOLD:
        b_s = b_s * scale if softcap is None else softcap * tanh(b_s * (scale / softcap))
    return b_s


@triton.jit
def add_mask(b_s, p_mask, s_mask_t, s_mask_n, o_t, o_n, n_q, n_k):
    """Scores under the mask of queries ``o_t`` and keys ``o_n``, both 2-D: -inf where hidden."""
    m_s = (o_t < n_q) & (o_n < n_k)
    p_mask = p_mask + o_t.to(tl.int64) * s_mask_t + o_n.to(tl.int64) * s_mask_n
    if p_mask.dtype.element_ty == tl.uint8:
        b_s = tl.where(tl.load(p_mask, mask=m_s, other=0) != 0, b_s, float("-inf"))
    else:
        b_s += tl.load(p_mask, mask=m_s, other=float("-inf")).to(tl.float32)
    return b_s


@triton.jit
def exp_scores(b_s, b_m, unit, FOLD: tl.constexpr):
    """``exp(s - m)`` of scores; ``unit`` is their ``score_unit``."""
    return tl.exp2(b_s * unit - b_m * unit) if FOLD else tl.exp2((b_s - b_m) * unit)
