"""Forward and backward of N virtual keys, prefixes and adapters of each query; one key has its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton_keys import (
    BLOCK,
    adapters,
    add_values,
    attend,
    first_key,
    id_strides,
    is_prefix,
    key_constants,
    logits,
    mass,
    masses,
    normaliser,
    products,
)
from mmicl_kernels.ops.attention_shift._torch import sum_per_adapter
from mmicl_kernels.ops.attention_shift._triton.rounding import rounded_for
from mmicl_kernels.ops.attention_shift._triton.tiles import launch_config, position, row_pointers, strides

MAX_REGISTERS = 255  # without it ptxas may spill rather than lower an occupancy it has chosen


@triton.jit(do_not_specialize=["H", "T", "s_lse_b", "s_lse_h", "s_ids", "s_ids_t", "s_prefix"])
def virtual_keys_fwd_kernel(
    out, lse, q, weight, bias, shift, adapter_ids, prefix, shifted,
    s_out_b, s_out_h, s_out_t, s_lse_b, s_lse_h, s_lse_t, s_q_b, s_q_h, s_q_t, s_ids, s_ids_t, s_prefix,
    s_shifted_b, s_shifted_h, s_shifted_t,
    H, T,
    SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_t = position(H, T, BT)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t = o_t < T
    m_td = m_t[:, None] & (o_d < D)[None, :]
    x = row_pointers(q, s_q_b, s_q_h, s_q_t, i_b, i_h, o_t)
    p_out = row_pointers(out, s_out_b, s_out_h, s_out_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    p_shifted = row_pointers(shifted, s_shifted_b, s_shifted_h, s_shifted_t, i_b, i_h, o_t)
    # [BT]
    b_lse = tl.load(row_pointers(lse, s_lse_b, s_lse_h, s_lse_t, i_b, i_h, o_t), mask=m_t, other=0.0)
    # [BT, BD]
    if BK == 1:
        x = tl.load(x[:, None] + o_d[None, :], mask=m_td, other=0.0).to(b_lse.dtype)
    b_out = tl.load(p_out, mask=m_td, other=0.0)

    i_a = adapters(adapter_ids, s_ids, s_ids_t, i_b, o_t, m_t, PER_QUERY)
    o_first = first_key(i_a, i_h, H, SHARE, KEYS)
    b_mixed, m_shifted = attend(
        b_out.to(b_lse.dtype), x, m_t, b_lse, weight, bias, shift, o_first, i_a >= 0,
        is_prefix(prefix, s_prefix, i_a), KEYS, BK, D, BD,
    )  # fmt: skip
    b_mixed = tl.where(m_shifted[:, None], b_mixed.to(shifted.dtype.element_ty), b_out)
    tl.store(p_shifted[:, None] + o_d[None, :], b_mixed, mask=m_td)


@triton.jit(do_not_specialize=["H", "T", "N", "s_lse_b", "s_lse_h", "s_ids", "s_ids_t", "s_prefix"])
def virtual_keys_bwd_kernel(
    dout, lse, q, weight, bias, shift, adapter_ids, prefix, a, dlse, cu_seqlens, dg, total, masses_,
    base, delta, lift,
    s_dout_b, s_dout_h, s_dout_t, s_lse_b, s_lse_h, s_lse_t, s_q_b, s_q_h, s_q_t, s_ids, s_ids_t, s_prefix,
    s_a_b, s_a_h, s_a_t,
    H, T, N,
    THROUGH_LSE: tl.constexpr, SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr,
    BK: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes ``dg`` and ``masses_ [B, H, N, KEYS]``, ``total``, ``lift`` and ``delta [B, H, N]``, ``base``.

    ``delta = dout . a - dlse``, and with THROUGH_LSE what ``dout . base`` has beside ``dout . a``. T: rows of
    the longest sequence, N: of the storage; they differ where ``cu_seqlens`` packs sequences.
    """
    i_b, i_h, i_t = position(H, T, BT)
    i_x, row, n_t = i_b, i_b * 0, T
    if cu_seqlens is not None:
        i_x, row = i_b * 0, tl.load(cu_seqlens + i_b).to(tl.int64)
        n_t = tl.load(cu_seqlens + i_b + 1) - row
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t = o_t < n_t
    o_t = row + o_t
    m_td = m_t[:, None] & (o_d < D)[None, :]
    p_q = row_pointers(q, s_q_b, s_q_h, s_q_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
    p_dout = row_pointers(dout, s_dout_b, s_dout_h, s_dout_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
    # [BT]
    b_lse = tl.load(row_pointers(lse, s_lse_b, s_lse_h, s_lse_t, i_x, i_h, o_t), mask=m_t, other=0.0)
    # [BT, BD]
    b_q = tl.load(p_q, mask=m_td, other=0.0).to(b_lse.dtype)
    b_dout = tl.load(p_dout, mask=m_td, other=0.0).to(b_lse.dtype)
    b_along = tl.zeros([BT], dtype=b_lse.dtype)
    if a is not None:
        p_a = row_pointers(a, s_a_b, s_a_h, s_a_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
        b_attended = tl.load(p_a, mask=m_td, other=0.0)
        b_a = b_attended.to(b_lse.dtype)
        b_along = tl.sum(b_dout * b_a, 1)

    if PER_QUERY:
        i_a = adapters(adapter_ids, s_ids, s_ids_t, i_x, o_t, m_t, PER_QUERY)
    else:
        i_a = adapters(adapter_ids, s_ids, s_ids_t, i_b, o_t, m_t, PER_QUERY)
    m_a, m_prefix = i_a >= 0, is_prefix(prefix, s_prefix, i_a)
    o_first = first_key(i_a, i_h, H, SHARE, KEYS)
    b_m, b_l = normaliser(b_q, m_t, b_lse, weight, bias, o_first, m_a, KEYS, BK, D, BD)
    b_mu, b_rest, b_unit, m_shifted = masses(b_m, b_l, b_lse, m_a)
    # Of the masses and slopes that are summed first, those of a key are made again: they may be many.
    # [BT]
    b_mean = tl.zeros([BT], dtype=b_lse.dtype)
    b_less = tl.where(m_prefix, b_along, 0.0)
    for i_n in range(0, KEYS, BK):
        b_g = logits(b_q, m_t, weight, bias, o_first, m_a, i_n, KEYS, BK, D, BD)
        b_share = tl.where(m_shifted[:, None], mass(b_g, b_m, 1.0 / b_l), 0.0)
        b_slope = products(b_dout, m_t, shift, o_first, m_a, i_n, KEYS, BK, D, BD) - b_less[:, None]
        b_mean += tl.sum(tl.where(b_share == 0, 0.0, b_share * b_slope), 1)
    b_keys = tl.zeros([BT, BD], dtype=b_lse.dtype)  # sum_n p_n shift_n
    o_row = (i_x * H + i_h) * N + o_t
    for i_n in range(0, KEYS, BK):
        o_k = i_n + tl.arange(0, BK)
        b_g = logits(b_q, m_t, weight, bias, o_first, m_a, i_n, KEYS, BK, D, BD)
        b_p = tl.where(m_shifted[:, None], mass(b_g, b_m, b_unit), 0.0)
        b_slope = products(b_dout, m_t, shift, o_first, m_a, i_n, KEYS, BK, D, BD) - b_less[:, None]
        b_dg = b_p * ((b_slope - b_mean[:, None]) + (b_rest * b_mean)[:, None])
        b_dg = tl.where(b_p == 0, 0.0, b_dg)
        o_nk = o_row[:, None] * KEYS + o_k[None, :]
        m_nk = m_t[:, None] & (o_k < KEYS)[None, :]
        tl.store(dg + o_nk, b_dg, mask=m_nk)
        tl.store(masses_ + o_nk, b_p, mask=m_nk)
        if base is not None:
            b_keys = add_values(b_keys, b_p, shift, o_first, m_a, i_n, KEYS, BK, D, BD)

    b_total = tl.where(m_shifted, b_mu * b_rest * b_mean, 0.0)
    tl.store(total + o_row, b_total, mask=m_t)
    m_prefix = m_shifted & m_prefix
    if lift is not None:
        tl.store(lift + o_row, tl.where(m_prefix, -tl.log(b_rest), 0.0), mask=m_t)
    if delta is not None:
        b_delta = b_along
        if THROUGH_LSE:
            b_delta += tl.where(m_prefix, tl.where(m_shifted, b_mu * b_mean, 0.0), b_total)
        if dlse is not None:
            b_delta -= tl.load(dlse + o_row, mask=m_t, other=0.0)
        tl.store(delta + o_row, tl.where(b_lse == float("-inf"), 0.0, b_delta), mask=m_t)
    if base is not None:
        b_kept, b_scale = tl.where(m_prefix, b_rest, 1.0), tl.where(m_prefix, 1.0, b_rest)
        b_exact = b_kept[:, None] * b_a + b_scale[:, None] * b_keys
        b_base = rounded_for(b_dout, b_exact, o_d, D, base.dtype.element_ty)
        b_base = tl.where(m_shifted[:, None], b_base, b_attended)
        o_new = row_pointers(0, N * H.to(tl.int64) * D, D, H * D, i_x, i_h, o_t)[:, None] + o_d[None, :]
        tl.store(base + o_new, b_base, mask=m_td)


@triton.jit(do_not_specialize=["H", "T", "s_dg_b", "s_dg_h", "s_ids", "s_ids_t"])
def add_keys_grad_kernel(
    dq, dg, weight, adapter_ids,
    s_dq_b, s_dq_h, s_dq_t, s_dg_b, s_dg_h, s_dg_t, s_ids, s_ids_t,
    H, T,
    SHARE: tl.constexpr, KEYS: tl.constexpr, PER_QUERY: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_t = position(H, T, BT)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t = o_t < T
    m_td = m_t[:, None] & (o_d < D)[None, :]
    i_a = adapters(adapter_ids, s_ids, s_ids_t, i_b, o_t, m_t, PER_QUERY)
    o_first = first_key(i_a, i_h, H, SHARE, KEYS)
    p_dq = row_pointers(dq, s_dq_b, s_dq_h, s_dq_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    p_dg = row_pointers(dg, s_dg_b, s_dg_h, s_dg_t, i_b, i_h, o_t)[:, None]
    # [BT, BD]
    b_dq = tl.load(p_dq, mask=m_td, other=0.0).to(dg.dtype.element_ty)
    for i_n in range(0, KEYS, BK):
        o_k = i_n + tl.arange(0, BK)
        b_dg = tl.load(p_dg + o_k[None, :], mask=m_t[:, None] & (o_k < KEYS)[None, :], other=0.0)
        b_dq = add_values(b_dq, b_dg, weight, o_first, i_a >= 0, i_n, KEYS, BK, D, BD)
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_td)


def _tiling(x: Tensor, T: int, one_by_one: bool) -> tuple[int, int, int, int]:
    """BK, BT, BD, and warps for rows ``x [B, H, T, D]``."""
    BD, config = triton.next_power_of_2(x.shape[3]), launch_config("keys", T)
    BT, _ = config.tiling(T, max(BD, 16))
    # Of fp32 rows the products would have to be exact, which is as slow and takes more registers.
    products = not one_by_one and BT >= BLOCK and x.itemsize == 2
    return (BLOCK if products else 1), BT, max(BD, 16) if products else BD, config.num_warps


def launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, prefix, shifted) -> None:
    B, H, T, D = q.shape
    constants = key_constants(H, weight, adapter_ids, prefix)
    BK, BT, BD, num_warps = _tiling(q, T, constants[2])
    with torch.cuda.device_of(q):
        virtual_keys_fwd_kernel[(B * H * triton.cdiv(T, BT),)](
            out, lse, q, weight, bias, shift, adapter_ids, prefix, shifted,
            *strides(out), *lse.stride(), *strides(q), *id_strides(adapter_ids), _stride(prefix),
            *strides(shifted), H, T, *constants, BK, D, BT, BD,
            num_warps=num_warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def launch_bwd(
    dout, lse, q, weight, bias, shift, adapter_ids, prefix, a, *,
    dg, total, base=None, delta=None, lift=None, through_lse=True, dlse=None, cu_seqlens=None,
    max_seqlen=None,
) -> list[Tensor]:  # fmt: skip
    """Fill the given outputs; returns the gradients of the parameters."""
    B, H, N, D = q.shape
    T = N
    if cu_seqlens is not None:
        B, T = cu_seqlens.numel() - 1, max_seqlen
    # Rows beyond the sequences stay as they are, and those of none must not be summed.
    p = dg.new_empty(dg.shape)
    for x in (p, dg, total) if cu_seqlens is not None else ():
        x.zero_()
    if q.numel() > 0 and B * T > 0:
        constants = key_constants(H, weight, adapter_ids, prefix)
        # Key by key: products of tiles would hold both q and dout in registers twice, and spill.
        _, BT, BD, num_warps = _tiling(q, T, True)
        with torch.cuda.device_of(q):
            virtual_keys_bwd_kernel[(B * H * triton.cdiv(T, BT),)](
                dout, lse, q, weight, bias, shift, adapter_ids, prefix, a, dlse, cu_seqlens, dg, total, p,
                base, delta, lift, *strides(dout), *lse.stride(), *strides(q), *id_strides(adapter_ids),
                _stride(prefix), *strides(a), H, T, N, through_lse, *constants, 1, D, BT, BD,
                num_warps=num_warps, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
    return _parameter_grads(dg, p, q, dout, weight, adapter_ids, cu_seqlens)


def _parameter_grads(dg, p, q, dout, weight, adapter_ids, cu_seqlens) -> list[Tensor]:
    """``dweight``, ``dbias``, ``dshift`` as products of tall matrices, which torch has."""
    ids = adapter_ids
    if ids is not None and ids.dim() == 1 and cu_seqlens is not None:
        rows = torch.arange(q.shape[2], device=q.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
        beyond = sequence >= len(ids)
        ids = ids[sequence.clamp(max=len(ids) - 1)].masked_fill(beyond, -1)[None]
    # 0 times NaN: a query that is not shifted has no part in any sum.
    hidden = (p == 0).all(-1, keepdim=True)
    q, dout = (x.to(p.dtype).masked_fill(hidden, 0.0) for x in (q, dout))
    return [
        sum_per_adapter("bhtn,bhtd->bhnd", (dg, q), ids, weight),
        sum_per_adapter("bhtn->bhn", (dg,), ids, weight),
        sum_per_adapter("bhtn,bhtd->bhnd", (p, dout), ids, weight),
    ]


def launch_add_grad(dq: Tensor, dg: Tensor, weight: Tensor, adapter_ids: Tensor | None) -> None:
    B, H, T, D = dq.shape
    SHARE, _, per_query = key_constants(H, weight, adapter_ids, None)
    BK, BT, BD, num_warps = _tiling(dq, T, per_query)
    with torch.cuda.device_of(dq):
        add_keys_grad_kernel[(B * H * triton.cdiv(T, BT),)](
            dq, dg, weight, adapter_ids, *strides(dq), *dg.stride()[:3], *id_strides(adapter_ids),
            H, T, SHARE, weight.shape[2], per_query, BK, D, BT, BD,
            num_warps=num_warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def _stride(prefix: Tensor | None) -> int:
    return 0 if prefix is None else prefix.stride(0)
