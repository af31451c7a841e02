"""The public op: contract, checks, dispatch."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import (
    FP32_MAX,
    FP32_TINY,
    Sizes,
    check_choice,
    check_float,
    check_integer,
    check_last_stride,
    check_range,
    check_same_device,
    is_number,
    is_readable,
    is_whole,
)
from mmicl_kernels.ops._core.dispatch import require_cuda, require_triton, resolve
from mmicl_kernels.ops._core.layout import last_dim_contiguous
from mmicl_kernels.ops._core.virtual_keys import check_virtual_keys
from mmicl_kernels.ops.shifted_attention._op import shifted_attention_op
from mmicl_kernels.ops.shifted_attention.dispatch import MAX_HEAD_DIM
from mmicl_kernels.ops.shifted_attention.options import FARTHEST, Options
from mmicl_kernels.ops.shifted_attention.reference import shifted_attention_reference

NORMALIZERS = ("visible", "all_keys")
IMPLEMENTATIONS = ("reference", "composed", "triton", "cuda")
WIDE = 2 * FARTHEST  # a window that hides nothing


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    q_start: int | Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    adapter_ids: Tensor | None = None,
    prefix: bool | Tensor = False,
    normalizer: str = "visible",
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention plus a per-head shift whose magnitude depends on the query.

    MimIC (arXiv 2504.08851) section 3.2, with ``s = softcap(scale * q.k)`` over the visible keys::

        lse = log sum exp(s)     out = softmax(s) v + sigmoid(q.weight + bias - lse) * shift

    With N virtual keys for one (HiFICL, arXiv 2603.12760; prefix tuning; attention sinks), as of
    :func:`attention_shift`; as a prefix they are keys and values before the others, without positions.
    A query that sees no key has ``out = 0`` and ``lse = -inf`` and contributes to no gradient. All
    conditions on what a query sees are ANDed. Key ``j`` is visible to query ``i`` of row ``b`` iff
    ``kv_start[b] <= j < kv_end[b]``; if ``causal``, ``j <= q_start[b] + i``; with ``window``,
    ``j > q_start[b] + i - window``; and ``mask``.

    Args:
        q: ``[B, H, T, D]`` after RoPE, fp16, bf16, fp32 or fp64, any strides with a contiguous last
            dimension. Packed: ``[1, H, N, D]``.
        k, v: ``[B, G, S, D]`` in q's dtype; H is a multiple of G. Packed: ``[1, G, N_k, D]``.
        weight, bias, shift: ``[H, D]``, ``[H]``, ``[H, D]``, any floating dtype; or N virtual keys of P
            heads, each for H / P neighbouring ones: ``[P, N, D]``, ``[P, N]``, ``[P, N, D]``. With
            ``adapter_ids`` stacked: ``[A, ...]``; without them a 3-D weight is no stack but P heads' keys. A
            key whose bias is -inf, and whose weight and shift are finite, is none.
        scale: of the scores, ``D**-0.5`` by default. softcap: ``s = softcap * tanh(s / softcap)``.
        window: number of keys a query sees to its left, itself included; at least 1. One that reaches
            from any position to any key (``sys.maxsize``) is none.
        q_start: absolute position of query 0, int or integer ``[B]``, within 2**29 of 0 (one beyond, in a
            tensor, counts as that); ``kv_end - T`` by default.
        kv_start, kv_end: first visible key and one past the last, integer ``[B]``; 0 and S by default.
        mask: bool (True keeps) or floating (added to the scores; only -inf hides), broadcastable to
            ``[B, H, T, S]``, without gradient.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]``, packed sequences; causal is aligned to
            each sequence's last key. max_seqlen_q, max_seqlen_k: their longest lengths, host ints; rows
            beyond are left uninitialised on CUDA.
            Not together with ``mask``, ``q_start``, ``kv_start``, ``kv_end``.
        adapter_ids: int32 or int64 ``[B]`` (packed: ``[sequences]``), or ``[B, T]`` for each query its own;
            -1 is no shift.
        prefix: whether the virtual keys stand in one softmax with the others, which lose what they take;
            beside ``adapter_ids`` also bool ``[A]``.
        normalizer: "visible", or "all_keys" as the official MimIC code has it: the gate's lse (only
            the gate's) runs over all ``j < kv_end``, whatever is hidden. A token's shift then depends
            on keys after it, so prefill and decode disagree; needed for official checkpoints.
        return_lse: also return the softmax's lse, differentiable.
        impl: "reference"; "composed", which loops over packed sequences and reads ``cu_seqlens`` on the
            host; "triton", one pass on CUDA for fp16, bf16 and fp32 with D <= 256; "cuda", one pass on Hopper
            for fp16 and bf16 with D 64 or 128, a scale above 0 and neither softcap, window, mask, packed
            sequences nor "all_keys"; or "auto".

    Returns:
        ``out [B, H, T, D]`` in q's dtype, ``out.transpose(1, 2)`` contiguous; with ``return_lse`` also
        ``lse [B, H, T]`` of the keys without the virtual ones, natural log, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device, range or combination, or an unknown
        ``normalizer`` or ``impl``. NotImplementedError: an ``impl`` this op does not have, or not for these
        inputs. RuntimeError: "triton" on CPU tensors without ``TRITON_INTERPRET=1``; "cuda" without its
        library or on another GPU.
        Ids, ``kv_start`` and ``kv_end`` are checked on CPU tensors only, ``q_start`` tensors never.
    """
    q, k, v = _autocast(q, k, v)
    sizes = _check_tensors(q, k, v, weight, bias, shift, adapter_ids, prefix, cu_seqlens_q)
    _check_scalars(scale, causal, window, softcap, normalizer)
    _check_bounds(sizes, q, q_start, kv_start, kv_end)
    _check_packed(
        sizes, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        q_start=q_start, kv_start=kv_start, kv_end=kv_end, mask=mask,
    )  # fmt: skip
    options = Options(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        causal=causal,
        window=None if window is None or window >= WIDE else int(window),
        q_start=None if q_start is None or isinstance(q_start, Tensor) else int(q_start),
        q_starts=q_start if isinstance(q_start, Tensor) else None,
        kv_start=kv_start,
        kv_end=kv_end,
        mask=_checked_mask(mask, q, k),
        cu_seqlens_q=None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        cu_seqlens_k=None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        max_seqlen_q=None if max_seqlen_q is None else min(int(max_seqlen_q), q.shape[2]),
        max_seqlen_k=None if max_seqlen_k is None else min(int(max_seqlen_k), k.shape[2]),
        adapter_ids=None if adapter_ids is None else adapter_ids.int().contiguous(),
        prefix=not isinstance(prefix, Tensor) and prefix,
        prefixes=prefix if isinstance(prefix, Tensor) else None,
        all_keys=normalizer == "all_keys",
        impl=resolve(impl, IMPLEMENTATIONS, "auto", "shifted_attention"),
    )
    if options.impl in _KERNEL_CHECKS:
        _KERNEL_CHECKS[options.impl](q, options)
    compute = shifted_attention_reference if options.impl == "reference" else shifted_attention_op
    out, lse = compute(q, k, v, weight, bias, shift, options)
    return (out, lse) if return_lse else out


