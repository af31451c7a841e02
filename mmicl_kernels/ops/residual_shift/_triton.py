"""The residual shift in Triton: one read of every operand per pass, deterministic gradients.

The functions of :mod:`._torch` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``).
``[B, T, C]`` operands have any strides with a contiguous last dimension. A program owns rows of one batch
row: whole rows where their norms are needed, else a block of columns; its vector is loaded once.
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
    entry_strides,
    position,
    row_pointers,
    token_strides,
)
from mmicl_kernels.ops._core.layout import accumulation_dtype, new_tokens

# A forward walks along a few rows so that loading the vector stays a small part of its traffic, a backward
# so that writing its sums does.
CONFIGS = {
    "fwd": RowConfig(num_warps=4, steps=4, columns=512),
    "fwd_norm": RowConfig(num_warps=4, steps=4),
    "bwd": RowConfig(num_warps=4, steps=16, columns=512),
    "bwd_norm": RowConfig(num_warps=4, steps=16),
}
# The sum of the partial sums: rows and columns of its tile.
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_WARPS = 128, 32, 4


@triton.jit(do_not_specialize=["T", "NT", "s_scale", "s_id_b", "s_id_k", "s_strength_b", "s_strength_k"])
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
    s_id_k,
    s_strength_b,
    s_strength_k,
    T,
    NT,
    C: tl.constexpr,
    K: tl.constexpr,
    PRESERVE: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    i_b, i_t, i_c = position(NT, tl.cdiv(C, BC))
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    # [BC]
    b_d, n_on = entry(
        vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k, i_b, o_c,
        m_c, C, K, acc,
    )  # fmt: skip
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_tc = (o_t < T)[:, None] & m_c[None, :]
        # [BT, BC]
        b_x = tl.load(row_pointers(x, s_x_b, s_x_t, i_b, o_t)[:, None] + o_c[None, :], mask=m_tc, other=0.0)
        b_y = b_x.to(acc) + b_d[None, :]
        if PRESERVE:
            # [BT]
            b_xx = tl.sum(b_x.to(acc) * b_x.to(acc), 1)
            b_yy = tl.sum(b_y * b_y, 1)
            m_zero = (b_xx == 0) | (b_yy == 0)
            b_r = tl.sqrt(b_xx) / tl.sqrt(tl.where(m_zero, 1.0, b_yy))
            b_y = tl.where(m_zero[:, None], 0.0, b_y * b_r[:, None])
        b_out = tl.where(n_on == 0, b_x, b_y.to(out.dtype.element_ty))
        tl.store(row_pointers(out, s_out_b, s_out_t, i_b, o_t)[:, None] + o_c[None, :], b_out, mask=m_tc)


@triton.jit(do_not_specialize=["T", "NT", "s_scale", "s_id_b", "s_id_k", "s_strength_b", "s_strength_k"])
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
    s_id_k,
    s_strength_b,
    s_strength_k,
    T,
    NT,
    C: tl.constexpr,
    K: tl.constexpr,
    acc: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    NS: tl.constexpr,
):
    """Writes ``dx``, and into ``sums [B, NT, C]`` the entry's gradient over NS * BT rows; if not None."""
    i_b, i_t, i_c = position(NT, tl.cdiv(C, BC))
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    if x is not None:
        # [BC]
        b_d, n_on = entry(
            vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k, i_b,
            o_c, m_c, C, K, acc,
        )  # fmt: skip
    # Summed over rows at the end alone: a sum across warps in every step would cost more than the step.
    # [BT, BC]
    b_sums = tl.zeros([BT, BC], dtype=acc)
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_tc = (o_t < T)[:, None] & m_c[None, :]
        # [BT, BC]
        p_dout = row_pointers(dout, s_dout_b, s_dout_t, i_b, o_t)[:, None] + o_c[None, :]
        b_raw = tl.load(p_dout, mask=m_tc, other=0.0)
        b_dd = b_raw.to(acc)
        if x is not None:
            p_x = row_pointers(x, s_x_b, s_x_t, i_b, o_t)[:, None] + o_c[None, :]
            b_x = tl.load(p_x, mask=m_tc, other=0.0).to(acc)
            b_y = b_x + b_d[None, :]
            # [BT]
            b_xx, b_yy, b_along = tl.sum(b_x * b_x, 1), tl.sum(b_y * b_y, 1), tl.sum(b_y * b_dd, 1)
            m_zero = (b_xx == 0) | (b_yy == 0)
            b_xx, b_yy = tl.where(m_zero, 1.0, b_xx), tl.where(m_zero, 1.0, b_yy)
            b_r = tl.sqrt(b_xx) / tl.sqrt(b_yy)
            # [BT, BC]
            b_dd = tl.where(m_zero[:, None], 0.0, b_r[:, None] * (b_dd - (b_along / b_yy)[:, None] * b_y))
            if dx is not None:
                b_dx = b_dd + tl.where(m_zero, 0.0, b_r * (b_along / b_xx))[:, None] * b_x
                b_dx = tl.where(n_on == 0, b_raw, b_dx.to(dx.dtype.element_ty))
                p_dx = row_pointers(dx, s_dx_b, s_dx_t, i_b, o_t)[:, None] + o_c[None, :]
                tl.store(p_dx, b_dx, mask=m_tc)
        b_sums += b_dd
    if sums is not None:
        tl.store(sums + (i_b * NT + i_t) * C + o_c, tl.sum(b_sums, 0), mask=m_c)


