"""The splice in Triton: one launch forward, one backward (after a sort of the ids), no host sync.

The functions of :mod:`._composed` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``). Rows have
any stride with contiguous columns. Every program works out by itself where its rows come from: a request's
demonstrations are walked from the last to the first, so that what fits is what is seen before the budget is
used up, and a token is found by its distance from the end of the fused tokens.

Ids and bounds are clamped, never trusted: wrong ones give wrong rows, not an access out of bounds.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops.prefix_splice import _composed
from mmicl_kernels.ops.residual_shift._triton import acc_type

LEFT, RIGHT, PACKED, PLACED = (tl.constexpr(i) for i in range(4))
LAYOUTS = {"left": LEFT, "right": RIGHT, "packed": PACKED}
DROPPED = tl.constexpr(_composed.DROPPED)
IGNORED = tl.constexpr(_composed.IGNORED)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows BT of a program, bytes of a tile of theirs, demonstrations and requests it looks at at once."""

    rows: int = 16
    tile_bytes: int = 16384
    demonstrations: int = 16
    requests: int = 16
    num_warps: int = 4

    def columns(self, x: Tensor) -> int:
        """BC; a power of two."""
        return min(triton.next_power_of_2(max(x.shape[-1], 1)), self.tile_bytes // self.rows // x.itemsize)


CONFIGS = {"fwd": LaunchConfig(), "bwd": LaunchConfig(tile_bytes=8192)}


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def demo_range(cu_demos, o_r, m_r, K):
    """The first and the end of the occurrences of requests ``o_r``."""
    b_low = clamped(tl.load(cu_demos + o_r, mask=m_r, other=0).to(tl.int64), 0, K)
    b_high = clamped(tl.load(cu_demos + o_r + 1, mask=m_r, other=0).to(tl.int64), 0, K)
    return b_low, b_high


@triton.jit
def prompt_range(prompt_start, prompt_end, cu_prompt, o_r, m_r, T):
    """The first row and the tokens of the prompts of requests ``o_r``, within their batch row."""
    b_first = o_r.to(tl.int64) * 0
    b_end = b_first + T
    if cu_prompt is not None:
        b_first = tl.load(cu_prompt + o_r, mask=m_r, other=0).to(tl.int64)
        b_end = tl.load(cu_prompt + o_r + 1, mask=m_r, other=0).to(tl.int64)
    if prompt_start is not None:
        b_first = tl.load(prompt_start + o_r, mask=m_r, other=0).to(tl.int64)
    if prompt_end is not None:
        b_end = tl.load(prompt_end + o_r, mask=m_r, other=0).to(tl.int64)
    b_first, b_end = clamped(b_first, 0, T), clamped(b_end, 0, T)
    return b_first, tl.where(m_r, tl.maximum(b_end - b_first, 0), 0)


@triton.jit
def demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK: tl.constexpr):
    """Occurrences ``[X, BK]`` from the ``i_k``-th last one on backwards: number, mask, bank row, tokens."""
    o_k = b_high[:, None] - 1 - i_k - tl.arange(0, BK)[None, :]
    m_k = (o_k >= b_low[:, None]) & (M > 0)
    i_d = clamped(tl.load(demo_ids + o_k, mask=m_k, other=0).to(tl.int64), 0, M - 1)
    b_first = tl.load(offsets + i_d, mask=m_k, other=0).to(tl.int64)
    b_size = tl.load(offsets + i_d + 1, mask=m_k, other=0).to(tl.int64) - b_first
    return o_k, m_k, b_first, tl.maximum(b_size, 0)


@triton.jit
def fused_tokens(offsets, demo_ids, b_low, b_high, b_budget, M, BK: tl.constexpr):
    """How many tokens the last demonstrations have that fit into the budget; all ``[X]``."""
    b_fused, b_sum = b_low * 0, b_low * 0
    n_k = tl.max(b_high - b_low, 0)
    i_k = n_k * 0
    while i_k < n_k:
        o_k, m_k, b_first, b_size = demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK)
        b_suffix = b_sum[:, None] + tl.cumsum(b_size, 1)
        m_fits = m_k & (b_suffix <= b_budget[:, None])
        b_fused = tl.maximum(b_fused, tl.max(tl.where(m_fits, b_suffix, 0), 1))
        b_sum += tl.sum(b_size, 1)
        i_k += BK
    return b_fused


