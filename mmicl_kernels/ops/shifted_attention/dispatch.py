"""What ``impl="auto"`` chooses, by a table and never by timing."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import HAS_TRITON
from mmicl_kernels.ops.shifted_attention.options import Options

MAX_HEAD_DIM = 256
DECODE_QUERIES = 16
# Up to so many on CPU take the kernel that reads every key and value once. Measured beside tiles, 256 and
# 2,048 keys: with as many key heads 0.7 to 0.9 of their time at 4, as long at 6 to 8; with four query heads
# on one key head as long at 1.
FEW_QUERIES = 4

# The longest T at which the fused kernel is taken where a stock kernel would do without a bias: by compute
# capability's major version, the head dim from which on it counts, and whether gradients are needed.
# [ours] from the break-even of README.md, not measured: replace a number by a measurement and say so there.
ALWAYS = 2**31
LONGEST_FUSED = {
    (8, 0, False): ALWAYS,
    (8, 65, False): 4096,
    (8, 129, False): 0,
    (8, 0, True): 1024,
    (8, 65, True): 512,
    (8, 129, True): 0,
    (9, 0, False): ALWAYS,
    (9, 65, False): 2048,
    (9, 129, False): 0,
    (9, 0, True): 1024,
    (9, 65, True): 512,
    (9, 129, True): 0,
}


def choose(q: Tensor, k: Tensor, options: Options) -> str:
    """ "composed" or "triton" for these inputs.

    Triton wherever stock kernels would need a mask in memory, a loop over sequences or a second pass, and
    for a decode; else where saving the epilogue's pass outweighs the stock kernel's better products.
    """
    D, T, training = q.shape[-1], q.shape[2], options.training
    fits = q.dtype in (torch.float16, torch.bfloat16) and D <= MAX_HEAD_DIM
    if q.device.type != "cuda" or not HAS_TRITON or not fits:
        return "composed"
    major = min(torch.cuda.get_device_capability(q.device)[0], 9)
    if major < 8:
        return "composed"
    if (T <= DECODE_QUERIES and not training) or not _is_stock(T, k.shape[2], options):
        return "triton"
    step = max(low for (_, low, _) in LONGEST_FUSED if low <= D)
    longest = LONGEST_FUSED[major, step, training]
    return "triton" if longest >= T else "composed"


def _is_stock(T: int, S: int, options: Options) -> bool:
    """Whether a stock kernel computes this without a bias."""
    if options.softcap is not None or options.cu_seqlens_q is not None or options.all_keys:
        return False
    visibility = options.visibility.simplified(T, S)
    return (visibility.is_all_keys() and visibility.kv_end is None) or (
        visibility.is_top_left_causal() and visibility.reachable_keys(T, S) == T
    )
