"""The shift itself, forward and backward: a program owns rows of one batch row.

Whole rows where their norms are needed, else a block of columns. Entries of a batch row are loaded once.
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
from mmicl_kernels.ops.residual_shift.entries import per_token

# A forward walks along a few rows so that loading the vector stays a small part of its traffic, a backward
# so that writing its sums does.
CONFIGS = {
    "fwd": RowConfig(num_warps=4, steps=4, columns=512),
    "fwd_norm": RowConfig(num_warps=4, steps=4),
    "bwd": RowConfig(num_warps=4, steps=16, columns=512),
    "bwd_norm": RowConfig(num_warps=4, steps=16),
}
INTEGERS = [
    "T", "NT", "s_scale", "s_id_b", "s_id_t", "s_id_k", "s_strength_b", "s_strength_t", "s_strength_k",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def residual_shift_fwd_kernel(
    x,
    vector,
    scale,
    adapter_ids,
    strengths,
    out,
    s_x_b,
    s_x_t,
    s_out_b,
    s_out_t,
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
    PRESERVE: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    i_b, i_t, i_c = position(NT, tl.cdiv(C, BC))
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    if not PER_TOKEN:
        b_d, m_off = entry(
            vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k, i_b,
            o_c, m_c, C, K, PER_ROW, acc,
        )  # fmt: skip
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_tc = (o_t < T)[:, None] & m_c[None, :]
        if PER_TOKEN:
            b_d, m_off = token_entries(
                vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_t, s_id_k, s_strength_b,
                s_strength_t, s_strength_k, i_b, o_t, o_t < T, o_c, m_c, C, K, acc,
            )  # fmt: skip
        # [BT, BC]
        b_x = tl.load(row_pointers(x, s_x_b, s_x_t, i_b, o_t)[:, None] + o_c[None, :], mask=m_tc, other=0.0)
        b_y = b_x.to(acc) + b_d
        if PRESERVE:
            # [BT]
            b_xx = tl.sum(b_x.to(acc) * b_x.to(acc), 1)
            b_yy = tl.sum(b_y * b_y, 1)
            m_zero = (b_xx == 0) | (b_yy == 0)
            b_r = tl.sqrt(b_xx) / tl.sqrt(tl.where(m_zero, 1.0, b_yy))
            b_y = tl.where(m_zero[:, None], 0.0, b_y * b_r[:, None])
        b_out = tl.where(m_off, b_x, b_y.to(out.dtype.element_ty))
        tl.store(row_pointers(out, s_out_b, s_out_t, i_b, o_t)[:, None] + o_c[None, :], b_out, mask=m_tc)


@triton.jit(do_not_specialize=INTEGERS)
def residual_shift_bwd_kernel(
    dout,
    x,
    vector,
    scale,
    adapter_ids,
    strengths,
    dx,
    sums,
    s_dout_b,
    s_dout_t,
    s_x_b,
    s_x_t,
    s_dx_b,
    s_dx_t,
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
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    """Writes ``dx``, and into ``sums`` the gradient of what was added; if not None.

    Over NS * BT rows ``[B, NT, C]``; PER_TOKEN, where the norm is preserved, of each ``[B, T, C]``.
    """
    i_b, i_t, i_c = position(NT, tl.cdiv(C, BC))
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    if x is not None and not PER_TOKEN:
        b_d, m_off = entry(
            vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k, i_b,
            o_c, m_c, C, K, PER_ROW, acc,
        )  # fmt: skip
    # Summed over rows at the end alone: a sum across warps in every step would cost more than the step.
    # [BT, BC]
    b_sums = tl.zeros([BT, BC], dtype=acc)
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_tc = (o_t < T)[:, None] & m_c[None, :]
        if PER_TOKEN:
            b_d, m_off = token_entries(
                vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_t, s_id_k, s_strength_b,
                s_strength_t, s_strength_k, i_b, o_t, o_t < T, o_c, m_c, C, K, acc,
            )  # fmt: skip
        # [BT, BC]
        p_dout = row_pointers(dout, s_dout_b, s_dout_t, i_b, o_t)[:, None] + o_c[None, :]
        b_raw = tl.load(p_dout, mask=m_tc, other=0.0)
        b_dd = b_raw.to(acc)
        if x is not None:
            p_x = row_pointers(x, s_x_b, s_x_t, i_b, o_t)[:, None] + o_c[None, :]
            b_x = tl.load(p_x, mask=m_tc, other=0.0).to(acc)
            b_y = b_x + b_d
            # [BT]
            b_xx, b_yy, b_along = tl.sum(b_x * b_x, 1), tl.sum(b_y * b_y, 1), tl.sum(b_y * b_dd, 1)
            m_zero = (b_xx == 0) | (b_yy == 0)
            b_xx, b_yy = tl.where(m_zero, 1.0, b_xx), tl.where(m_zero, 1.0, b_yy)
            b_r = tl.sqrt(b_xx) / tl.sqrt(b_yy)
            # [BT, BC]
            b_dd = tl.where(m_zero[:, None], 0.0, b_r[:, None] * (b_dd - (b_along / b_yy)[:, None] * b_y))
            if dx is not None:
                b_dx = b_dd + tl.where(m_zero, 0.0, b_r * (b_along / b_xx))[:, None] * b_x
                b_dx = tl.where(m_off, b_raw, b_dx.to(dx.dtype.element_ty))
                p_dx = row_pointers(dx, s_dx_b, s_dx_t, i_b, o_t)[:, None] + o_c[None, :]
                tl.store(p_dx, b_dx, mask=m_tc)
        if PER_TOKEN and sums is not None:
            tl.store(row_pointers(sums, T * C, C, i_b, o_t)[:, None] + o_c[None, :], b_dd, mask=m_tc)
        b_sums += b_dd
    if sums is not None and not PER_TOKEN:
        tl.store(sums + (i_b * NT + i_t) * C + o_c, tl.sum(b_sums, 0), mask=m_c)


def residual_shift_fwd(
    x: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    preserve_norm: bool,
) -> Tensor:
    out = new_tokens(x)
    if x.numel() == 0:
        return out
    B, T, C = x.shape
    config = CONFIGS["fwd_norm" if preserve_norm else "fwd"]
    check_row(C, preserve_norm)
    BT, BC, NS, num_warps = config.tiling(x)
    NT = triton.cdiv(T, BT * NS)
    with torch.cuda.device_of(x):
        residual_shift_fwd_kernel[(B * NT * triton.cdiv(C, BC),)](
            x, vector, scale, adapter_ids, strengths, out,
            *x.stride()[:2], *out.stride()[:2], *entry_strides(scale, adapter_ids, strengths),
            T, NT, C, *entry_forms(vector, adapter_ids), preserve_norm, acc_type(x), BT, BC, NS,
            num_warps=num_warps,
        )  # fmt: skip
    return out


def residual_shift_bwd(
    dout: Tensor,
    x: Tensor | None,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    need_dx: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    B, T, C = dout.shape
    dx = new_tokens(x) if need_dx and x is not None else None
    check_row(C, x is not None)
    BT, BC, NS, num_warps = CONFIGS["bwd" if x is None else "bwd_norm"].tiling(dout)
    NT = triton.cdiv(T, BT * NS)
    parts = T if per_token(adapter_ids) else NT
    sums = vector.new_empty(B, parts, C, dtype=accumulation_dtype(dout)) if need_sums else None
    if dout.numel() > 0:
        with torch.cuda.device_of(dout):
            residual_shift_bwd_kernel[(B * NT * triton.cdiv(C, BC),)](
                dout, x, vector, scale, adapter_ids, strengths, dx, sums,
                *dout.stride()[:2], *token_strides(x), *token_strides(dx),
                *entry_strides(scale, adapter_ids, strengths),
                T, NT, C, *entry_forms(vector, adapter_ids), acc_type(dout), BT, BC, NS, num_warps=num_warps,
            )  # fmt: skip
    empty = dout.new_empty(0)
    return empty if dx is None else dx, empty if sums is None else sums