@triton.jit
def bank_rows(offsets, demo_ids, b_low, b_high, b_back, m_fused, M, BK: tl.constexpr):
    """The bank rows of the tokens ``b_back [BT]`` before the end of the fused ones; -1 where there is none.

    ``b_low`` and ``b_high`` are ``[BT]``, or ``[1]`` where all tokens are of one request.
    """
    b_row = tl.where(m_fused, 0, -1).to(tl.int64)
    b_sum = b_low * 0
    n_k = tl.max(b_high - b_low, 0)
    i_k = n_k * 0
    while i_k < n_k:
        o_k, m_k, b_first, b_size = demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK)
        b_suffix = b_sum[:, None] + tl.cumsum(b_size, 1)
        b_into = b_suffix - b_back[:, None]  # the token's place in the demonstration
        m_hit = m_k & m_fused[:, None] & (b_into >= 0) & (b_into < b_size)
        b_row += tl.sum(tl.where(m_hit, b_first + b_into, 0), 1)
        b_sum += tl.sum(b_size, 1)
        i_k += BK
    return b_row


@triton.jit
def request_tile(
    offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_r, R, M, K, T, LIMIT, BK: tl.constexpr
):  # fmt: skip
    """Of requests ``o_r``: occurrences' first and end, the prompt's first row, its and the fused tokens."""
    m_r = o_r < R
    b_low, b_high = demo_range(cu_demos, o_r, m_r, K)
    b_first, b_own = prompt_range(prompt_start, prompt_end, cu_prompt, o_r, m_r, T)
    b_fused = fused_tokens(offsets, demo_ids, b_low, b_high, LIMIT - b_own, M, BK)
    return b_low, b_high, b_first, b_own, b_fused


