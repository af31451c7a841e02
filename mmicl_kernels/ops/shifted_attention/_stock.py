"""Plain attention that returns its log-sum-exp, by the best stock kernel for the device and the case.

Every kernel has the same two methods. ``backward`` computes ``delta = dout . out`` from the ``out`` it
is given, which is what lets the composed gradient pass another tensor in its place (README).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.ops.shifted_attention._blockwise import BlockwiseAttention, all_heads
from mmicl_kernels.ops.shifted_attention.visibility import Visibility

aten = torch.ops.aten
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class StockAttention(NamedTuple):
    """A stock kernel over the first ``num_keys`` keys, top-left causal or with an additive bias."""

    fwd: Callable
    bwd: Callable
    num_keys: int
    causal: bool
    bias: Tensor | None
    scale: float
    additive: bool  # whether bias has values other than 0 and -inf

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``out [B, H, T, D]`` and ``lse [B, H, T]``; 0 and -inf for a query that sees no key."""
        if self.num_keys < k.shape[2]:
            k, v = k[:, :, : self.num_keys], v[:, :, : self.num_keys]
        out, lse = self.fwd(q, k, v, self.causal, self.bias, self.scale)
        if self.bias is not None:
            blind = self.bias.amax(-1) == -torch.inf
            lse = lse.masked_fill(blind, -torch.inf)
            out = out.masked_fill_(blind[..., None], 0.0)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` with ``delta = dout . out``."""
        S, n = k.shape[2], self.num_keys
        if self.additive:
            dout = dout * self._shares(lse)[..., None].to(dout.dtype)
        # With lse +inf a query without gradient recomputes exp(s - inf) = 0 for any s, -inf included;
        # with 0 a large s would overflow, with -inf it would be NaN.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        dq, dk, dv = self.bwd(dout, q, k[:, :, :n], v[:, :, :n], out, lse, self.causal, self.bias, self.scale)
        if n < S:
            dk, dv = (F.pad(grad, (0, 0, 0, S - n)) for grad in (dk, dv))
        return dq, dk, dv

    def _shares(self, lse: Tensor) -> Tensor:
        """1, or 1 / n for a query whose n best keys all carry so low a value that lse rounds to it.

        HuggingFace's finfo.min in a whole row does. The kernel then recomputes ``exp(s - lse)`` as 1 for
        each of them; gradients are linear in dout, so it can bring the missing factor.
        """
        ties = (self.bias == self.bias.amax(-1, keepdim=True)).sum(-1)
        swallowed = torch.isfinite(lse) & (lse.abs() * torch.finfo(lse.dtype).eps > 1)
        return torch.where(swallowed, ties.to(lse.dtype).reciprocal(), 1.0)


def attention_kernel(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, visibility: Visibility
) -> StockAttention | BlockwiseAttention:
    """The best kernel for these queries and keys; plain PyTorch in blocks where no stock one fits."""
    T, S = q.shape[2], k.shape[2]
    given = visibility
    visibility = given.simplified(T, S)
    num_keys = visibility.reachable_keys(T, S)
    additive = visibility.additive_mask()
    # A finite mask value of a wider dtype could become -inf when cast to q's.
    foreign_mask = additive is not None and additive.dtype != q.dtype
    # Stock CPU flash divides by a zero size.
    empty = q.numel() == 0 or k.numel() == 0 or num_keys == 0
    if softcap is not None or foreign_mask or empty:
        return BlockwiseAttention(scale, softcap, given)

    visibility = visibility.first_keys(num_keys)
    # Stock kernels hide keys before they scale: -inf times a scale of 0 is NaN, times a negative one +inf.
    scales_up = scale > SMALLEST_SCALE
    aligned = num_keys == T or q.device.type == "cpu"
    causal = visibility.is_top_left_causal() and aligned and scales_up
    bias = None if causal else _bias(visibility, q, num_keys)
    kernel = _select(q, bias)
    if kernel is None:
        return BlockwiseAttention(scale, softcap, given)
    return StockAttention(*kernel, num_keys, causal, bias, scale, additive is not None)


def _bias(visibility: Visibility, q: Tensor, S: int) -> Tensor | None:
    """The visibility as one additive mask in q's dtype ``[B or 1, H or 1, T, S]``."""
    T = q.shape[2]
    keep, additive = visibility.keep(T, S, q.device), visibility.additive_mask()
    if keep is None and additive is None:
        return None
    bias = q.new_zeros(()) if additive is None else additive
    if keep is not None:
        bias = torch.where(keep, bias, -torch.inf)
    return bias.expand(*bias.shape[:2], T, S)


def _select(q: Tensor, bias: Tensor | None) -> tuple[Callable, Callable] | None:
    """Forward and backward of the fastest stock kernel that takes these inputs and returns its lse."""
    if q.device.type == "cpu":
        return _cpu_flash_fwd, _cpu_flash_bwd
    if q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[-1] % 8 != 0:
        return None
    if q.dtype == torch.float32:
        return _efficient_fwd, _efficient_bwd
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    if hopper and q.shape[-1] <= 128 and torch.backends.cudnn.is_available():
        return _cudnn_fwd, _cudnn_bwd
    if bias is None and q.shape[-1] <= 256:
        return _flash_fwd, _flash_bwd
    return _efficient_fwd, _efficient_bwd


def _cpu_flash_fwd(q, k, v, causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def _cpu_flash_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cudnn_fwd(q, k, v, causal, bias, scale):
    out, lse = aten._scaled_dot_product_cudnn_attention(
        q, k, v, _expanded_bias(bias, q), True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(q.shape[:3])


def _cudnn_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    T, S = q.shape[2], k.shape[2]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(dout, q, k, v, out, lse[..., None].contiguous(), seed, seed, _expanded_bias(bias, q)),
        *(None, None, T, S, 0.0, causal),
        scale=scale,
    )


def _flash_fwd(q, k, v, causal, bias, scale):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _flash_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    T, S = q.shape[2], k.shape[2]
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        *(dout, q, k, v, out, lse.contiguous(), None, None, T, S, 0.0, causal, seed, seed[:1]),
        scale=scale,
    )


def _efficient_fwd(q, k, v, causal, bias, scale):
    k, v = all_heads(k, q), all_heads(v, q)
    out, lse = aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned_bias(bias, q), True, 0.0, causal, scale=scale
    )[:2]
    return out, lse[..., : q.shape[2]]


def _efficient_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    T = q.shape[2]
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    # The kernel reads lse rows padded to a multiple of 32; +inf there makes their probabilities 0.
    lse = F.pad(lse, (0, -T % 32), value=torch.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(dout, q, all_heads(k, q), all_heads(v, q), _aligned_bias(bias, q)),
        *(out, lse, seed, seed, 0.0, [True, True, True, False], causal),
        scale=scale,
    )
    G = k.shape[1]
    return dq, dk.unflatten(1, (G, -1)).sum(2), dv.unflatten(1, (G, -1)).sum(2)


def _expanded_bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*q.shape[:3], -1)


def _aligned_bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """Rows padded to 8 elements: the efficient kernel needs 16-byte rows."""
    if bias is None:
        return None
    S = bias.shape[-1]
    return F.pad(bias, (0, -S % 8))[..., :S].expand(*q.shape[:3], -1)
