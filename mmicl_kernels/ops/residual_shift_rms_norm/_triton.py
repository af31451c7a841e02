"""The fused norm in Triton: a program holds whole rows of one batch row, each read and written once.

The functions of :mod:`._torch` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import (
    RowConfig,
    acc_type,
    check_row,
    entry,
    entry_forms,
    entry_strides,
    position,
    row_pointers,
    token_entries,
    token_strides,
)
from mmicl_kernels.ops._core.layout import accumulation_dtype, new_tokens

# As in residual_shift: few parameters and sums beside the rows they belong to.
CONFIGS = {"fwd": RowConfig(num_warps=4, steps=2), "bwd": RowConfig(num_warps=4, steps=16)}


@triton.jit(
    do_not_specialize=[
        "T", "NT", "s_scale", "s_id_b", "s_id_t", "s_id_k", "s_strength_b", "s_strength_t", "s_strength_k",
    ]
)  # fmt: skip
def residual_shift_rms_norm_fwd_kernel(
    x,
    residual,
    vector,
    scale,
    norm_weight,
    adapter_ids,
    strengths,
    normed,
    new_residual,
    rstd,
    s_x_b,
    s_x_t,
    s_residual_b,
    s_residual_t,
    s_normed_b,
    s_normed_t,
    s_scale,
    s_id_b,
    s_id_t,
    s_id_k,
    s_strength_b,
    s_strength_t,
    s_strength_k,
    T,
    NT,
    C: tl.constexpr,
    K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PER_ROW: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    i_b, i_t, _ = position(NT, 1)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    if not PER_TOKEN:
        b_d, m_off = entry(
            vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k, i_b,
            o_c, m_c, C, K, PER_ROW, acc,
        )  # fmt: skip
    # [BC]
    b_weight = tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(acc) + OFFSET
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_t = o_t < T
        m_tc = m_t[:, None] & m_c[None, :]
        if PER_TOKEN:
            b_d, m_off = token_entries(
                vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_t, s_id_k, s_strength_b,
                s_strength_t, s_strength_k, i_b, o_t, m_t, o_c, m_c, C, K, acc,
            )  # fmt: skip
        # [BT, BC]
        p_x = row_pointers(x, s_x_b, s_x_t, i_b, o_t)[:, None] + o_c[None, :]
        p_residual = row_pointers(residual, s_residual_b, s_residual_t, i_b, o_t)[:, None] + o_c[None, :]
        b_x = tl.load(p_x, mask=m_tc, other=0.0).to(acc)
        b_h = tl.load(p_residual, mask=m_tc, other=0.0).to(acc) + b_x + b_d
        b_stored = b_h.to(new_residual.dtype.element_ty)
        o_new = row_pointers(0, s_normed_b, s_normed_t, i_b, o_t)[:, None] + o_c[None, :]
        tl.store(new_residual + o_new, b_stored, mask=m_tc)
        b_h = b_stored.to(acc)
        # [BT]
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_h * b_h, 1) / C + EPS)
        tl.store(rstd + i_b * T + o_t, b_rstd, mask=m_t)
        # [BT, BC]
        b_n = b_h * b_rstd[:, None]
        if OFFSET == 0:
            b_n = b_n.to(normed.dtype.element_ty).to(acc)
        b_n = b_n * b_weight[None, :]
        tl.store(normed + o_new, b_n.to(normed.dtype.element_ty), mask=m_tc)


@triton.jit(do_not_specialize=["T", "NT"])
def residual_shift_rms_norm_bwd_kernel(
    dnormed,
    dnew_residual,
    new_residual,
    rstd,
    norm_weight,
    dx,
    sums,
    weight_sums,
    s_dnormed_b,
    s_dnormed_t,
    s_dnew_b,
    s_dnew_t,
    s_new_b,
    s_new_t,
    s_dx_b,
    s_dx_t,
    s_rstd_b,
    s_rstd_t,
    T,
    NT,
    C: tl.constexpr,
    OFFSET: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    """Writes ``dx``, and sums over NS * BT rows ``[B, NT, C]``: the entry's gradient and the weight's."""
    i_b, i_t, _ = position(NT, 1)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    # [BC]
    b_weight = tl.load(norm_weight + o_c, mask=m_c, other=0.0).to(acc) + OFFSET
    # [BT, BC]
    b_sums = tl.zeros([BT, BC], dtype=acc)
    b_weight_sums = tl.zeros([BT, BC], dtype=acc)
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_t = o_t < T
        m_tc = m_t[:, None] & m_c[None, :]
        # [BT]
        b_rstd = tl.load(rstd + i_b * s_rstd_b + o_t * s_rstd_t, mask=m_t, other=0.0)
        # [BT, BC]
        p_dnormed = row_pointers(dnormed, s_dnormed_b, s_dnormed_t, i_b, o_t)[:, None] + o_c[None, :]
        p_new = row_pointers(new_residual, s_new_b, s_new_t, i_b, o_t)[:, None] + o_c[None, :]
        b_dy = tl.load(p_dnormed, mask=m_tc, other=0.0).to(acc)
        b_n = tl.load(p_new, mask=m_tc, other=0.0).to(acc) * b_rstd[:, None]
        if dnew_residual is not None:
            p_dnew = row_pointers(dnew_residual, s_dnew_b, s_dnew_t, i_b, o_t)[:, None] + o_c[None, :]
            b_dnew = tl.load(p_dnew, mask=m_tc, other=0.0)
        if weight_sums is not None:
            b_weight_sums += b_dy * b_n
        b_dn = b_dy * b_weight[None, :]
        b_mean = tl.sum(b_dn * b_n, 1) / C
        b_dh = b_rstd[:, None] * (b_dn - b_n * b_mean[:, None])
        if dnew_residual is not None:
            b_dh += b_dnew.to(acc)
        p_dx = row_pointers(dx, s_dx_b, s_dx_t, i_b, o_t)[:, None] + o_c[None, :]
        tl.store(p_dx, b_dh.to(dx.dtype.element_ty), mask=m_tc)
        if sums is not None:
            b_sums += b_dh
    o_n = (i_b * NT + i_t) * C + o_c
    if sums is not None:
        tl.store(sums + o_n, tl.sum(b_sums, 0), mask=m_c)
    if weight_sums is not None:
        tl.store(weight_sums + o_n, tl.sum(b_weight_sums, 0), mask=m_c)


def residual_shift_rms_norm_fwd(
    x: Tensor,
    residual: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    norm_weight: Tensor,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = x.shape
    normed, new_residual = new_tokens(x), new_tokens(x)
    rstd = x.new_empty(B, T, dtype=accumulation_dtype(x))
    check_row(C, True)
    if x.numel() == 0:
        return normed, new_residual, rstd
    BT, BC, NS, num_warps = CONFIGS["fwd"].tiling(x)
    NT = triton.cdiv(T, BT * NS)
    with torch.cuda.device_of(x):
        residual_shift_rms_norm_fwd_kernel[(B * NT,)](
            x, residual, vector, scale, norm_weight, adapter_ids, strengths, normed, new_residual, rstd,
            *token_strides(x), *token_strides(residual), *token_strides(normed),
            *entry_strides(scale, adapter_ids, strengths),
            T, NT, C, *entry_forms(vector, adapter_ids), eps, weight_offset, acc_type(x), BT, BC, NS,
            num_warps=num_warps,
        )  # fmt: skip
    return normed, new_residual, rstd


def residual_shift_rms_norm_bwd(
    dnormed: Tensor,
    dnew_residual: Tensor | None,
    new_residual: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    weight_offset: float,
    need_sums: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = new_residual.shape
    dx, empty = new_tokens(new_residual), rstd.new_empty(0)
    check_row(C, True)
    BT, BC, NS, num_warps = CONFIGS["bwd"].tiling(new_residual)
    NT = triton.cdiv(T, BT * NS)
    sums, weight_sums = (rstd.new_empty(B, NT, C) if need else None for need in (need_sums, need_dweight))
    if new_residual.numel() > 0:
        with torch.cuda.device_of(dx):
            residual_shift_rms_norm_bwd_kernel[(B * NT,)](
                dnormed, dnew_residual, new_residual, rstd, norm_weight, dx, sums, weight_sums,
                *token_strides(dnormed), *token_strides(dnew_residual), *token_strides(new_residual),
                *token_strides(dx), *rstd.stride(),
                T, NT, C, weight_offset, acc_type(dx), BT, BC, NS, num_warps=num_warps,
            )  # fmt: skip
    return dx, empty if sums is None else sums, empty if weight_sums is None else weight_sums
