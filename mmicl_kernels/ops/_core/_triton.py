"""What the Triton kernels of several ops share: types; the gate of a head; entries and their launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP_BYTES = 1024  # of each operand in a tile: two 16-byte loads a thread
MAX_ROW = 32768  # columns of a program that sees whole rows: 32 registers of each of 1024 threads


def acc_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


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


@dataclass(frozen=True)
class RowConfig:
    """Warps of a program at least, tiles ``[BT, BC]`` it walks along at most.

    columns: BC, where rows need not be whole.
    """

    num_warps: int
    steps: int
    columns: int = 0

    def tiling(self, x: Tensor) -> tuple[int, int, int, int]:
        """BT, BC, the steps and the warps for ``x [B, T, C]``; powers of two, so that few compile."""
        T, C = max(x.shape[1], 1), max(x.shape[2], 1)
        elements = WARP_BYTES // x.itemsize
        BC = triton.next_power_of_2(C)
        if self.columns:
            BC = min(BC, self.columns)
        num_warps = min(max(self.num_warps, BC // elements), 32)
        BT = min(max(1, num_warps * elements // BC), triton.next_power_of_2(T))
        return BT, BC, min(self.steps, triton.next_power_of_2(triton.cdiv(T, BT))), num_warps


def check_row(C: int, whole: bool) -> None:
    """Raise NotImplementedError where a program would have to hold a row that is too long."""
    if whole and C > MAX_ROW:
        raise NotImplementedError(f"C is {C}, expected at most {MAX_ROW} for a norm with Triton")


@triton.jit
def position(NT, NC):
    """The batch row (int64: it multiplies strides), the chunk of rows and of columns of this program."""
    i_p = tl.program_id(0)
    return (i_p // NC // NT).to(tl.int64), i_p // NC % NT, i_p % NC


@triton.jit
def row_pointers(x, s_b, s_t, i_b, o_t):
    """Pointers to the first element of the rows ``o_t``; int64, because T * s_t may pass 2^31."""
    return x + i_b * s_b + o_t.to(tl.int64) * s_t


@triton.jit
def entry(
    vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_k, s_strength_b, s_strength_k, i_b, o_c, m_c,
    C, K: tl.constexpr, PER_ROW: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """The sum of a batch row's entries ``[1, BC]``, and whether all are off."""
    b_d = tl.zeros([o_c.shape[0]], dtype=acc)
    n_on = 0
    for i_k in range(K):
        i_a = i_b * PER_ROW
        if adapter_ids is not None:
            i_a = tl.load(adapter_ids + i_b * s_id_b + i_k * s_id_k).to(tl.int64)
        b_c = tl.full([], 1.0, dtype=acc)
        if scale is not None:
            b_c = tl.load(scale + tl.maximum(i_a, 0) * s_scale, mask=i_a >= 0, other=0.0).to(acc)
        if strengths is not None:
            b_c *= tl.load(strengths + i_b * s_strength_b + i_k * s_strength_k).to(acc)
        m_on = (i_a >= 0) & (b_c != 0)
        b_v = tl.load(vector + tl.maximum(i_a, 0) * C + o_c, mask=m_c & m_on, other=0.0).to(acc)
        b_d += tl.where(m_on, b_c, 0.0) * b_v
        n_on += m_on.to(tl.int32)
    return b_d[None, :], n_on == 0


@triton.jit
def token_entries(
    vector, scale, adapter_ids, strengths, s_scale, s_id_b, s_id_t, s_id_k, s_strength_b, s_strength_t,
    s_strength_k, i_b, o_t, m_t, o_c, m_c, C, K: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """The sum of each token's entries ``[BT, BC]``, and whether all are off ``[BT, 1]``."""
    b_d = tl.zeros([o_t.shape[0], o_c.shape[0]], dtype=acc)
    # [BT]
    n_on = tl.zeros([o_t.shape[0]], dtype=tl.int32)
    p_id = row_pointers(adapter_ids, s_id_b, s_id_t, i_b, o_t)
    for i_k in range(K):
        i_a = tl.load(p_id + i_k * s_id_k, mask=m_t, other=-1).to(tl.int64)
        b_c = tl.full([o_t.shape[0]], 1.0, dtype=acc)
        if scale is not None:
            b_c = tl.load(scale + tl.maximum(i_a, 0) * s_scale, mask=i_a >= 0, other=0.0).to(acc)
        if strengths is not None:
            p_strength = row_pointers(strengths, s_strength_b, s_strength_t, i_b, o_t)
            b_c *= tl.load(p_strength + i_k * s_strength_k, mask=m_t, other=0.0).to(acc)
        m_on = (i_a >= 0) & (b_c != 0)
        # [BT, BC]
        p_v = vector + tl.maximum(i_a, 0)[:, None] * C + o_c[None, :]
        b_v = tl.load(p_v, mask=m_on[:, None] & m_c[None, :], other=0.0).to(acc)
        b_d += tl.where(m_on, b_c, 0.0)[:, None] * b_v
        n_on += m_on.to(tl.int32)
    return b_d, (n_on == 0)[:, None]


def token_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of B and T; that of C is 1."""
    return (0, 0) if x is None else x.stride()[:2]


def entry_strides(
    scale: Tensor | None, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[int, int, int, int, int, int, int]:
    """Strides of the scale over adapters (0: shared), of ids and strengths over rows, tokens and entries."""
    shared = scale is None or scale.numel() == 1
    return 0 if shared else 1, *_entry_strides(adapter_ids), *_entry_strides(strengths)


def _entry_strides(x: Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    return x.stride() if x.dim() == 3 else (x.stride(0), 0, x.stride(1))


def entry_forms(vector: Tensor, adapter_ids: Tensor | None) -> tuple[int, bool, int]:
    """How many entries are summed, whether they are of each token, and 1 where each batch row has a vector.

    K, PER_TOKEN and PER_ROW of a launch.
    """
    if adapter_ids is None:
        return 1, False, int(vector.shape[0] > 1)
    return adapter_ids.shape[-1], adapter_ids.dim() == 3, 0
