"""Gradients of entries: sums of partial sums by adapter, and where tokens have entries those by token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import RowConfig, acc_type, entry_forms, entry_strides
from mmicl_kernels.ops._core.layout import accumulation_dtype
from mmicl_kernels.ops._core.rows import uses_of

# The sum of the partial sums: rows and columns of its tile.
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_WARPS = 128, 32, 4
# Of tokens: as a forward without norms. A program sums this many entries, if adapters have equally many.
TOKENS = RowConfig(num_warps=4, steps=1, columns=512)
PART_ENTRIES = 64


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
    PER_ROW: tl.constexpr,
    acc: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums the parts ``[N = B * NT, C]`` of one adapter in a block of columns; last comes ``weight_sums``.

    ``dscale_part [A, cdiv(C, BC)]`` holds the products with the vector in each block. Rows that do not use
    the adapter, and an adapter that no row uses, are not read: 0 times NaN is not 0. PER_ROW, adapter a is
    that of batch row a.
    """
    i_a, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    # [BN, BC]
    b_sum = tl.zeros([BN, BC], dtype=acc)
    # [BN]
    m_any = tl.zeros([BN], dtype=tl.int1)
    i_n = 0
    if PER_ROW:
        i_n = tl.where(i_a < A, i_a * NT, 0)
        N = tl.where(i_a < A, i_n + NT, N)
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


@triton.jit(do_not_specialize=["T", "K", "parts"])
def adapter_sums_kernel(
    dd,
    order,
    starts,
    strengths,
    sums,
    used,
    s_dd_b,
    s_dd_t,
    T,
    K,
    parts,
    C: tl.constexpr,
    acc: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Writes ``sums [A, parts, C]``, of each adapter those of its entries, and ``used [A]``.

    Entries are numbered as ``[B, T, K]``: ``order[starts[a]:starts[a + 1]]`` are those of adapter a.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_a = i_p // parts
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    i_first, i_last = tl.load(starts + i_a), tl.load(starts + i_a + 1)
    tl.store(used + i_a, tl.where(i_first < i_last, i_a, -1).to(tl.int32))
    size = tl.cdiv(i_last - i_first, parts)
    i_n = i_first + i_p % parts * size
    i_end = tl.minimum(i_n + size, i_last)
    # [BN, BC]
    b_sum = tl.zeros([BN, BC], dtype=acc)
    while i_n < i_end:
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < i_end
        i_e = tl.load(order + o_n, mask=m_n, other=0).to(tl.int32)  # 64-bit division is a call
        p_dd = dd + (i_e // K // T).to(tl.int64) * s_dd_b + (i_e // K % T).to(tl.int64) * s_dd_t
        b_dd = tl.load(p_dd[:, None] + o_c[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0).to(acc)
        if strengths is not None:
            b_dd *= tl.load(strengths + i_e, mask=m_n, other=0.0).to(acc)[:, None]
        b_sum += b_dd
        i_n += BN
    tl.store(sums + i_p * C + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit(do_not_specialize=["N", "T", "K"])
def entry_products_kernel(
    dd,
    vector,
    adapter_ids,
    products,
    s_dd_b,
    s_dd_t,
    s_id_b,
    s_id_t,
    s_id_k,
    N,
    T,
    K,
    C: tl.constexpr,
    acc: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Writes ``products [B, T, K]``, of N tokens: 0 where the id is -1."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_k = tl.program_id(1)
    m_n = o_n < N
    i_b, i_t = (o_n // T).to(tl.int64), (o_n % T).to(tl.int64)
    i_a = tl.load(adapter_ids + i_b * s_id_b + i_t * s_id_t + i_k * s_id_k, mask=m_n, other=-1).to(tl.int64)
    # [BN, BC]
    p_dd = (dd + i_b * s_dd_b + i_t * s_dd_t)[:, None]
    p_v = (vector + tl.maximum(i_a, 0) * C)[:, None]
    b_sum = tl.zeros([BN, BC], dtype=acc)
    for i_c in range(tl.cdiv(C, BC)):
        o_c = i_c * BC + tl.arange(0, BC)
        m_nc = (i_a >= 0)[:, None] & (o_c < C)[None, :]
        b_dd = tl.load(p_dd + o_c[None, :], mask=m_nc, other=0.0).to(acc)
        b_sum += b_dd * tl.load(p_v + o_c[None, :], mask=m_nc, other=0.0).to(acc)
    tl.store(products + o_n * K + i_k, tl.sum(b_sum, 1), mask=m_n)


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
    K, _, per_row = entry_forms(vector, adapter_ids)
    s_scale, s_id_b, _, s_id_k, s_strength_b, _, s_strength_k = entry_strides(scale, adapter_ids, strengths)
    dvector = None if sums is None else vector.new_empty(vector.shape)
    dscale = None if sums is None else sums.new_empty(A, blocks)
    dweight = None if weight_sums is None else norm_weight.new_empty(C)
    if C > 0:
        with torch.cuda.device_of(parts):
            entry_grads_kernel[(A + (weight_sums is not None), blocks)](
                sums, weight_sums, vector, scale, adapter_ids, strengths, dvector, dscale, dweight,
                s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k,
                A, B * NT, NT, K, C, per_row, acc_type(parts), REDUCE_ROWS, REDUCE_COLUMNS,
                num_warps=REDUCE_WARPS,
            )  # fmt: skip
    return dvector, None if dscale is None else dscale.sum(-1), dweight


def adapter_sums(dd: Tensor, adapter_ids: Tensor, strengths: Tensor | None, A: int) -> tuple[Tensor, Tensor]:
    (B, T, C), K = dd.shape, adapter_ids.shape[2]
    parts = 1 + B * T * K // (PART_ENTRIES * max(A, 1))
    sums = dd.new_empty(A, parts, C, dtype=accumulation_dtype(dd))
    used = adapter_ids.new_empty(A, 1)
    if sums.numel() > 0:
        order, starts = uses_of(adapter_ids.flatten().long(), A)
        BN, BC, _, num_warps = TOKENS.tiling(dd)
        with torch.cuda.device_of(dd):
            adapter_sums_kernel[(A * parts, triton.cdiv(C, BC))](
                dd, order, starts, strengths, sums, used, *dd.stride()[:2],
                T, K, parts, C, acc_type(dd), BN, BC, num_warps=num_warps,
            )  # fmt: skip
    return sums, used


def entry_products(dd: Tensor, vector: Tensor, adapter_ids: Tensor) -> Tensor:
    (B, T, C), K = dd.shape, adapter_ids.shape[2]
    products = dd.new_empty(B, T, K, dtype=accumulation_dtype(dd))
    if products.numel() > 0:
        BN, BC, _, num_warps = TOKENS.tiling(dd)
        with torch.cuda.device_of(dd):
            entry_products_kernel[(triton.cdiv(B * T, BN), K)](
                dd, vector, adapter_ids, products, *dd.stride()[:2], *adapter_ids.stride(),
                B * T, T, K, C, acc_type(dd), BN, BC, num_warps=num_warps,
            )  # fmt: skip
    return products
