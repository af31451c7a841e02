"""The copies of rows in Triton: a gather in one launch, its gradient in one after a sort; no atomics.

The functions of ``_core/rows.py`` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``). Products
are the stock library's: see the README for why the gather is not fused into them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import acc_type
from mmicl_kernels.ops._core.rows import uses_of

# Rows and bytes of a program's tile: four 16-byte loads for each thread of 4 warps, and some 500 programs
# for the 480 rows of 4096 halves that 16 demonstrations have.
ROWS, TILE_BYTES, NUM_WARPS = 4, 8192, 4


@triton.jit(do_not_specialize=["N", "T", "R"])
def gather_rows_kernel(
    hidden, index, x, s_b, s_t, N, T, R, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    # [BN]
    i_r = tl.load(index + o_n, mask=o_n < N, other=-1)
    m_in = (i_r >= 0) & (i_r < R)
    i_r = tl.where(m_in, i_r, 0)
    p_x = hidden + (i_r // T) * s_b + (i_r % T) * s_t
    # [BN, BC]
    b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_nc & m_in[:, None], other=0.0)
    tl.store(x + o_n[:, None] * C + o_c[None, :], b_x, mask=m_nc)


@triton.jit(do_not_specialize=["R"])
def scatter_rows_kernel(
    dx, order, starts, dhidden, R, C: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Row r of ``dhidden [R, C]`` is the sum of the rows ``order[starts[r]:starts[r + 1]]`` of ``dx``."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r, m_c = o_r < R, o_c < C
    # [BR]
    b_k = tl.load(starts + o_r, mask=m_r, other=0)
    b_end = tl.load(starts + o_r + 1, mask=m_r, other=0)
    # [BR, BC]
    b_sum = tl.zeros([BR, BC], dtype=acc)
    while tl.max(b_end - b_k, 0) > 0:
        m_k = b_k < b_end
        i_n = tl.load(order + b_k, mask=m_k, other=0)
        p_dx = dx + i_n[:, None] * C + o_c[None, :]
        b_sum += tl.load(p_dx, mask=m_k[:, None] & m_c[None, :], other=0.0).to(acc)
        b_k += 1
    b_sum = b_sum.to(dhidden.dtype.element_ty)
    tl.store(dhidden + o_r[:, None] * C + o_c[None, :], b_sum, mask=m_r[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["N", "R"])
def clear_rows_kernel(x, index, N, R, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    # [BN]
    i_r = tl.load(index + o_n, mask=o_n < N, other=0)
    m_none = (o_n < N) & ((i_r < 0) | (i_r >= R))
    tl.store(x + o_n[:, None] * D + o_d[None, :], 0.0, mask=m_none[:, None] & (o_d < D)[None, :])


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    (B, T, C), N = hidden.shape, index.shape[0]
    if hidden.numel() == 0 or N == 0:
        return hidden.new_zeros(N, C)
    x = hidden.new_empty(N, C)
    BC = columns(hidden)
    with torch.cuda.device_of(hidden):
        gather_rows_kernel[(triton.cdiv(N, ROWS), triton.cdiv(C, BC))](
            hidden, index.contiguous(), x, *hidden.stride()[:2], N, T, B * T, C, ROWS, BC, num_warps=NUM_WARPS
        )
    return x


def scatter_rows(dx: Tensor, index: Tensor, B: int, T: int) -> Tensor:
    C, R = dx.shape[1], B * T
    dhidden = dx.new_empty(B, T, C)
    if dhidden.numel() == 0:
        return dhidden
    order, starts = uses_of(index, R)
    BC = columns(dx)
    with torch.cuda.device_of(dx):
        scatter_rows_kernel[(triton.cdiv(R, ROWS), triton.cdiv(C, BC))](
            dx.contiguous(), order, starts, dhidden, R, C, acc_type(dx), ROWS, BC, num_warps=NUM_WARPS
        )
    return dhidden


def clear_rows_(x: Tensor, index: Tensor, R: int) -> Tensor:
    N, D = x.shape
    if x.numel() > 0:
        BD = columns(x)
        with torch.cuda.device_of(x):
            clear_rows_kernel[(triton.cdiv(N, ROWS), triton.cdiv(D, BD))](
                x, index.contiguous(), N, R, D, ROWS, BD, num_warps=NUM_WARPS
            )
    return x


def columns(x: Tensor) -> int:
    """BC; a power of two."""
    return min(triton.next_power_of_2(x.shape[-1]), TILE_BYTES // ROWS // x.itemsize)
