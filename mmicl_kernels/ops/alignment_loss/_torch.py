"""The squares' kernels in plain PyTorch; C++ (csrc/cpu) and ``_triton`` have the same two functions.

An index outside of the ``B * T`` rows is none.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import accumulation_dtype
from mmicl_kernels.ops._core.rows import gather_rows, scatter_rows

BLOCK_ROWS = 64  # that are wide at a time


def alignment_squares_fwd(states: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``d [N]`` and ``s [N]`` in the accumulation dtype of ``states [B, T, C]``; 0 where there is no row."""
    (B, T, _), N, acc = states.shape, index.shape[0], accumulation_dtype(states)
    d, s = (states.new_empty(N, dtype=acc) for _ in range(2))
    for begin in range(0, N, BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        none = (index[block] < 0) | (index[block] >= B * T)
        x, y = gather_rows(states, index[block]).to(acc), targets[block].to(acc)
        y = y.masked_fill(none[:, None], 0.0)
        d[block], s[block] = (x - y).square().sum(-1), (x.square() + y.square()).sum(-1)
    return d, s


def alignment_squares_bwd(
    dd: Tensor, ds: Tensor, states: Tensor, targets: Tensor, order: Tensor, starts: Tensor
) -> Tensor:
    """``dstates [B, T, C]``, contiguous: of row r the sum over its uses ``order[starts[r]:starts[r + 1]]``.

    A use whose ``dd`` and ``ds`` are 0 is left out, whatever its row holds: it has no part in the loss.
    """
    (B, T, C), N, acc = states.shape, order.shape[0], accumulation_dtype(states)
    rows = torch.searchsorted(starts, torch.arange(N, device=starts.device), right=True) - 1
    grads = states.new_empty(N, C)
    for begin in range(0, N, BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        uses = order[block]
        x, y = gather_rows(states, rows[block]).to(acc), targets[uses].to(acc)
        of_d, of_s = 2 * dd[uses, None], 2 * ds[uses, None]
        off = (of_d == 0) & (of_s == 0)
        grads[block] = (of_d * (x - y) + of_s * x).masked_fill(off, 0.0)
    return scatter_rows(grads, rows, B, T)
