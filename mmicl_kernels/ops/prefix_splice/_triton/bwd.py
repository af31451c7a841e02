"""The gradients of the bank and the prompt: sums over uses in their order, and copies, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import acc_type
from mmicl_kernels.ops.prefix_splice._triton.tiles import CONFIGS, dense, prompt_range


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
    dout, offsets, sorted_ids, order, demo_places, prompt_places, prompt_start, prompt_end, cu_prompt, dbank,
    dprompt,
    s_dout_b, s_dout_t,
    R, M, N, K, T, L, COPIES, NB, NT,
    C: tl.constexpr, acc: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
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
            dout, dense(offsets), sorted_ids, order, demo_places, prompt_places,
            *map(dense, (prompt_start, prompt_end, cu_prompt)),
            dbank if need_dbank else None, dprompt if need_dprompt else None, *dout.stride()[:2],
            R, offsets.shape[0] - 1, N, demo_ids.shape[0], T, L, B // R if B > R > 0 else 1,
            NB, max(NT, 1), C, acc_type(dout), config.rows, config.columns(dout), num_warps=config.num_warps,
        )  # fmt: skip
    return dbank, dprompt