@triton.jit
def write_places(
    offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, starts, cu_seqlens, demo_places,
    prompt_places, R, M, K, T, L, LIMIT, COPIES, LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What there is one of per request or demonstration, by one program."""
    b_total = tl.full([], 0, dtype=tl.int64)
    i_r = b_total
    while i_r < R:
        # [BR]
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        b_low, b_high, b_first, b_own, b_fused = request_tile(
            offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_r, R, M, K, T, LIMIT, BK
        )
        b_tokens = b_own + b_fused
        b_end = b_total + tl.cumsum(b_tokens, 0)
        b_row = o_r * COPIES * L
        if LAYOUT == LEFT:
            b_place = L - b_own
        elif LAYOUT == RIGHT:
            b_place = b_fused
        elif LAYOUT == PACKED:
            b_row, b_place = o_r * 0, b_end - b_own
        else:
            b_place = tl.load(starts + o_r, mask=m_r, other=0).to(tl.int64) + b_fused
        tl.store(prompt_places + o_r, b_row, mask=m_r)
        tl.store(prompt_places + R + o_r, b_place, mask=m_r)
        if cu_seqlens is not None:
            b_most = tl.minimum(b_end, L) if LAYOUT == PACKED else b_end
            tl.store(cu_seqlens + 1 + o_r, b_most.to(tl.int32), mask=m_r)
        b_sum = b_low * 0
        n_k = tl.max(b_high - b_low, 0)
        i_k = n_k * 0
        while i_k < n_k:
            # [BR, BK]
            o_k, m_k, b_start, b_size = demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK)
            b_suffix = b_sum[:, None] + tl.cumsum(b_size, 1)
            b_at = tl.where(b_suffix <= b_fused[:, None], b_place[:, None] - b_suffix, DROPPED)
            tl.store(demo_places + o_k, tl.broadcast_to(b_row[:, None], [BR, BK]), mask=m_k)
            tl.store(demo_places + K + o_k, b_at, mask=m_k)
            b_sum += tl.sum(b_size, 1)
            i_k += BK
        b_total += tl.sum(b_tokens, 0)
        i_r += BR
    if cu_seqlens is not None:
        tl.store(cu_seqlens, 0)
    # Ids that no request uses.
    i_k = clamped(tl.load(cu_demos + R).to(tl.int64), 0, K)
    while i_k < K:
        o_k = i_k + tl.arange(0, BK)
        tl.store(demo_places + o_k, o_k * 0, mask=o_k < K)
        tl.store(demo_places + K + o_k, o_k * 0 + DROPPED, mask=o_k < K)
        i_k += BK


@triton.jit
def packed_requests(
    offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_j, R, M, K, T, LIMIT,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The requests of the rows ``o_j [BT]`` of a packed batch, R past the end, and their first rows."""
    b_r, b_begin = o_j * 0 + R, o_j * 0
    b_total = tl.full([], 0, dtype=tl.int64)
    i_r = b_total
    n_j = tl.max(o_j, 0)
    while (i_r < R) & (b_total <= n_j):
        o_r = i_r + tl.arange(0, BR)
        b_low, b_high, b_first, b_own, b_fused = request_tile(
            offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_r, R, M, K, T, LIMIT, BK
        )
        b_end = b_total + tl.cumsum(b_own + b_fused, 0)
        b_start = b_end - b_own - b_fused
        # [BT, BR]
        m_hit = (b_start[None, :] <= o_j[:, None]) & (o_j[:, None] < b_end[None, :])
        b_r += tl.sum(tl.where(m_hit, o_r[None, :] - R, 0), 1)
        b_begin += tl.sum(tl.where(m_hit, b_start[None, :], 0), 1)
        b_total += tl.sum(b_own + b_fused, 0)
        i_r += BR
    return b_r, b_begin


@triton.jit(do_not_specialize=["R", "M", "N", "K", "T", "L", "LIMIT", "COPIES", "NT"])
def prefix_splice_fwd_kernel(
    bank,
    bank_scale,
    offsets,
    demo_ids,
    cu_demos,
    prompt,
    prompt_start,
    prompt_end,
    cu_prompt,
    labels,
    starts,
    out,
    attention_mask,
    position_ids,
    cu_seqlens,
    targets,
    demo_places,
    prompt_places,
    s_bank_n,
    s_prompt_b,
    s_prompt_t,
    s_labels_b,
    s_labels_t,
    s_out_b,
    s_out_t,
    R,
    M,
    N,
    K,
    T,
    L,
    LIMIT,
    COPIES,
    NT,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Program 0 writes what there is one of per request; each other one BT rows of the batch."""
    i_p = tl.program_id(0) - 1
    if i_p < 0:
        write_places(
            offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, starts, cu_seqlens, demo_places,
            prompt_places, R, M, K, T, L, LIMIT, COPIES, LAYOUT, BR, BK,
        )  # fmt: skip
    else:
        i_b = (i_p // NT).to(tl.int64)
        # [BT]
        o_j = ((i_p % NT) * BT + tl.arange(0, BT)).to(tl.int64)
        m_j = o_j < L
        if LAYOUT == PACKED:
            o_r, b_begin = packed_requests(
                offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_j, R, M, K, T, LIMIT, BR,
                BK,
            )  # fmt: skip
        else:
            # [1]: one request for all rows
            o_r = i_b // COPIES + tl.arange(0, 1)
        b_low, b_high, b_first, b_own, b_fused = request_tile(
            offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_r, R, M, K, T, LIMIT, BK
        )
        if LAYOUT == LEFT:
            b_place = L - b_own
        elif LAYOUT == RIGHT:
            b_place = b_fused
        elif LAYOUT == PACKED:
            b_place = b_begin + b_fused
        else:
            b_place = tl.load(starts + o_r).to(tl.int64) + b_fused
        # [BT]: from the prompt's first token, negative among the fused
        b_from = o_j - b_place
        m_fused = m_j & (b_from < 0) & (b_from >= -b_fused)
        m_own = m_j & (b_from >= 0) & (b_from < b_own)
        b_row = bank_rows(offsets, demo_ids, b_low, b_high, -b_from, m_fused, M, BK)
        m_fused = m_fused & (b_row >= 0) & (b_row < N)
        b_prompt = b_first + b_from
        b_scale = tl.full([BT], 1.0, dtype=acc)
        if bank_scale is not None:
            b_scale = tl.load(bank_scale + b_row, mask=m_fused, other=0.0).to(acc)
        if attention_mask is not None:
            o_out = i_b * L + o_j
            m_real = m_fused | m_own
            tl.store(attention_mask + o_out, m_real.to(tl.int64), mask=m_j)
            tl.store(position_ids + o_out, tl.where(m_real, b_from + b_fused, 0), mask=m_j)
            if labels is not None:
                p_labels = labels + o_r * s_labels_b + b_prompt * s_labels_t
                b_label = tl.load(p_labels, mask=m_own, other=IGNORED).to(tl.int64)
                tl.store(targets + o_out, b_label, mask=m_j)
        for i_c in range(0, C, BC):
            o_c = i_c + tl.arange(0, BC)
            m_c = (o_c < C)[None, :]
            # [BT, BC]
            p_bank = bank + b_row[:, None] * s_bank_n + o_c[None, :]
            b_x = tl.load(p_bank, mask=m_fused[:, None] & m_c, other=0)
            if bank_scale is not None:
                b_x = b_x.to(acc) * b_scale[:, None]
            b_x = b_x.to(out.dtype.element_ty)
            m_write = m_fused
            if prompt is not None:
                p_prompt = prompt + (o_r * s_prompt_b + b_prompt * s_prompt_t)[:, None] + o_c[None, :]
                b_own_x = tl.load(p_prompt, mask=m_own[:, None] & m_c, other=0)
                b_x = tl.where(m_own[:, None], b_own_x, b_x)
                m_write = m_j
            p_out = out + i_b * s_out_b + o_j[:, None] * s_out_t + o_c[None, :]
            tl.store(p_out, b_x, mask=m_write[:, None] & m_c)


@triton.jit
def first_above(values, b_x, n):
    """The place of the first of ``n`` ascending values that is above ``b_x``; n if none is."""
    b_low, b_high = b_x * 0, b_x * 0 + n
    while tl.max(b_high - b_low, 0) > 0:
        b_mid = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_above = tl.load(values + b_mid, mask=m_open, other=0).to(tl.int64) > b_x
        b_high = tl.where(m_open & m_above, b_mid, b_high)
        b_low = tl.where(m_open & (m_above == 0), b_mid + 1, b_low)
    return b_low


@triton.jit(do_not_specialize=["R", "M", "N", "K", "T", "L", "COPIES", "NB", "NT"])
def prefix_splice_bwd_kernel(
    dout,
    offsets,
    sorted_ids,
    order,
    demo_places,
    prompt_places,
    prompt_start,
    prompt_end,
    cu_prompt,
    dbank,
    dprompt,
    s_dout_b,
    s_dout_t,
    R,
    M,
    N,
    K,
    T,
    L,
    COPIES,
    NB,
    NT,
    C: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """The first NB programs sum BT rows of ``dbank`` over their uses, the others copy rows of ``dprompt``."""
    i_p = tl.program_id(0)
    if i_p < NB:
        if dbank is not None:
            # [BT]
            o_n = (i_p * BT + tl.arange(0, BT)).to(tl.int64)
            i_d = first_above(offsets, o_n, M + 1) - 1
            m_n = (o_n < N) & (i_d >= 0) & (i_d < M)
            b_into = o_n - tl.load(offsets + i_d, mask=m_n, other=0).to(tl.int64)
            b_low = first_above(sorted_ids, tl.where(m_n, i_d - 1, -1), K)
            b_high = tl.where(m_n, first_above(sorted_ids, tl.where(m_n, i_d, -1), K), b_low)
            n_k = tl.max(b_high - b_low, 0)
            for i_c in range(0, C, BC):
                o_c = i_c + tl.arange(0, BC)
                m_c = (o_c < C)[None, :]
                # [BT, BC]
                b_sum = tl.zeros([BT, BC], dtype=acc)
                i_k = n_k * 0
                while i_k < n_k:
                    m_k = b_low + i_k < b_high
                    o_k = tl.load(order + b_low + i_k, mask=m_k, other=0)
                    b_row = tl.load(demo_places + o_k, mask=m_k, other=0)
                    b_at = tl.load(demo_places + K + o_k, mask=m_k, other=0) + b_into
                    m_k = m_k & (b_at >= 0) & (b_at < L)
                    i_x = 0
                    while i_x < COPIES:
                        p_dout = dout + (b_row // L + i_x) * s_dout_b + b_at * s_dout_t
                        b_dout = tl.load(p_dout[:, None] + o_c[None, :], mask=m_k[:, None] & m_c, other=0.0)
                        b_sum += b_dout.to(acc)
                        i_x += 1
                    i_k += 1
                p_dbank = dbank + o_n[:, None] * C + o_c[None, :]
                tl.store(p_dbank, b_sum.to(dbank.dtype.element_ty), mask=(o_n < N)[:, None] & m_c)
    else:
        if dprompt is not None:
            i_b = ((i_p - NB) // NT).to(tl.int64)
            # [BT]
            o_t = ((i_p - NB) % NT * BT + tl.arange(0, BT)).to(tl.int64)
            o_r = o_t * 0 + i_b
            if cu_prompt is not None:
                o_r = first_above(cu_prompt, o_t, R + 1) - 1
            m_t = (o_t < T) & (o_r >= 0) & (o_r < R)
            b_first, b_own = prompt_range(prompt_start, prompt_end, cu_prompt, o_r, m_t, T)
            b_into = o_t - b_first
            b_row = tl.load(prompt_places + o_r, mask=m_t, other=0)
            b_at = tl.load(prompt_places + R + o_r, mask=m_t, other=0) + b_into
            m_own = m_t & (b_into >= 0) & (b_into < b_own) & (b_at >= 0) & (b_at < L)
            for i_c in range(0, C, BC):
                o_c = i_c + tl.arange(0, BC)
                m_c = (o_c < C)[None, :]
                # [BT, BC]
                p_dout = dout + (b_row // L) * s_dout_b + b_at * s_dout_t
                b_x = tl.load(p_dout[:, None] + o_c[None, :], mask=m_own[:, None] & m_c, other=0.0)
                p_dprompt = dprompt + (i_b * T + o_t)[:, None] * C + o_c[None, :]
                tl.store(p_dprompt, b_x, mask=(o_t < T)[:, None] & m_c)


def prefix_splice_fwd(
    bank: Tensor,
    bank_scale: Tensor | None,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    prompt: Tensor,
    prompt_start: Tensor | None,
    prompt_end: Tensor | None,
    cu_prompt: Tensor | None,
    labels: Tensor | None,
    layout: str,
    length: int,
    max_length: int,
) -> tuple[Tensor, ...]:
    R, K = cu_demos.shape[0] - 1, demo_ids.shape[0]
    B = 1 if layout == "packed" else R
    outputs = _composed.empty_outputs(prompt, K, R, B, length, labels is not None)
    out, *maps, targets, demo_places, prompt_places = outputs
    _launch_fwd(
        (bank, bank_scale, *map(_dense, (offsets, demo_ids, cu_demos))),
        (prompt, *map(_dense, (prompt_start, prompt_end, cu_prompt)), labels, None),
        (out, *maps, targets, demo_places, prompt_places),
        LAYOUTS[layout],
        max_length,
    )
    return outputs


def prefix_splice_place_(
    embeddings: Tensor,
    bank: Tensor,
    bank_scale: Tensor | None,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    demo_places, end_places = (
        starts.new_empty(2, n, dtype=torch.long) for n in (demo_ids.shape[0], starts.shape[0])
    )
    _launch_fwd(
        (bank, bank_scale, *map(_dense, (offsets, demo_ids, cu_demos))),
        (None, None, None, None, None, _dense(starts)),
        (embeddings, None, None, None, None, demo_places, end_places),
        PLACED,
        _composed.NO_LIMIT,
    )
    return demo_places, end_places


def _launch_fwd(
    spliced: tuple[Tensor | None, ...],
    own: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    layout: tl.constexpr,
    limit: int,
) -> None:
    """Launches with the kernel's tensors in its order: of the bank, of the prompt, written."""
    bank, _, offsets, demo_ids, cu_demos = spliced
    prompt, _, _, cu_prompt, labels, _ = own
    out, R = outputs[0], cu_demos.shape[0] - 1
    B, L, C = out.shape
    config = CONFIGS["fwd"]
    BT = min(config.rows, triton.next_power_of_2(max(L, 1)))
    NT = triton.cdiv(L, BT)
    copies = B // R if layout == PLACED and R > 0 else 1
    with torch.cuda.device_of(out):
        prefix_splice_fwd_kernel[(1 + B * NT,)](
            *spliced, *own, *outputs,
            bank.stride(0), *_request_strides(prompt, cu_prompt), *_request_strides(labels, cu_prompt),
            *out.stride()[:2],
            R, offsets.shape[0] - 1, bank.shape[0], demo_ids.shape[0],
            0 if prompt is None else prompt.shape[1], L, limit, copies, max(NT, 1),
            C, layout.value, acc_type(out), BT, config.columns(out), config.requests, config.demonstrations,
            num_warps=config.num_warps,
        )  # fmt: skip


def prefix_splice_bwd(
    dout: Tensor,
    offsets: Tensor,
    demo_ids: Tensor,
    demo_places: Tensor,
    prompt_places: Tensor,
    prompt_shape: list[int],
    prompt_start: Tensor | None,
    prompt_end: Tensor | None,
    cu_prompt: Tensor | None,
    N: int,
    bank_dtype: torch.dtype,
    need_dbank: bool,
    need_dprompt: bool,
) -> tuple[Tensor, Tensor]:
    B, L, C = dout.shape
    make = dout.new_zeros if dout.numel() == 0 else dout.new_empty
    dbank = make((N, C) if need_dbank else 0, dtype=bank_dtype)
    dprompt = make(prompt_shape if need_dprompt else 0)
    if dout.numel() == 0 or not (need_dbank or need_dprompt):
        return dbank, dprompt
    R, T, config = prompt_places.shape[1], prompt_shape[1], CONFIGS["bwd"]
    # Stable, so that a demonstration's uses are summed in their order.
    sorted_ids, order = torch.sort(demo_ids, stable=True) if need_dbank else (None, None)
    NB = triton.cdiv(N, config.rows) if need_dbank else 0
    NT = triton.cdiv(T, config.rows)
    programs = NB + (prompt_shape[0] * NT if need_dprompt else 0)
    if programs == 0:
        return dbank, dprompt
    with torch.cuda.device_of(dout):
        prefix_splice_bwd_kernel[(programs,)](
            dout, _dense(offsets), sorted_ids, order, demo_places, prompt_places,
            *map(_dense, (prompt_start, prompt_end, cu_prompt)),
            dbank if need_dbank else None, dprompt if need_dprompt else None, *dout.stride()[:2],
            R, offsets.shape[0] - 1, N, demo_ids.shape[0], T, L, B // R if B > R > 0 else 1,
            NB, max(NT, 1), C, acc_type(dout), config.rows, config.columns(dout), num_warps=config.num_warps,
        )  # fmt: skip
    return dbank, dprompt


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _request_strides(x: Tensor | None, cu_prompt: Tensor | None) -> tuple[int, int]:
    """Strides of requests and tokens; packed prompts are found by their first row alone."""
    if x is None:
        return 0, 0
    return 0 if cu_prompt is not None else x.stride(0), x.stride(1)
