"""The batch, and the places of its demonstrations and prompts, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import acc_type
from mmicl_kernels.ops.prefix_splice import _torch
from mmicl_kernels.ops.prefix_splice._triton.tiles import (
    CONFIGS,
    bank_rows,
    clamped,
    demo_tile,
    dense,
    request_tile,
)

LEFT, RIGHT, PACKED, PLACED = (tl.constexpr(i) for i in range(4))
LAYOUTS = {"left": LEFT, "right": RIGHT, "packed": PACKED}
DROPPED = tl.constexpr(_torch.DROPPED)
IGNORED = tl.constexpr(_torch.IGNORED)


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
    bank, bank_scale, offsets, demo_ids, cu_demos, prompt, prompt_start, prompt_end, cu_prompt, labels,
    starts, out, attention_mask, position_ids, cu_seqlens, targets, demo_places, prompt_places,
    s_bank_n, s_prompt_b, s_prompt_t, s_labels_b, s_labels_t, s_out_b, s_out_t,
    R, M, N, K, T, L, LIMIT, COPIES, NT,
    C: tl.constexpr, LAYOUT: tl.constexpr, acc: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
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
    outputs = _torch.empty_outputs(prompt, K, R, B, length, labels is not None)
    out, *maps, targets, demo_places, prompt_places = outputs
    _launch_fwd(
        (bank, bank_scale, *map(dense, (offsets, demo_ids, cu_demos))),
        (prompt, *map(dense, (prompt_start, prompt_end, cu_prompt)), labels, None),
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
        (bank, bank_scale, *map(dense, (offsets, demo_ids, cu_demos))),
        (None, None, None, None, None, dense(starts)),
        (embeddings, None, None, None, None, demo_places, end_places),
        PLACED,
        _torch.NO_LIMIT,
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


def _request_strides(x: Tensor | None, cu_prompt: Tensor | None) -> tuple[int, int]:
    """Strides of requests and tokens; packed prompts are found by their first row alone."""
    if x is None:
        return 0, 0
    return 0 if cu_prompt is not None else x.stride(0), x.stride(1)
