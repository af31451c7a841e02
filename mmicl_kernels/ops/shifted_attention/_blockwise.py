"""Attention in plain PyTorch over blocks of queries, for the cases no stock kernel takes.

Softcap, additive masks of another dtype, empty sizes. ``[B, H, BLOCK, S]`` is the largest tensor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops.shifted_attention.visibility import Visibility, masked_softmax

BLOCK = 128


class BlockwiseAttention(NamedTuple):
    """The interface of ``StockAttention`` for any softcap, visibility and size."""

    scale: float
    softcap: float | None
    visibility: Visibility

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        acc = torch.promote_types(q.dtype, torch.float32)
        k, v = all_heads(k.to(acc), q), all_heads(v.to(acc), q)
        out, lse = new_heads(q), q.new_empty(q.shape[:3], dtype=acc)
        for rows, keep, additive in self._blocks(q, k):
            scores = self._capped(q[:, :, rows].to(acc), k)
            probabilities, lse[:, :, rows] = masked_softmax(scores, keep, additive)
            out[:, :, rows] = probabilities @ v
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        acc = torch.promote_types(q.dtype, torch.float32)
        G = k.shape[1]
        k, v = all_heads(k.to(acc), q), all_heads(v.to(acc), q)
        dq, dk, dv = new_heads(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keep, additive in self._blocks(q, k):
            q_rows, dout_rows = q[:, :, rows].to(acc), dout[:, :, rows].to(acc)
            scores = self._capped(q_rows, k)
            probabilities, _ = masked_softmax(scores, keep, additive)
            delta = (dout_rows * out[:, :, rows].to(acc)).sum(-1, keepdim=True)
            dscores = probabilities * (dout_rows @ v.transpose(-1, -2) - delta)
            if self.softcap is not None:
                dscores = dscores * (1 - (scores / self.softcap) ** 2)
            dq[:, :, rows] = self.scale * (dscores @ k)
            dk += self.scale * (dscores.transpose(-1, -2) @ q_rows)
            dv += probabilities.transpose(-1, -2) @ dout_rows
        return dq, *(x.unflatten(1, (G, -1)).sum(2).to(q.dtype) for x in (dk, dv))

    def _capped(self, q_rows: Tensor, k: Tensor) -> Tensor:
        scores = self.scale * (q_rows @ k.transpose(-1, -2))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores

    def _blocks(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
        T, S = q.shape[2], k.shape[2]
        keep, additive = self.visibility.keep(T, S, q.device), self.visibility.additive_mask()
        for start in range(0, T, BLOCK):
            rows = slice(start, start + BLOCK)
            yield rows, _query_rows(keep, rows), _query_rows(additive, rows)


def all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[B, G, S, D]`` repeated for each of q's heads; themselves where these are as many."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _query_rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return x if x is None or x.shape[-2] == 1 else x[:, :, rows]
