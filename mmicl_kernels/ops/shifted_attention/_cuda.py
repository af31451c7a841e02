"""One CUDA kernel on Hopper (``csrc/cuda/shifted_attention.h``), and the backward of :mod:`._composed`."""

import torch
from torch import Tensor

from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys
from mmicl_kernels.ops.shifted_attention import _composed
from mmicl_kernels.ops.shifted_attention.options import FARTHEST, Options


def forward(q, k, v, keys: VirtualKeys, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, ``gate_lse``, ``lse_low`` and ``a`` of ``new_results``; of no keys, as composed."""
    if q.numel() == 0 or k.shape[2] == 0:
        return _composed.forward(q, k, v, keys, options)
    q_starts = None if options.q_starts is None else options.q_starts.clamp(-FARTHEST, FARTHEST)
    out, lse, a = torch.ops.mmicl_cuda.shifted_attention_fwd(
        *map(_mappable, (q, k, v)), *keys, options.scale, options.causal, options.q_start,
        *map(_int32, (q_starts, options.kv_start, options.kv_end)), options.training,
    )  # fmt: skip
    return out, lse, lse.new_empty(0), lse.new_empty(0), a


backward = _composed.backward


def _mappable(x: Tensor) -> Tensor:
    """``x``, or a copy that the tensor memory accelerator reads: rows lie at multiples of 16 bytes."""
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    fits = x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides)
    return x if fits else x.contiguous()


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.int().contiguous()
