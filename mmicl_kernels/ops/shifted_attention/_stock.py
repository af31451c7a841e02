"""Plain attention that returns its log-sum-exp, by the best stock kernel for the device and the case.

Every kernel has the same two methods. ``backward`` computes ``delta = dout . out`` from the ``out`` it
is given, which is what lets the composed gradient pass another tensor in its place (README). Where no stock
kernel fits (softcap, additive masks of another dtype, empty sizes), plain PyTorch takes a block of queries at
a time: ``[B, H, BLOCK, S]`` is the largest tensor.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.ops._core.checks import overlaps
from mmicl_kernels.ops._core.layout import accumulation_dtype, new_heads
from mmicl_kernels.ops.shifted_attention.options import SMALLEST_SCALE, Visibility
from mmicl_kernels.ops.shifted_attention.reference import masked_softmax

aten = torch.ops.aten

BLOCK = 128


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
        bias = _finite_in_base_2(self.bias) if self.additive and q.is_cuda else self.bias
        out, lse = self.fwd(q, k, v, self.causal, bias, self.scale)
        if self.bias is not None:
            best = self.bias.amax(-1).to(lse.dtype)
            if self.additive:
                # There lse is the best value; a kernel that computes in base 2 returns a rounding of it.
                lse = torch.where(_swallows(best), best, lse)
            blind = best == -torch.inf
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
        """1, or 1 / n for a query whose n best keys carry so low a value (finfo.min) that lse rounds to it.

        The kernel then recomputes ``exp(s - lse) = 1`` for each; gradients are linear in dout.
        """
        ties = (self.bias == self.bias.amax(-1, keepdim=True)).sum(-1)
        return torch.where(_swallows(lse), ties.to(lse.dtype).reciprocal(), 1.0)


class BlockwiseAttention(NamedTuple):
    """The interface of ``StockAttention`` for any softcap, visibility and size."""

    scale: float
    softcap: float | None
    visibility: Visibility

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        acc = accumulation_dtype(q)
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
        acc = accumulation_dtype(q)
        G = k.shape[1]
        k, v = all_heads(k.to(acc), q), all_heads(v.to(acc), q)
        dq, dk, dv = new_heads(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keep, additive in self._blocks(q, k):
            q_rows, dout_rows = q[:, :, rows].to(acc), dout[:, :, rows].to(acc)
            scores = self._capped(q_rows, k)
            probabilities, own = masked_softmax(scores, keep, additive)
            probabilities = probabilities * _shares_of(own, lse[:, :, rows])[..., None]
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
    # Stock kernels hide keys before they scale: -inf times a scale of 0 is NaN, times a negative one +inf.
    # On CUDA they hide in this way what lies beyond the last key, too.
    scales_up = scale > SMALLEST_SCALE
    on_cpu = q.device.type == "cpu"
    if softcap is not None or foreign_mask or empty or not (scales_up or on_cpu):
        return BlockwiseAttention(scale, softcap, given)

    visibility = visibility.first_keys(num_keys)
    # Only at equal lengths do CUDA kernels agree on which corner causal starts from.
    causal = visibility.is_top_left_causal() and (num_keys == T or on_cpu) and scales_up
    bias = None if causal else _bias(visibility, q, num_keys)
    kernel = _select(q, bias, num_keys)
    if kernel is None:
        return BlockwiseAttention(scale, softcap, given)
    return StockAttention(*kernel, num_keys, causal, bias, scale, additive is not None)


def all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[B, G, S, D]`` repeated for each of q's heads; themselves where these are as many."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _shares_of(own: Tensor, lse: Tensor) -> Tensor:
    """``exp(own - lse)``: 1 where ``lse`` is the keys' own, less where it counts others too; 0 for none."""
    return torch.where(own == lse, 1.0, torch.exp(own - lse)).masked_fill(lse == -torch.inf, 0.0)


def _query_rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return x if x is None or x.shape[-2] == 1 else x[:, :, rows]


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


def _swallows(x: Tensor) -> Tensor:
    """Where a finite value is so large that a score added to it vanishes in rounding."""
    return torch.isfinite(x) & (x.abs() * torch.finfo(x.dtype).eps > 1)


def _finite_in_base_2(bias: Tensor) -> Tensor:
    """finfo.min times log2(e) is -inf, and a row of it would see no key: half of it does the same."""
    lowest = max(torch.finfo(torch.float32).min / 2, torch.finfo(bias.dtype).min)
    return torch.where(bias == -torch.inf, bias, bias.clamp(min=lowest))


def _select(q: Tensor, bias: Tensor | None, num_keys: int) -> tuple[Callable, Callable] | None:
    """Forward and backward of the fastest stock kernel that takes these inputs and returns its lse."""
    D = q.shape[-1]
    if q.device.type == "cpu":
        return _cpu_flash_fwd, _cpu_flash_bwd
    if q.device.type != "cuda" or q.dtype == torch.float64 or D % 8 != 0:
        return None
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    if q.dtype == torch.bfloat16 and not ampere:
        return None
    if q.dtype != torch.float32 and bias is None and ampere:
        if _cudnn_comes_first(q, num_keys):
            return _cudnn_fwd, _cudnn_bwd
        # Between these, consumer cards have no flash backward.
        if D <= 192 or 224 < D <= 256:
            return _flash_fwd, _flash_bwd
    return _efficient_fwd, _efficient_bwd


