"""Attention and shift in one pass over the keys, in Triton: the kernels of ``impl="triton"``.

Tensors have any strides with a contiguous last dimension; ``[B, H, T, D]`` results are stored so that
``transpose(1, 2)`` is contiguous. Nothing is read on the host.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops.attention_shift.kernels import backend_kernels
from mmicl_kernels.ops.shifted_attention._triton import launch
from mmicl_kernels.ops.shifted_attention._triton.bwd import (
    shifted_attention_dkdv_kernel,
    shifted_attention_dq_kernel,
)
from mmicl_kernels.ops.shifted_attention._triton.fwd import (
    shifted_attention_combine_kernel,
    shifted_attention_fwd_kernel,
)
from mmicl_kernels.ops.shifted_attention.options import SMALLEST_SCALE, Options, new_results


class Problem(NamedTuple):
    """Sizes and visibility of one call, as all kernels take them.

    B sequences of up to T queries and S keys, in storages of N and N_K rows; they differ where packed.
    """

    B: int
    H: int
    G: int
    T: int
    S: int
    N: int
    N_K: int
    D: int
    causal: bool
    window: int | None
    q_start: int | None
    mask: Tensor | None
    mask_strides: tuple[int, ...]
    fold: bool
    is_general: bool
    precision: str

    @staticmethod
    def of(q: Tensor, k: Tensor, options: Options) -> "Problem":
        (B, H, N, D), (G, N_K) = q.shape, k.shape[1:3]
        T, S = N, N_K
        if options.cu_seqlens_q is not None:
            B, T, S = options.cu_seqlens_q.numel() - 1, options.max_seqlen_q, options.max_seqlen_k
        visibility = options.visibility
        if options.cu_seqlens_q is None:
            visibility = visibility.simplified(T, S)
        q_start = visibility.q_start
        mask, strides = options.mask, (0, 0, 0, 0)
        if mask is not None:
            strides = mask.expand(q.shape[0], H, N, N_K).stride()
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        is_bounded = options.cu_seqlens_q is not None or options.kv_end is not None
        is_special = mask is not None or options.softcap is not None or options.all_keys
        exact = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        return Problem(
            *(B, H, G, T, S, N, N_K, D),
            causal=visibility.causal,
            window=visibility.window,
            q_start=q_start if isinstance(q_start, int) else None,
            mask=mask,
            mask_strides=strides,
            fold=options.scale > SMALLEST_SCALE and options.softcap is None and not options.is_mask_added,
            is_general=is_bounded or is_special,
            precision="ieee" if exact else "tf32",
        )


def forward(q, k, v, parameters, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, ``gate_lse``, ``lse_low``, ``a`` (empty where not needed); parameters are stacked."""
    results = new_results(q, options)
    problem = Problem.of(q, k, options)
    B, H, G, T, S, N, _, D, *_ = problem
    if q.numel() == 0 or B * T == 0:
        return results
    BD = launch.block_head_dim(D)
    pack = H // G if T * (H // G) <= launch.DECODE_ROWS else 1
    rows = T * pack
    config = launch.config(launch.forward_kernel(rows), problem.is_general, BD, k, v)
    programs = B * (H // pack) * triton.cdiv(rows, config.BM)
    splits = launch.splits(programs, S, q.device) if rows <= launch.DECODE_ROWS else 1
    part_acc = part_norms = None
    if splits > 1:
        part_acc = q.new_empty(splits, B, H // pack, rows, D, dtype=torch.float32)
        part_norms = part_acc.new_empty(4 if options.all_keys else 2, *part_acc.shape[:-1])

    tiles, use_tma = _tiles(config, BD, (k, config.BN), (v, config.BN))
    adapter_ids, saved = options.adapter_ids, (*results[:2], *map(_or_none, results[2:]))
    with torch.cuda.device_of(q):
        shifted_attention_fwd_kernel[(programs * splits,)](
            q, *tiles, *parameters, *_visibility(problem, options), adapter_ids, *saved, part_acc, part_norms,
            *_strides(q, k, v), *problem.mask_strides,
            options.scale, options.softcap, problem.window, problem.q_start, B, H, T, S, N, splits,
            D, H // G, pack, problem.causal, options.all_keys, problem.fold, config.BM, config.BN, BD,
            problem.precision, use_tma, **launch.options(config),
        )  # fmt: skip
        if splits > 1:
            shifted_attention_combine_kernel[(B * H * T,)](
                part_acc, part_norms, q, *parameters, adapter_ids, options.cu_seqlens_q, *saved, *_strides(q),
                options.scale, B, H, T, N, splits,
                D, pack, options.all_keys, problem.fold, triton.next_power_of_2(splits), BD,
                num_warps=launch.COMBINE_WARPS,
            )  # fmt: skip
    return results


def backward(dout, dlse, results, need_dqkv, qkv, parameters, options: Options):
    """``dq, dk, dv`` (empty unless needed) and the gradients of the stacked parameters.

    ``results`` are ``a``, ``lse``, ``gate_lse`` and ``lse_low`` of the forward, with lse in place of an empty
    gate_lse.
    """
    q, k, v = qkv
    a, lse, gate_lse, lse_low = results
    dg, delta, dparameters = backend_kernels("triton", q.device).attention_delta(
        dout, dlse, gate_lse, q, parameters, options.adapter_ids, a, not options.all_keys,
        options.cu_seqlens_q, options.max_seqlen_q,
    )  # fmt: skip
    if not need_dqkv:
        return [x.new_empty(0) for x in qkv], dparameters
    dqkv = [new_heads(x) for x in qkv]
    problem = Problem.of(q, k, options)
    B, H, G, T, S, N, N_K, D, *_ = problem
    if q.numel() == 0 or k.numel() == 0 or B * T == 0 or S == 0:
        dqkv = [x.zero_() for x in dqkv]
    if q.numel() == 0 or B * T == 0:
        return dqkv, dparameters

    rows = lse, _or_none(lse_low), delta, gate_lse if options.all_keys else None, dg
    scalars = options.scale, options.softcap, problem.window, problem.q_start, B, H, T, S, N
    visibility, strides = _visibility(problem, options), (*_strides(q, k, v, dout), *problem.mask_strides)
    BD, constants = launch.block_head_dim(D), (problem.causal, options.all_keys, problem.fold)
    with torch.cuda.device_of(q):
        config = launch.config("dq", problem.is_general, BD, q, k, v, dout)
        tiles, use_tma = _tiles(config, BD, (q, config.BM), (k, config.BN), (v, config.BN), (dout, config.BM))
        shifted_attention_dq_kernel[(B * H * triton.cdiv(T, config.BM),)](
            *tiles, parameters[0], *rows, *visibility, options.adapter_ids, dqkv[0],
            *strides, *scalars, D, H // G, *constants, config.BM, config.BN, BD,
            problem.precision, use_tma, **launch.options(config),
        )  # fmt: skip
        if B * S == 0 or k.numel() == 0:
            return dqkv, dparameters
        config = launch.config("dkdv", problem.is_general, BD, q, k, v, dout)
        programs = B * G * triton.cdiv(S, config.BN)
        heads = H // G if programs >= launch.multiprocessors(q.device) else 1
        dk, dv = dqkv[1:]
        if heads < H // G:
            dk, dv = (q.new_empty(x.shape[0], N_K, H, D, dtype=torch.float32) for x in (k, v))
        tiles, use_tma = _tiles(config, BD, (q, config.BM), (k, config.BN), (v, config.BN), (dout, config.BM))
        shifted_attention_dkdv_kernel[(programs * (H // G) // heads,)](
            *tiles, *rows, *visibility, dk, dv,
            *strides, *scalars, N_K, D, H // G, heads, *constants, config.BM, config.BN, BD,
            problem.precision, use_tma, **launch.options(config),
        )  # fmt: skip
    if heads < H // G:
        for total, part in zip(dqkv[1:], (dk, dv), strict=True):
            total.copy_(part.unflatten(2, (G, -1)).sum(3).transpose(1, 2))
    return dqkv, dparameters


def _visibility(problem: Problem, options: Options) -> tuple[Tensor | None, ...]:
    """The tensors of what queries see, in the kernels' order."""
    bounds = (options.q_starts, options.kv_start, options.kv_end)
    bounds = (None if x is None else x.contiguous() for x in bounds)
    return *bounds, problem.mask, options.cu_seqlens_q, options.cu_seqlens_k


def _tiles(config: launch.LaunchConfig, BD: int, *operands: tuple[Tensor, int]) -> tuple[list, bool]:
    """The tensors, or descriptors of their tiles ``[rows, BD]`` where the config and all strides allow it."""
    if not (config.TMA and all(launch.has_descriptor(x) for x, _ in operands)):
        return [x for x, _ in operands], False
    return [launch.descriptor(x, rows, BD) for x, rows in operands], True


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of B, heads and rows; that of D is 1."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None or x.numel() == 0 else x
