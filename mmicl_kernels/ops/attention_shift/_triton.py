"""The shift in Triton: one read of every operand per pass, deterministic parameter gradients.

The four functions of :mod:`._composed` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``).
``[B, H, T, D]`` operands have any strides with a contiguous last dimension; new ones are stored so that
``transpose(1, 2)`` is contiguous. A program owns rows of one head of one batch row; neighbouring
programs own neighbouring heads, which lie side by side in that storage.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops.attention_shift._composed import CARRYING_COLUMNS, new_output


@dataclass(frozen=True)
class LaunchConfig:
    """``elements`` of a tile ``[BT, BD]``, warps of a program, tiles that one program walks along."""

    elements: int
    num_warps: int
    steps: int = 1

    def tiling(self, T: int, BD: int) -> tuple[int, int]:
        """BT and the number of steps, no more than T rows need; powers of two, so that few compile."""
        BT = min(max(1, self.elements // BD), triton.next_power_of_2(T))
        return BT, min(self.steps, triton.next_power_of_2(triton.cdiv(T, BT)))


# In the forward's tile each thread of four warps has two 16-byte loads per bf16 operand, in the
# backward's one: it holds three operands and two sums. It walks along its rows so that the partial sums
# it writes stay near 1 % of its traffic. One row per head (decode) needs one warp.
CONFIGS = {
    ("fwd", "long"): LaunchConfig(elements=2048, num_warps=4),
    ("fwd", "short"): LaunchConfig(elements=256, num_warps=1),
    ("bwd", "long"): LaunchConfig(elements=1024, num_warps=4, steps=16),
    ("bwd", "short"): LaunchConfig(elements=256, num_warps=1),
}
SHORT = 2  # queries: decode, with or without a speculated token

CARRYING = tl.constexpr(CARRYING_COLUMNS)

# The sum of the partial sums: rows and columns of its tile.
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_WARPS = 32, 32, 4


def launch_config(kernel: str, T: int) -> LaunchConfig:
    """The launch of ``kernel`` ("fwd" or "bwd") for T queries."""
    return CONFIGS[kernel, "short" if T <= SHORT else "long"]


@triton.jit
def _position(H, T, CT: tl.constexpr):
    """The batch row, head (both int64: they multiply strides) and chunk of CT rows of this program."""
    i_p = tl.program_id(0)
    NT = tl.cdiv(T, CT)
    i_b, i_t = i_p // H // NT, i_p // H % NT
    return i_b.to(tl.int64), (i_p % H).to(tl.int64), i_t


@triton.jit
def _rows(x, s_b, s_h, s_t, i_b, i_h, o_t):
    """Pointers to the first element of the rows ``o_t``; int64, because T * s_t may pass 2^31."""
    return x + i_b * s_b + i_h * s_h + o_t.to(tl.int64) * s_t


@triton.jit
def adapter(adapter_ids, s_ids, i_b):
    """The row of the stacked parameters, -1 for none."""
    i_a = i_b * 0
    if adapter_ids is not None:
        i_a = tl.load(adapter_ids + i_b * s_ids).to(tl.int64)
    return i_a


@triton.jit
def is_shifted(b_lse, i_a):
    """Whether queries are: not where lse is infinite or there is no adapter."""
    return (tl.abs(b_lse) != float("inf")) & (i_a >= 0)


@triton.jit
def gate(b_logit, b_lse, i_a):
    """``mu = sigmoid(logit - lse)`` and ``mu (1 - mu)``: 0 where nothing is shifted.

    exp(-|x|) cannot overflow, and from it 1 - mu comes without cancellation.
    """
    b_x = b_logit - b_lse
    b_z = tl.exp(-tl.abs(b_x))
    b_r = 1.0 / (1.0 + b_z)
    m_active = is_shifted(b_lse, i_a)
    b_mu = tl.where(m_active, tl.where(b_x >= 0, b_r, b_z * b_r), 0.0)
    return b_mu, tl.where(m_active, b_z * b_r * b_r, 0.0)


@triton.jit
def rounded_for(b_dout, b_exact, o_d, D: tl.constexpr, dtype: tl.constexpr):
    """``b_exact [BT, BD]`` in ``dtype`` with the product of every row with ``b_dout`` kept.

    The columns in which ``b_dout`` is largest take up what rounding took from it.
    """
    b_base = b_exact.to(dtype)
    if b_exact.dtype != dtype:
        b_wide = b_base.to(b_exact.dtype)
        # [BT]
        b_left = tl.sum(b_dout * (b_exact - b_wide), 1)
        # [BT, BD]
        b_size = tl.where((o_d < D)[None, :], tl.abs(b_dout), -1.0)
        b_rest = b_size
        for _ in range(min(CARRYING, D)):
            m_column = o_d[None, :] == tl.argmax(b_rest, 1)[:, None]
            b_rest = tl.where(m_column, -1.0, b_rest)
            b_left += tl.sum(tl.where(m_column, b_dout * b_wide, 0.0), 1)
        for _ in range(min(CARRYING, D)):
            m_column = o_d[None, :] == tl.argmax(b_size, 1)[:, None]
            b_size = tl.where(m_column, -1.0, b_size)
            b_weight = tl.sum(tl.where(m_column, b_dout, 0.0), 1)
            b_own = (b_left / tl.where(b_weight == 0, 1.0, b_weight)).to(dtype)
            b_left -= b_weight * b_own.to(b_exact.dtype)
            b_base = tl.where(m_column & (b_weight != 0)[:, None], b_own[:, None], b_base)
    return b_base


@triton.jit(do_not_specialize=["H", "T", "s_lse_b", "s_lse_h", "s_ids"])
def attention_shift_fwd_kernel(
    out,
    lse,
    q,
    weight,
    bias,
    shift,
    adapter_ids,
    shifted,
    s_out_b,
    s_out_h,
    s_out_t,
    s_lse_b,
    s_lse_h,
    s_lse_t,
    s_q_b,
    s_q_h,
    s_q_t,
    s_ids,
    s_shifted_b,
    s_shifted_h,
    s_shifted_t,
    H,
    T,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_b, i_h, i_t = _position(H, T, BT)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    m_td = m_t[:, None] & m_d[None, :]
    p_q = _rows(q, s_q_b, s_q_h, s_q_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    p_out = _rows(out, s_out_b, s_out_h, s_out_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    p_shifted = _rows(shifted, s_shifted_b, s_shifted_h, s_shifted_t, i_b, i_h, o_t)
    # [BT]
    b_lse = tl.load(_rows(lse, s_lse_b, s_lse_h, s_lse_t, i_b, i_h, o_t), mask=m_t, other=0.0)
    # [BT, BD]
    b_q = tl.load(p_q, mask=m_td, other=0.0).to(b_lse.dtype)
    b_out = tl.load(p_out, mask=m_td, other=0.0)

    i_a = adapter(adapter_ids, s_ids, i_b)
    i_ah = tl.maximum(i_a, 0) * H + i_h
    # [BD]
    b_weight = tl.load(weight + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    b_shift = tl.load(shift + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    b_bias = tl.load(bias + i_ah, mask=i_a >= 0, other=0.0)
    # [BT]
    b_mu, _ = gate(tl.sum(b_q * b_weight[None, :], 1) + b_bias, b_lse, i_a)
    # [BT, BD]
    b_shifted = (b_out.to(b_lse.dtype) + b_mu[:, None] * b_shift[None, :]).to(shifted.dtype.element_ty)
    b_shifted = tl.where(is_shifted(b_lse, i_a)[:, None], b_shifted, b_out)
    tl.store(p_shifted[:, None] + o_d[None, :], b_shifted, mask=m_td)


@triton.jit(do_not_specialize=["H", "T", "N", "s_lse_b", "s_lse_h", "s_ids"])
def attention_shift_bwd_kernel(
    dout,
    lse,
    q,
    weight,
    bias,
    shift,
    adapter_ids,
    a,
    dlse,
    cu_seqlens,
    dg,
    dq,
    base,
    delta,
    dweight_part,
    dbias_part,
    dshift_part,
    s_dout_b,
    s_dout_h,
    s_dout_t,
    s_lse_b,
    s_lse_h,
    s_lse_t,
    s_q_b,
    s_q_h,
    s_q_t,
    s_ids,
    s_a_b,
    s_a_h,
    s_a_t,
    H,
    T,
    N,
    D: tl.constexpr,
    THROUGH_LSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    NS: tl.constexpr,
):
    """Writes ``dg`` and ``delta [B, H, N]``, ``dq`` and ``base`` in new storage, the sums over NS * BT rows.

    ``delta = dout . a - dlse``, and with THROUGH_LSE ``+ dg``, which ``dout . base`` always has. T: rows of
    the longest sequence, N: of the storage; they differ where ``cu_seqlens`` packs sequences.
    """
    i_b, i_h, i_t = _position(H, T, NS * BT)
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
        p_q = _rows(q, s_q_b, s_q_h, s_q_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
        p_dout = _rows(dout, s_dout_b, s_dout_h, s_dout_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
        # [BT]
        b_lse = tl.load(_rows(lse, s_lse_b, s_lse_h, s_lse_t, i_x, i_h, o_t), mask=m_t, other=0.0)
        # [BT, BD]
        b_q = tl.load(p_q, mask=m_td, other=0.0).to(b_lse.dtype)
        b_dout = tl.load(p_dout, mask=m_td, other=0.0).to(b_lse.dtype)

        if a is not None:  # before the first store, which no later load may overtake
            p_attended = _rows(a, s_a_b, s_a_h, s_a_t, i_x, i_h, o_t)[:, None] + o_d[None, :]
            b_attended = tl.load(p_attended, mask=m_td, other=0.0)

        # [BT]
        b_mu, b_dmu = gate(tl.sum(b_q * b_weight[None, :], 1) + b_bias, b_lse, i_a)
        b_dg = b_dmu * tl.sum(b_dout * b_shift[None, :], 1)
        tl.store(dg + (i_x * H + i_h) * N + o_t, b_dg, mask=m_t)
        b_dbias += b_dg
        # [BT, BD]
        b_dweight += b_dg[:, None] * b_q
        b_dshift += b_mu[:, None] * b_dout
        o_new = _rows(0, N * H.to(tl.int64) * D, D, H * D, i_x, i_h, o_t)[:, None] + o_d[None, :]
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
    dweight_part,
    dbias_part,
    dshift_part,
    adapter_ids,
    dweight,
    dbias,
    dshift,
    s_ids,
    H,
    N,
    NT,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
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
    dq,
    dg,
    weight,
    adapter_ids,
    s_dq_b,
    s_dq_h,
    s_dq_t,
    s_dg_b,
    s_dg_h,
    s_dg_t,
    s_ids,
    H,
    T,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_b, i_h, i_t = _position(H, T, BT)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    m_td = m_t[:, None] & m_d[None, :]
    i_a = adapter(adapter_ids, s_ids, i_b)
    i_ah = tl.maximum(i_a, 0) * H + i_h
    p_dq = _rows(dq, s_dq_b, s_dq_h, s_dq_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    # [BT]
    b_dg = tl.load(_rows(dg, s_dg_b, s_dg_h, s_dg_t, i_b, i_h, o_t), mask=m_t, other=0.0)
    # [BD]
    b_weight = tl.load(weight + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    # [BT, BD]
    b_dq = tl.load(p_dq, mask=m_td, other=0.0).to(b_dg.dtype) + b_dg[:, None] * b_weight[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_td)


def attention_shift_fwd(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
) -> Tensor:
    shifted = new_output(out)
    _launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, shifted)
    return shifted


def attention_shift_fwd_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
) -> None:
    _launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, out)


def _launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, shifted) -> None:
    if q.numel() == 0:
        return
    B, H, T, D = q.shape
    BD, config = triton.next_power_of_2(D), launch_config("fwd", T)
    BT, _ = config.tiling(T, BD)
    with torch.cuda.device_of(q):
        attention_shift_fwd_kernel[(B * H * triton.cdiv(T, BT),)](
            out, lse, q, weight, bias, shift, adapter_ids, shifted,
            *_strides(out), *lse.stride(), *_strides(q), _ids_stride(adapter_ids), *_strides(shifted),
            H, T, D, BT, BD, num_warps=config.num_warps,
        )  # fmt: skip


def attention_shift_bwd(
    dout: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    a: Tensor | None,
    need_dq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = lse.new_empty(lse.shape)
    dq = new_output(q) if need_dq else None
    base = new_output(q) if a is not None else None
    grads = _launch_bwd(dout, lse, q, (weight, bias, shift), adapter_ids, a, dg=dg, dq=dq, base=base)
    return dg, _or_empty(dq, q), _or_empty(base, q), *grads


def attention_delta(
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    q: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    adapter_ids: Tensor | None,
    a: Tensor,
    through_lse: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``dg``, ``delta = dout . a - dlse`` (``+ dg`` if ``through_lse``), gradients of the parameters.

    What an attention backward takes; ``adapter_ids`` are those of sequences where ``cu_seqlens`` packs them.
    """
    dg, delta = lse.new_empty(lse.shape), lse.new_empty(lse.shape)
    dlse = None if dlse is None else dlse.contiguous()
    grads = _launch_bwd(
        dout, lse, q, parameters, adapter_ids, a,
        dg=dg, delta=delta, through_lse=through_lse, dlse=dlse, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
    )  # fmt: skip
    return dg, delta, grads


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
            *_strides(dout), *lse.stride(), *_strides(q), _ids_stride(adapter_ids), *_strides(a),
            H, T, N, D, through_lse, BT, BD, NS, num_warps=config.num_warps,
        )  # fmt: skip
        return _launch_reduce(parts, adapter_ids, parameters[0].shape[0], NT)