def _check_triton(q: Tensor, options: Options) -> None:
    if q.dtype == torch.float64 or q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"impl='triton' has no {q.dtype} with head dim {q.shape[-1]}, only fp16, bf16 and fp32 up to "
            f"{MAX_HEAD_DIM}; use impl='composed'"
        )
    require_triton(q.device)


def _check_cuda(q: Tensor, options: Options) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in (64, 128):
        raise NotImplementedError(
            f"impl='cuda' has no {q.dtype} with head dim {q.shape[-1]}, only fp16 and bf16 with 64 and 128; "
            "use impl='composed'"
        )
    given = {
        "softcap": options.softcap is not None,
        "window": options.window is not None,
        "mask": options.mask is not None,
        "cu_seqlens_q": options.cu_seqlens_q is not None,
        "normalizer='all_keys'": options.all_keys,
        f"scale={options.scale}": options.scale <= 0,
    }
    lacking = [name for name, is_given in given.items() if is_given]
    if lacking:
        raise NotImplementedError(f"impl='cuda' has no {', '.join(lacking)}; use impl='triton' or 'composed'")
    require_cuda(q.device)


_KERNEL_CHECKS = {"triton": _check_triton, "cuda": _check_cuda}


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values in the autocast dtype, as SDPA does; fp64 stays."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else last_dim_contiguous(x.to(dtype)) for x in tensors)


def _check_tensors(q, k, v, weight, bias, shift, adapter_ids, prefix, cu_seqlens_q) -> Sizes:
    sizes = Sizes()
    sizes.bind("q", q, "B H T D")
    sizes.bind("k", k, "B G S D")
    if isinstance(v, Tensor) and v.dim() == 4 and v.shape[-1] != sizes["D"]:
        raise ValueError(f"v has head dim {v.shape[-1]}, expected {sizes['D']} like q and k")
    sizes.bind("v", v, "B G S D")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"] != 0:
        raise ValueError(
            f"q has {sizes['H']} heads, expected a multiple of the {sizes['G']} heads of k and v"
        )
    if sizes["D"] == 0:
        raise ValueError(f"q has shape {list(q.shape)}, expected a head dim of at least 1")
    check_float("q", q)
    for name, tensor in (("k", k), ("v", v)):
        check_float(name, tensor, q.dtype)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_stride(name, tensor)
    rows = sizes["B"]
    if isinstance(cu_seqlens_q, Tensor):
        rows = max(cu_seqlens_q.numel() - 1, 0)
    check_virtual_keys(q, rows, weight, bias, shift, adapter_ids, prefix)
    ids = {"adapter_ids": adapter_ids, "prefix": prefix if isinstance(prefix, Tensor) else None}
    check_same_device(q=q, k=k, v=v, weight=weight, bias=bias, shift=shift, **ids)
    return sizes


