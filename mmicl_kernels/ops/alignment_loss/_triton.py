"""The squares of rows in Triton: states and targets read once per pass, where they lie; no atomics.

The functions of :mod:`._torch` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import acc_type
from mmicl_kernels.ops._core.layout import accumulation_dtype


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of a program, the bytes of its tile of states, and its warps."""

    rows: int
    tile_bytes: int
    num_warps: int

    def columns(self, states: Tensor) -> int:
        """BC; a power of two."""
        return min(triton.next_power_of_2(states.shape[2]), self.tile_bytes // self.rows // states.itemsize)


# Two 16-byte loads of states for each thread. A forward has a program for every row, since a few hundred are
# all there are; a backward, which also writes the zeros of all other rows, a tile of four.
FORWARD = LaunchConfig(rows=1, tile_bytes=4096, num_warps=4)
BACKWARD = LaunchConfig(rows=4, tile_bytes=4096, num_warps=4)


@triton.jit(do_not_specialize=["T", "R"])
def squares_fwd_kernel(
    states,
    targets,
    index,
    d,
    s,
    s_x_b,
    s_x_t,
    s_y_n,
    T,
    R,
    C: tl.constexpr,
    acc: tl.constexpr,
    BC: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_r = tl.load(index + i_n)
    m_in = (i_r >= 0) & (i_r < R)
    i_r = tl.where(m_in, i_r, 0)
    p_x = states + (i_r // T) * s_x_b + (i_r % T) * s_x_t
    p_y = targets + i_n * s_y_n
    # [BC]
    b_d = tl.zeros([BC], dtype=acc)
    b_s = tl.zeros([BC], dtype=acc)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = (o_c < C) & m_in
        b_x = tl.load(p_x + o_c, mask=m_c, other=0.0).to(acc)
        b_y = tl.load(p_y + o_c, mask=m_c, other=0.0).to(acc)
        b_d += (b_x - b_y) * (b_x - b_y)
        b_s += b_x * b_x + b_y * b_y
    tl.store(d + i_n, tl.sum(b_d, 0))
    tl.store(s + i_n, tl.sum(b_s, 0))


@triton.jit(do_not_specialize=["T", "R"])
def squares_bwd_kernel(
    dd,
    ds,
    states,
    targets,
    order,
    starts,
    dstates,
    s_x_b,
    s_x_t,
    s_y_n,
    T,
    R,
    C: tl.constexpr,
    acc: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Row r of ``dstates [R, C]`` is the sum over the uses ``order[starts[r]:starts[r + 1]]``."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r, m_c = o_r < R, o_c < C
    # [BR]
    b_k = tl.load(starts + o_r, mask=m_r, other=0)
    b_end = tl.load(starts + o_r + 1, mask=m_r, other=0)
    # [BR, BC]
    m_x = (b_k < b_end)[:, None] & m_c[None, :]
    p_x = states + (o_r // T) * s_x_b + (o_r % T) * s_x_t
    b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_x, other=0.0).to(acc)
    b_dx = tl.zeros([BR, BC], dtype=acc)
    while tl.max(b_end - b_k, 0) > 0:
        m_k = b_k < b_end
        i_n = tl.load(order + b_k, mask=m_k, other=0)
        b_dd = 2 * tl.load(dd + i_n, mask=m_k, other=0.0)
        b_ds = 2 * tl.load(ds + i_n, mask=m_k, other=0.0)
        # Without either the use has no part in the loss, whatever the row holds.
        m_on = ((b_dd != 0) | (b_ds != 0))[:, None] & m_c[None, :]
        b_y = tl.load(targets + i_n[:, None] * s_y_n + o_c[None, :], mask=m_on, other=0.0).to(acc)
        b_dx += tl.where(m_on, b_dd[:, None] * (b_x - b_y) + b_ds[:, None] * b_x, 0.0)
        b_k += 1
    p_dx = dstates + o_r[:, None] * C + o_c[None, :]
    tl.store(p_dx, b_dx.to(dstates.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


def alignment_squares_fwd(states: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, C), N, acc = states.shape, index.shape[0], accumulation_dtype(states)
    if states.numel() == 0 or N == 0:
        d, s = (states.new_zeros(N, dtype=acc) for _ in range(2))
        return d, s
    d, s = (states.new_empty(N, dtype=acc) for _ in range(2))
    with torch.cuda.device_of(states):
        squares_fwd_kernel[(N,)](
            states, targets, index, d, s, *states.stride()[:2], targets.stride(0),
            T, B * T, C, acc_type(states), FORWARD.columns(states), num_warps=FORWARD.num_warps,
        )  # fmt: skip
    return d, s


def alignment_squares_bwd(
    dd: Tensor, ds: Tensor, states: Tensor, targets: Tensor, order: Tensor, starts: Tensor
) -> Tensor:
    B, T, C = states.shape
    dstates = states.new_empty(B, T, C)
    if dstates.numel() > 0:
        BC = BACKWARD.columns(states)
        with torch.cuda.device_of(states):
            squares_bwd_kernel[(triton.cdiv(B * T, BACKWARD.rows), triton.cdiv(C, BC))](
                dd, ds, states, targets, order, starts, dstates, *states.stride()[:2], targets.stride(0),
                T, B * T, C, acc_type(states), BACKWARD.rows, BC, num_warps=BACKWARD.num_warps,
            )  # fmt: skip
    return dstates