def _cudnn_comes_first(q: Tensor, num_keys: int) -> bool:
    """PyTorch's own rule (sdp_utils.cpp), but never for one query or with a bias.

    There a low lse makes its backward NaN (cudnn-frontend issue 1072, pytorch issue 196678).
    """
    strict = torch.are_deterministic_algorithms_enabled()
    strict = strict and not torch.is_deterministic_algorithms_warn_only_enabled()
    return (
        torch.cuda.get_device_capability(q.device)[0] in (9, 10)
        and (torch.backends.cudnn.version() or 0) > 91500  # before, lengths that 128 does not divide fault
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not strict
        and q.shape[-1] <= 128
        and min(q.shape[-2], num_keys) > 1
    )


def _cpu_flash_fwd(q, k, v, causal, bias, scale):
    # PyTorch lays out the output like q, and where rows of q overlap writes it as it is not.
    q = q.contiguous() if overlaps(q) else q
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def _cpu_flash_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cudnn_fwd(q, k, v, causal, bias, scale):
    options = (bias, True, 0.0, causal, False)
    out, lse = aten._scaled_dot_product_cudnn_attention(*map(_aligned, (q, k, v)), *options, scale=scale)[:2]
    return out, lse.reshape(q.shape[:3])


def _cudnn_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    (B, H, T, _), S = q.shape, k.shape[2]
    seed = lse.new_empty((), dtype=torch.int64)  # read with dropout alone
    dout, q, k, v = map(_aligned, (dout, q, k, v))
    # PyTorch keeps cuDNN's plans by the strides of q, k and v alone, so another layout of out or dout
    # under the same key would be misread in silence; later versions demand q's layout of both.
    dout, q, out = (_heads_last(x) for x in (dout, q, out))
    k, v = (x if x.is_contiguous() else _heads_last(x) for x in (k, v))
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(dout, q, k, v, out, lse.flatten().view(B, H, T, 1), seed, seed),
        *(bias, None, None, T, S, 0.0, causal),
        scale=scale,
    )


def _flash_fwd(q, k, v, causal, bias, scale):
    q, k, v = map(_aligned, (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _flash_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    T, S, seed = q.shape[2], k.shape[2], lse.new_empty((), dtype=torch.int64)
    dout, q, k, v = map(_aligned, (dout, q, k, v))
    return aten._scaled_dot_product_flash_attention_backward(
        *(dout, q, k, v, out, lse.contiguous(), None, None, T, S, 0.0, causal, seed, seed),
        scale=scale,
    )


def _efficient_fwd(q, k, v, causal, bias, scale):
    q, k, v = map(_aligned, (q, all_heads(k, q), all_heads(v, q)))
    out, lse = aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned_bias(bias, q), True, 0.0, causal, scale=scale
    )[:2]
    return out, lse[..., : q.shape[2]]


def _efficient_bwd(dout, q, k, v, out, lse, causal, bias, scale):
    G, seed = k.shape[1], lse.new_empty((), dtype=torch.int64)
    dout, q, k, v = map(_aligned, (dout, q, all_heads(k, q), all_heads(v, q)))
    # The kernel takes out's rows to be H * D apart whatever its strides are, and reads lse rows padded to
    # a multiple of 32: +inf there makes their probabilities 0.
    lse = F.pad(lse, (0, -q.shape[2] % 32), value=torch.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(dout, q, k, v, _aligned_bias(bias, q), _heads_last(out), lse, seed, seed),
        *(0.0, [True, True, True, False], causal),
        scale=scale,
    )
    return dq, *(x if x.shape[1] == G else x.unflatten(1, (G, -1)).sum(2) for x in (dk, dv))


def _heads_last(x: Tensor) -> Tensor:
    """``x`` with exactly the strides of a ``[B, T, H, D]``, sizes of 1 included; a copy if need be."""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(-1).view(B, T, H, D).transpose(1, 2)


def _aligned(x: Tensor, may_repeat: bool = False) -> Tensor:
    """``x``, copied where its rows do not start at 16 bytes, or repeat: CUDA kernels load vectors."""
    unit, steps = 16 // x.element_size(), x.stride()[:-1]
    rows = all(step % unit == 0 for step in steps) and (may_repeat or 0 not in steps)
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and rows:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned_bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """``[B, H, T, S]`` for the efficient kernel, which needs rows at 16 bytes; they may repeat."""
    if bias is None:
        return None
    S = bias.shape[-1]
    bias = F.pad(bias, (0, -S % 8))[..., :S] if S % 8 else _aligned(bias, may_repeat=True)
    return bias.expand(*q.shape[:3], S)