@triton.jit(
    do_not_specialize=["A", "N", "NT", "K", "s_scale", "s_id_b", "s_id_k", "s_strength_b", "s_strength_k"]
)
def entry_grads_kernel(
    sums,
    weight_sums,
    vector,
    scale,
    adapter_ids,
    strengths,
    dvector,
    dscale_part,
    dweight,
    s_scale,
    s_id_b,
    s_id_k,
    s_strength_b,
    s_strength_k,
    A,
    N,
    NT,
    K,
    C: tl.constexpr,
    acc: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums the parts ``[N = B * NT, C]`` of one adapter in a block of columns; last comes ``weight_sums``.

    ``dscale_part [A, cdiv(C, BC)]`` holds the products with the vector in each block. Rows that do not use
    the adapter, and an adapter that no row uses, are not read: 0 times NaN is not 0.
    """
    i_a, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    # [BN, BC]
    b_sum = tl.zeros([BN, BC], dtype=acc)
    # [BN]
    m_any = tl.zeros([BN], dtype=tl.int1)
    i_n = 0
    while i_n < N:  # the interpreter cannot take N as the bound of a range under numpy 2.4
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        m_nc = m_n[:, None] & m_c[None, :]
        o_nc = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
        if i_a == A:
            if weight_sums is not None:
                b_sum += tl.load(weight_sums + o_nc, mask=m_nc, other=0.0)
        else:
            # [BN]
            m_used = m_n
            b_weight = tl.full([BN], 1.0, dtype=acc)
            if adapter_ids is not None:
                o_b = (o_n // NT).to(tl.int64)
                m_used = tl.zeros([BN], dtype=tl.int1)
                b_weight = tl.zeros([BN], dtype=acc)
                i_k = 0
                while i_k < K:
                    b_id = tl.load(adapter_ids + o_b * s_id_b + i_k * s_id_k, mask=m_n, other=-1)
                    b_s = tl.full([BN], 1.0, dtype=acc)
                    if strengths is not None:
                        p_s = strengths + o_b * s_strength_b + i_k * s_strength_k
                        b_s = tl.load(p_s, mask=m_n, other=0.0).to(acc)
                    b_weight += tl.where(b_id == i_a, b_s, 0.0)
                    m_used = m_used | (b_id == i_a)
                    i_k += 1
            m_any = m_any | m_used
            # [BN, BC]
            m_nc = m_nc & m_used[:, None]
            b_sum += b_weight[:, None] * tl.load(sums + o_nc, mask=m_nc, other=0.0)
        i_n += BN

    # [BC]
    b_total = tl.sum(b_sum, 0)
    if i_a == A:
        if weight_sums is not None:
            tl.store(dweight + o_c, b_total.to(dweight.dtype.element_ty), mask=m_c)
    else:
        m_a = tl.max(m_any.to(tl.int32), 0) > 0
        b_v = tl.load(vector + i_a * C + o_c, mask=m_c & m_a, other=0.0).to(acc)
        tl.store(dscale_part + i_a * tl.cdiv(C, BC) + i_c, tl.sum(tl.where(m_c, b_total * b_v, 0.0), 0))
        if scale is not None:
            b_total *= tl.load(scale + i_a * s_scale, mask=m_a, other=0.0).to(acc)
        tl.store(dvector + i_a * C + o_c, b_total.to(dvector.dtype.element_ty), mask=m_c)


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
            T, NT, C, num_entries(adapter_ids), preserve_norm, acc_type(x), BT, BC, NS, num_warps=num_warps,
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
    sums = vector.new_empty(B, NT, C, dtype=accumulation_dtype(dout)) if need_sums else None
    if dout.numel() > 0:
        with torch.cuda.device_of(dout):
            residual_shift_bwd_kernel[(B * NT * triton.cdiv(C, BC),)](
                dout, x, vector, scale, adapter_ids, strengths, dx, sums,
                *dout.stride()[:2], *token_strides(x), *token_strides(dx),
                *entry_strides(scale, adapter_ids, strengths),
                T, NT, C, num_entries(adapter_ids), acc_type(dout), BT, BC, NS, num_warps=num_warps,
            )  # fmt: skip
    empty = dout.new_empty(0)
    return empty if dx is None else dx, empty if sums is None else sums


def entry_grads(
    sums: Tensor | None,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
    weight_sums: Tensor | None = None,
    norm_weight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dvector [A, C]`` and ``dscale [A]`` from ``sums [B, N, C]``, the norm's dweight from ``weight_sums``.

    One launch, and one more for ``dscale`` where C has several blocks. Gradients come in the dtypes of
    ``vector`` and ``norm_weight``, ``dscale`` in that of the sums.
    """
    parts = weight_sums if sums is None else sums
    if parts is None:
        return None, None, None
    A = 0 if sums is None else vector.shape[0]
    B, NT, C = parts.shape
    blocks = triton.cdiv(C, REDUCE_COLUMNS)
    dvector = None if sums is None else vector.new_empty(vector.shape)
    dscale = None if sums is None else sums.new_empty(A, blocks)
    dweight = None if weight_sums is None else norm_weight.new_empty(C)
    if C > 0:
        with torch.cuda.device_of(parts):
            entry_grads_kernel[(A + (weight_sums is not None), blocks)](
                sums, weight_sums, vector, scale, adapter_ids, strengths, dvector, dscale, dweight,
                *entry_strides(scale, adapter_ids, strengths),
                A, B * NT, NT, num_entries(adapter_ids), C, acc_type(parts), REDUCE_ROWS, REDUCE_COLUMNS,
                num_warps=REDUCE_WARPS,
            )  # fmt: skip
    return dvector, None if dscale is None else dscale.sum(-1), dweight


def num_entries(adapter_ids: Tensor | None) -> int:
    return 1 if adapter_ids is None else adapter_ids.shape[1]
