"""The shift's backward: gradients of the gate and of the parameters, and what an attention backward takes."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import adapter, gate, is_shifted
from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops._core.virtual_keys import is_one_key
from mmicl_kernels.ops.attention_shift._triton import keys
from mmicl_kernels.ops.attention_shift._triton.rounding import rounded_for
from mmicl_kernels.ops.attention_shift._triton.tiles import (
    ids_stride,
    launch_config,
    position,
    row_pointers,
    strides,
)

# The sum of the partial sums: rows and columns of its tile.
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_WARPS = 32, 32, 4


@triton.jit(do_not_specialize=["H", "T", "N", "s_lse_b", "s_lse_h", "s_ids"])
def attention_shift_bwd_kernel(
    dout, lse, q, weight, bias, shift, adapter_ids, a, dlse, cu_seqlens, dg, dq, base, delta, dweight_part,
    dbias_part, dshift_part,
    s_dout_b, s_dout_h, s_dout_t, s_lse_b, s_lse_h, s_lse_t, s_q_b, s_q_h, s_q_t, s_ids, s_a_b, s_a_h, s_a_t,
    H, T, N,
    D: tl.constexpr, THROUGH_LSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Writes ``dg`` and ``delta [B, H, N]``, ``dq`` and ``base`` in new storage, the sums over NS * BT rows.

    ``delta = dout . a - dlse``, and with THROUGH_LSE ``+ dg``, which ``dout . base`` always has. T: rows of
    the longest sequence, N: of the storage; they differ where ``cu_seqlens`` packs sequences.
    """
    i_b, i_h, i_t = position(H, T, NS * BT)
    i_x, row, n_t = i_b, i_b * 0, T
    if cu_seqlens is not None:
        i_x, row = i_b * 0, tl.load(cu_seqlens + i_b).to(tl.int64)
        n_t = tl.load(cu_seqlens + i_b + 1) - row
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    i_a = adapter(adapter_ids, s_ids, i_b)
    i_ah = tl.maximum(i_a, 0) * H + i_h
    # [BD]
    b_weight = tl.load(weight + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    b_shift = tl.load(shift + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    b_bias = tl.load(bias + i_ah, mask=i_a >= 0, other=0.0)

    # Summed over rows at the end alone: a sum across warps in every step would cost more than the step.
    # [BT]
    b_dbias = tl.zeros([BT], dtype=b_bias.dtype)
    # [BT, BD]
    b_dweight = tl.zeros([BT, BD], dtype=b_bias.dtype)
    b_dshift = tl.zeros([BT, BD], dtype=b_bias.dtype)
    for i_s in range(NS):
        o_t = (i_t * NS + i_s) * BT + tl.arange(0, BT)
        m_t = o_t < n_t
        o_t = row + o_t
        m_td = m_t[:, None] & m_d[None, :]
        p_q = row_pointers(q, s_q_b, s_q_h, s_q_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
        p_dout = row_pointers(dout, s_dout_b, s_dout_h, s_dout_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
        # [BT]
        b_lse = tl.load(row_pointers(lse, s_lse_b, s_lse_h, s_lse_t, i_x, i_h, o_t), mask=m_t, other=0.0)
        # [BT, BD]
        b_q = tl.load(p_q, mask=m_td, other=0.0).to(b_lse.dtype)
        b_dout = tl.load(p_dout, mask=m_td, other=0.0).to(b_lse.dtype)

        if a is not None:  # before the first store, which no later load may overtake
            p_attended = row_pointers(a, s_a_b, s_a_h, s_a_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
            b_attended = tl.load(p_attended, mask=m_td, other=0.0)

        # [BT]
        b_mu, b_dmu = gate(tl.sum(b_q * b_weight[None, :], 1) + b_bias, b_lse, i_a)
        b_dg = b_dmu * tl.sum(b_dout * b_shift[None, :], 1)
        tl.store(dg + (i_x * H + i_h) * N + o_t, b_dg, mask=m_t)
        b_dbias += b_dg
        # [BT, BD]
        b_dweight += b_dg[:, None] * b_q
        b_dshift += b_mu[:, None] * b_dout
        o_new = row_pointers(0, N * H.to(tl.int64) * D, D, H * D, i_x, i_h, o_t)[:, None] + o_d[None, :]
        if dq is not None:
            b_dq = b_dg[:, None] * b_weight[None, :]
            tl.store(dq + o_new, b_dq.to(dq.dtype.element_ty), mask=m_td)
        if delta is not None:
            b_delta = tl.sum(b_dout * b_attended.to(b_lse.dtype), 1)
            if THROUGH_LSE:
                b_delta += b_dg
            if dlse is not None:
                b_delta -= tl.load(dlse + (i_x * H + i_h) * N + o_t, mask=m_t, other=0.0)
            b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
            tl.store(delta + (i_x * H + i_h) * N + o_t, b_delta, mask=m_t)
        if base is not None:
            b_exact = b_attended.to(b_lse.dtype) + b_dmu[:, None] * b_shift[None, :]
            b_base = rounded_for(b_dout, b_exact, o_d, D, base.dtype.element_ty)
            b_base = tl.where(is_shifted(b_lse, i_a)[:, None], b_base, b_attended)
            tl.store(base + o_new, b_base, mask=m_td)

    i_n = (i_b * tl.cdiv(T, NS * BT) + i_t) * H + i_h
    tl.store(dweight_part + i_n * D + o_d, tl.sum(b_dweight, 0), mask=m_d)
    tl.store(dshift_part + i_n * D + o_d, tl.sum(b_dshift, 0), mask=m_d)
    tl.store(dbias_part + i_n, tl.sum(b_dbias, 0))


@triton.jit(do_not_specialize=["H", "N", "NT", "s_ids"])
def attention_shift_reduce_kernel(
    dweight_part, dbias_part, dshift_part, adapter_ids, dweight, dbias, dshift,
    s_ids,
    H, N, NT,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums the parts ``[N = B * NT, H, ...]`` that belong to one adapter, head and block of columns."""
    i_a, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_d = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BN]
    b_dbias = tl.zeros([BN], dtype=dbias.dtype.element_ty)
    # [BN, BD]
    b_dweight = tl.zeros([BN, BD], dtype=dbias.dtype.element_ty)
    b_dshift = tl.zeros([BN, BD], dtype=dbias.dtype.element_ty)
    i_n = 0
    while i_n < N:  # the interpreter cannot take N as the bound of a range under numpy 2.4
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        if adapter_ids is not None:
            m_n &= tl.load(adapter_ids + (o_n // NT).to(tl.int64) * s_ids, mask=m_n, other=-1) == i_a
        o_nh = o_n.to(tl.int64) * H + i_h
        m_nd = m_n[:, None] & m_d[None, :]
        b_dbias += tl.load(dbias_part + o_nh, mask=m_n, other=0.0)
        o_nd = o_nh[:, None] * D + o_d[None, :]
        b_dweight += tl.load(dweight_part + o_nd, mask=m_nd, other=0.0)
        b_dshift += tl.load(dshift_part + o_nd, mask=m_nd, other=0.0)
        i_n += BN

    i_ah = tl.program_id(0).to(tl.int64)
    tl.store(dweight + i_ah * D + o_d, tl.sum(b_dweight, 0), mask=m_d)
    tl.store(dshift + i_ah * D + o_d, tl.sum(b_dshift, 0), mask=m_d)
    tl.store(dbias + i_ah, tl.sum(b_dbias, 0), mask=i_d == 0)


@triton.jit(do_not_specialize=["H", "T", "s_dg_b", "s_dg_h", "s_ids"])
def add_gate_grad_kernel(
    dq, dg, weight, adapter_ids,
    s_dq_b, s_dq_h, s_dq_t, s_dg_b, s_dg_h, s_dg_t, s_ids,
    H, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_t = position(H, T, BT)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    m_td = m_t[:, None] & m_d[None, :]
    i_a = adapter(adapter_ids, s_ids, i_b)
    i_ah = tl.maximum(i_a, 0) * H + i_h
    p_dq = row_pointers(dq, s_dq_b, s_dq_h, s_dq_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    # [BT]
    b_dg = tl.load(row_pointers(dg, s_dg_b, s_dg_h, s_dg_t, i_b, i_h, o_t), mask=m_t, other=0.0)
    # [BD]
    b_weight = tl.load(weight + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    # [BT, BD]
    b_dq = tl.load(p_dq, mask=m_td, other=0.0).to(b_dg.dtype) + b_dg[:, None] * b_weight[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_td)


def attention_shift_bwd(
    dout: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: Tensor | None,
    a: Tensor | None,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = lse.new_empty(*lse.shape, weight.shape[2])
    base = new_heads(q) if a is not None else None
    total = dq = lift = None
    parameters = weight, bias, shift
    if is_one_key(q.shape[1], weight, adapter_ids, prefix):
        dq = new_heads(q) if need_dq else None
        grads = _launch_bwd(dout, lse, q, parameters, adapter_ids, a, dg=dg, dq=dq, base=base)
    else:
        total = lse.new_empty(lse.shape)
        lift = None if prefix is None else lse.new_empty(lse.shape)
        given = dout, lse, q, *parameters, adapter_ids, prefix, a
        grads = keys.launch_bwd(*given, dg=dg, total=total, base=base, lift=lift)
        if need_dq:
            dq = new_heads(q).zero_()
            add_gate_grad_(dq, dg, weight, adapter_ids)
    return dg, _or_empty(total, lse), _or_empty(dq, q), _or_empty(base, q), _or_empty(lift, lse), *grads


class Deltas(NamedTuple):
    """What an attention backward takes: ``dg [B, H, N, keys]``, ``total``, ``delta``, ``lift`` or None."""

    dg: Tensor
    total: Tensor
    delta: Tensor
    lift: Tensor | None


def attention_delta(
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: Tensor | None,
    a: Tensor,
    through_lse: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Deltas, list[Tensor]]:
    """:class:`Deltas` with ``delta = dout . a - dlse`` (with ``through_lse`` that of ``base``), and the
    gradients of the parameters.

    ``adapter_ids`` are those of sequences where ``cu_seqlens`` packs them, or of queries.
    """
    dg, delta = lse.new_empty(*lse.shape, weight.shape[2]), lse.new_empty(lse.shape)
    parameters = weight, bias, shift
    options = {
        "delta": delta, "through_lse": through_lse, "dlse": None if dlse is None else dlse.contiguous(),
        "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
    }  # fmt: skip
    if is_one_key(q.shape[1], weight, adapter_ids, prefix):
        grads = _launch_bwd(dout, lse, q, parameters, adapter_ids, a, dg=dg, **options)
        return Deltas(dg, dg[..., 0], delta, None), grads
    total, lift = lse.new_empty(lse.shape), None if prefix is None else lse.new_empty(lse.shape)
    given = dout, lse, q, *parameters, adapter_ids, prefix, a
    grads = keys.launch_bwd(*given, dg=dg, total=total, lift=lift, **options)
    return Deltas(dg, total, delta, lift), grads


def _launch_bwd(
    dout, lse, q, parameters, adapter_ids, a, *,
    dg, dq=None, base=None, delta=None, through_lse=True, dlse=None, cu_seqlens=None, max_seqlen=None,
) -> list[Tensor]:  # fmt: skip
    """Fill the given outputs; returns the gradients of the parameters."""
    B, H, N, D = q.shape
    T = N
    if cu_seqlens is not None:
        B, T = cu_seqlens.numel() - 1, max_seqlen
    if q.numel() == 0 or B * T == 0:
        dg.zero_()
        return [torch.zeros_like(x) for x in parameters]

    BD, config = triton.next_power_of_2(D), launch_config("bwd", T)
    BT, NS = config.tiling(T, BD)
    NT = triton.cdiv(T, NS * BT)
    parts = [x.new_empty(B * NT, *x.shape[1:]) for x in parameters]
    with torch.cuda.device_of(q):
        attention_shift_bwd_kernel[(B * H * NT,)](
            dout, lse, q, *parameters, adapter_ids, a, dlse, cu_seqlens, dg, dq, base, delta, *parts,
            *strides(dout), *lse.stride(), *strides(q), ids_stride(adapter_ids), *strides(a),
            H, T, N, D, through_lse, BT, BD, NS, num_warps=config.num_warps,
        )  # fmt: skip
        return _launch_reduce(parts, adapter_ids, parameters[0].shape[0], NT)


def _launch_reduce(parts: list[Tensor], adapter_ids: Tensor | None, A: int, NT: int) -> list[Tensor]:
    N, H, _, D = parts[0].shape
    grads = [x.new_empty(A, *x.shape[1:]) for x in parts]
    if A == 0:
        return grads
    attention_shift_reduce_kernel[(A * H, triton.cdiv(D, REDUCE_COLUMNS))](
        *parts, adapter_ids, *grads, ids_stride(adapter_ids), H, N, NT, D, REDUCE_ROWS, REDUCE_COLUMNS,
        num_warps=REDUCE_WARPS,
    )  # fmt: skip
    return grads


def add_gate_grad_(dq: Tensor, dg: Tensor, weight: Tensor, adapter_ids: Tensor | None) -> None:
    if dq.numel() == 0:
        return
    B, H, T, D = dq.shape
    if not is_one_key(H, weight, adapter_ids, None):
        return keys.launch_add_grad(dq, dg, weight, adapter_ids)
    BD, config = triton.next_power_of_2(D), launch_config("fwd", T)
    BT, _ = config.tiling(T, BD)
    with torch.cuda.device_of(dq):
        add_gate_grad_kernel[(B * H * triton.cdiv(T, BT),)](
            dq, dg, weight, adapter_ids,
            *strides(dq), *dg.stride()[:3], ids_stride(adapter_ids),
            H, T, D, BT, BD, num_warps=config.num_warps,
        )  # fmt: skip


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x