def _check_scalars(scale, causal, window, softcap, normalizer) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}, expected True or False")
    if scale is not None and not is_number(scale):
        raise TypeError(f"scale is a {type(scale).__name__}, expected a number or None")
    if scale is not None and not abs(scale) <= FP32_MAX:
        raise ValueError(f"scale is {scale!r:.40}, expected a finite number of fp32 or None")
    if window is not None and not (is_whole(window) and window >= 1):
        raise ValueError(f"window is {window!r}, expected an int of at least 1 or None")
    # Below the smallest normal number of fp32 it is 0 where kernels have it, and what is divided by it NaN.
    if softcap is not None and not (is_number(softcap) and FP32_TINY <= softcap <= FP32_MAX):
        raise ValueError(
            f"softcap is {softcap!r:.40}, expected a positive finite number of fp32 or None, "
            f"{FP32_TINY:.4g} to {FP32_MAX:.4g}"
        )
    check_choice("normalizer", normalizer, NORMALIZERS)


def _check_bounds(sizes: Sizes, q, q_start, kv_start, kv_end) -> None:
    for name, value in (("q_start", q_start), ("kv_start", kv_start), ("kv_end", kv_end)):
        if value is None:
            continue
        if name == "q_start" and is_whole(value):
            if abs(value) > FARTHEST:
                raise ValueError(f"q_start is {value}, expected a position within {FARTHEST} of 0")
            continue
        if not isinstance(value, Tensor):
            also = "an int, " if name == "q_start" else ""
            raise TypeError(f"{name} is {value!r}, expected {also}an integer tensor [B] or None")
        sizes.bind(name, value, "B")
        check_integer(name, value)
        check_same_device(q=q, **{name: value})
        if name != "q_start":
            check_range(name, value, 0, sizes["S"])


def _checked_mask(mask, q: Tensor, k: Tensor) -> Tensor | None:
    """``mask`` as a 4-D tensor."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        check_float("mask", mask)
    if mask.requires_grad:
        raise ValueError("mask requires grad, expected a mask without gradient")
    check_same_device(q=q, mask=mask)
    full = (*q.shape[:3], k.shape[2])
    tail = full[max(4 - mask.dim(), 0) :]
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape, tail, strict=True)):
        raise ValueError(f"mask has shape {list(mask.shape)}, expected one broadcastable to {list(full)}")
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _check_packed(sizes, q, k, cu_q, cu_k, max_q, max_k, **excluded) -> None:
    if cu_q is None and cu_k is None:
        if max_q is not None or max_k is not None:
            raise ValueError("max_seqlen_q and max_seqlen_k need cu_seqlens_q and cu_seqlens_k")
        return
    for name, value in excluded.items():
        if value is not None:
            raise ValueError(f"{name} cannot be given together with cu_seqlens_q and cu_seqlens_k")
    if sizes["B"] != 1:
        raise ValueError(f"q has batch size {sizes['B']}, expected 1 for packed sequences")
    for name, longest in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if not is_whole(longest) or longest < 0:
            raise ValueError(f"{name} is {longest!r}, expected a non-negative int beside cu_seqlens")
    packed = Sizes()
    _check_cu_seqlens(packed, "cu_seqlens_q", cu_q, q, max_q)
    _check_cu_seqlens(packed, "cu_seqlens_k", cu_k, k, max_k)


def _check_cu_seqlens(packed: Sizes, name: str, cu_seqlens, x: Tensor, longest: int) -> None:
    if cu_seqlens is None:
        raise ValueError(f"{name} is None, expected both cu_seqlens_q and cu_seqlens_k")
    packed.bind(name, cu_seqlens, "sequences+1")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {cu_seqlens.dtype}, expected torch.int32")
    check_same_device(q=x, **{name: cu_seqlens})
    if cu_seqlens.numel() == 0:
        raise ValueError(f"{name} is empty, expected [0, ..., total]")
    if not is_readable(cu_seqlens):
        return
    lengths = cu_seqlens.long().diff()
    total = x.shape[2]
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(f"{name} is {cu_seqlens.tolist()}, expected a rise from 0 to {total}")
    if lengths.numel() > 0 and int(lengths.max()) > longest:
        raise ValueError(f"max_seqlen{name[-2:]} is {longest}, expected at least {int(lengths.max())}")
