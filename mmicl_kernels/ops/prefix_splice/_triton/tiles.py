"""What both passes share: launches, and a request's demonstrations and prompt."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class LaunchConfig:
    """Rows BT of a program, bytes of a tile of theirs, demonstrations and requests it looks at at once."""

    rows: int = 16
    tile_bytes: int = 16384
    demonstrations: int = 16
    requests: int = 16
    num_warps: int = 4

    def columns(self, x: Tensor) -> int:
        """BC; a power of two."""
        return min(triton.next_power_of_2(max(x.shape[-1], 1)), self.tile_bytes // self.rows // x.itemsize)


CONFIGS = {"fwd": LaunchConfig(), "bwd": LaunchConfig(tile_bytes=8192)}


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def demo_range(cu_demos, o_r, m_r, K):
    """The first and the end of the occurrences of requests ``o_r``."""
    b_low = clamped(tl.load(cu_demos + o_r, mask=m_r, other=0).to(tl.int64), 0, K)
    b_high = clamped(tl.load(cu_demos + o_r + 1, mask=m_r, other=0).to(tl.int64), 0, K)
    return b_low, b_high


@triton.jit
def prompt_range(prompt_start, prompt_end, cu_prompt, o_r, m_r, T):
    """The first row and the tokens of the prompts of requests ``o_r``, within their batch row."""
    b_first = o_r.to(tl.int64) * 0
    b_end = b_first + T
    if cu_prompt is not None:
        b_first = tl.load(cu_prompt + o_r, mask=m_r, other=0).to(tl.int64)
        b_end = tl.load(cu_prompt + o_r + 1, mask=m_r, other=0).to(tl.int64)
    if prompt_start is not None:
        b_first = tl.load(prompt_start + o_r, mask=m_r, other=0).to(tl.int64)
    if prompt_end is not None:
        b_end = tl.load(prompt_end + o_r, mask=m_r, other=0).to(tl.int64)
    b_first, b_end = clamped(b_first, 0, T), clamped(b_end, 0, T)
    return b_first, tl.where(m_r, tl.maximum(b_end - b_first, 0), 0)


@triton.jit
def demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK: tl.constexpr):
    """Occurrences ``[X, BK]`` from the ``i_k``-th last one on backwards: number, mask, bank row, tokens."""
    o_k = b_high[:, None] - 1 - i_k - tl.arange(0, BK)[None, :]
    m_k = (o_k >= b_low[:, None]) & (M > 0)
    i_d = clamped(tl.load(demo_ids + o_k, mask=m_k, other=0).to(tl.int64), 0, M - 1)
    b_first = tl.load(offsets + i_d, mask=m_k, other=0).to(tl.int64)
    b_size = tl.load(offsets + i_d + 1, mask=m_k, other=0).to(tl.int64) - b_first
    return o_k, m_k, b_first, tl.maximum(b_size, 0)


@triton.jit
def fused_tokens(offsets, demo_ids, b_low, b_high, b_budget, M, BK: tl.constexpr):
    """How many tokens the last demonstrations have that fit into the budget; all ``[X]``."""
    b_fused, b_sum = b_low * 0, b_low * 0
    n_k = tl.max(b_high - b_low, 0)
    i_k = n_k * 0
    while i_k < n_k:
        o_k, m_k, b_first, b_size = demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK)
        b_suffix = b_sum[:, None] + tl.cumsum(b_size, 1)
        m_fits = m_k & (b_suffix <= b_budget[:, None])
        b_fused = tl.maximum(b_fused, tl.max(tl.where(m_fits, b_suffix, 0), 1))
        b_sum += tl.sum(b_size, 1)
        i_k += BK
    return b_fused


@triton.jit
def bank_rows(offsets, demo_ids, b_low, b_high, b_back, m_fused, M, BK: tl.constexpr):
    """The bank rows of the tokens ``b_back [BT]`` before the end of the fused ones; -1 where there is none.

    ``b_low`` and ``b_high`` are ``[BT]``, or ``[1]`` where all tokens are of one request.
    """
    b_row = tl.where(m_fused, 0, -1).to(tl.int64)
    b_sum = b_low * 0
    n_k = tl.max(b_high - b_low, 0)
    i_k = n_k * 0
    while i_k < n_k:
        o_k, m_k, b_first, b_size = demo_tile(offsets, demo_ids, b_low, b_high, i_k, M, BK)
        b_suffix = b_sum[:, None] + tl.cumsum(b_size, 1)
        b_into = b_suffix - b_back[:, None]  # the token's place in the demonstration
        m_hit = m_k & m_fused[:, None] & (b_into >= 0) & (b_into < b_size)
        b_row += tl.sum(tl.where(m_hit, b_first + b_into, 0), 1)
        b_sum += tl.sum(b_size, 1)
        i_k += BK
    return b_row


@triton.jit
def request_tile(
    offsets, demo_ids, cu_demos, prompt_start, prompt_end, cu_prompt, o_r, R, M, K, T, LIMIT, BK: tl.constexpr
):  # fmt: skip
    """Of requests ``o_r``: occurrences' first and end, the prompt's first row, its and the fused tokens."""
    m_r = o_r < R
    b_low, b_high = demo_range(cu_demos, o_r, m_r, K)
    b_first, b_own = prompt_range(prompt_start, prompt_end, cu_prompt, o_r, m_r, T)
    b_fused = fused_tokens(offsets, demo_ids, b_low, b_high, LIMIT - b_own, M, BK)
    return b_low, b_high, b_first, b_own, b_fused


def dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()