def _launch_reduce(parts: list[Tensor], adapter_ids: Tensor | None, A: int, NT: int) -> list[Tensor]:
    N, H, D = parts[0].shape
    grads = [x.new_empty(A, *x.shape[1:]) for x in parts]
    if A == 0:
        return grads
    attention_shift_reduce_kernel[(A * H, triton.cdiv(D, REDUCE_COLUMNS))](
        *parts, adapter_ids, *grads, _ids_stride(adapter_ids), H, N, NT, D, REDUCE_ROWS, REDUCE_COLUMNS,
        num_warps=REDUCE_WARPS,
    )  # fmt: skip
    return grads


def add_gate_grad_(dq: Tensor, dg: Tensor, weight: Tensor, adapter_ids: Tensor | None) -> None:
    if dq.numel() == 0:
        return
    B, H, T, D = dq.shape
    BD, config = triton.next_power_of_2(D), launch_config("fwd", T)
    BT, _ = config.tiling(T, BD)
    with torch.cuda.device_of(dq):
        add_gate_grad_kernel[(B * H * triton.cdiv(T, BT),)](
            dq, dg, weight, adapter_ids,
            *_strides(dq), *dg.stride(), _ids_stride(adapter_ids),
            H, T, D, BT, BD, num_warps=config.num_warps,
        )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of B, H and T; that of D is 1."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _ids_stride(adapter_ids: Tensor | None) -> int:
    return 0 if adapter_ids is None else adapter_ids.stride(0)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x
