"""How the kernels are launched, and where the rows of a program lie."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


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
    ("keys", "long"): LaunchConfig(elements=2048, num_warps=4),
    ("keys", "short"): LaunchConfig(elements=256, num_warps=1),
}
SHORT = 2  # queries: decode, with or without a speculated token


def launch_config(kernel: str, T: int) -> LaunchConfig:
    """The launch of ``kernel`` ("fwd", "bwd" or "keys") for T queries."""
    return CONFIGS[kernel, "short" if T <= SHORT else "long"]


@triton.jit
def position(H, T, CT: tl.constexpr):
    """The batch row, head (both int64: they multiply strides) and chunk of CT rows of this program."""
    i_p = tl.program_id(0)
    NT = tl.cdiv(T, CT)
    i_b, i_t = i_p // H // NT, i_p // H % NT
    return i_b.to(tl.int64), (i_p % H).to(tl.int64), i_t


@triton.jit
def row_pointers(x, s_b, s_h, s_t, i_b, i_h, o_t):
    """Pointers to the first element of the rows ``o_t``; int64, because T * s_t may pass 2^31."""
    return x + i_b * s_b + i_h * s_h + o_t.to(tl.int64) * s_t


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of B, H and T; that of D is 1."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def ids_stride(adapter_ids: Tensor | None) -> int:
    return 0 if adapter_ids is None else adapter_ids.stride(0)
