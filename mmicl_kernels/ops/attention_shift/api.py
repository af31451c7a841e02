"""The public op: contract, checks, dispatch."""

from torch import Tensor

from mmicl_kernels.ops._core.checks import Sizes, check_float, check_last_stride, check_same_device
from mmicl_kernels.ops._core.dispatch import require_triton, resolve
from mmicl_kernels.ops._core.layout import accumulation_dtype
from mmicl_kernels.ops._core.virtual_keys import check_virtual_keys
from mmicl_kernels.ops.attention_shift._op import attention_shift_op
from mmicl_kernels.ops.attention_shift.reference import attention_shift_reference


def attention_shift(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    adapter_ids: Tensor | None = None,
    prefix: bool | Tensor = False,
    impl: str = "auto",
) -> Tensor:
    """Shift an attention output per head: ``out + sigmoid(q.weight + bias - lse) * shift``.

    For any attention kernel that returns its log-sum-exp (MimIC, arXiv 2504.08851, section 3.2), with N
    virtual keys for one (HiFICL, arXiv 2603.12760)::

        g_n = q.weight_n + bias_n    p_n = exp(g_n - logaddexp(lse, logsumexp_n g_n))    mu = sum_n p_n
        out' = out + sum_n p_n shift_n,    or as a prefix    (1 - mu) out + sum_n p_n shift_n

    The gradient flows to all six tensors, ``lse`` included: an attention backward that ignores the gradient
    of its lse (FlashAttention 2 and 3 do) returns wrong gradients for q and k; use
    :func:`shifted_attention` to train.

    Args:
        out: attention output ``[B, H, T, D]``, fp16, bf16, fp32 or fp64.
        lse: its log-sum-exp ``[B, H, T]``, natural log, fp32 (fp64 when ``out`` is fp64). Where it is
            -inf or +inf, ``out`` is left unchanged.
        q: queries ``[B, H, T, D]`` after RoPE and not scaled, dtype of ``out``.
        weight, bias, shift: ``[H, D]``, ``[H]``, ``[H, D]``, any floating dtype; or N virtual keys (at most
            2048) of P heads, each for H / P neighbouring ones: ``[P, N, D]``, ``[P, N]``, ``[P, N, D]``. With
            ``adapter_ids`` stacked: ``[A, ...]``; without them a 3-D weight is no stack but P heads' keys. A
            key whose bias is -inf, and whose weight and shift are finite, is none.
        adapter_ids: int32 or int64 ``[B]``, or ``[B, T]`` for each query its own; -1 leaves it unchanged.
            Checked against A on CPU only.
        prefix: whether the virtual keys stand in one softmax with the others, which lose what they take;
            beside ``adapter_ids`` also bool ``[A]``.
        impl: "reference", "composed" (C++ on CPU if it was built, Triton on CUDA), "triton" or "auto".

    Returns:
        ``[B, H, T, D]`` in the dtype of ``out``, a new tensor whose ``transpose(1, 2)`` is contiguous
        (``reference``: elementwise layout).

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device or id, or an unknown ``impl``.
        NotImplementedError: an ``impl`` this op does not have. RuntimeError: "triton" on CPU tensors
        without ``TRITON_INTERPRET=1``.
    """
    _check(out, lse, q, weight, bias, shift, adapter_ids, prefix)
    adapter_ids = None if adapter_ids is None else adapter_ids.int()
    impl = resolve(impl, ("reference", "composed", "triton"), "composed", "attention_shift")
    if impl == "reference":
        return attention_shift_reference(out, lse, q, weight, bias, shift, adapter_ids, prefix)
    if impl == "triton":
        require_triton(q.device)
    prefixes = prefix if isinstance(prefix, Tensor) else None
    keys = adapter_ids, prefixes is None and prefix, prefixes
    return attention_shift_op(out, lse, q, weight, bias, shift, *keys, impl)


def _check(out, lse, q, weight, bias, shift, adapter_ids, prefix) -> None:
    sizes = Sizes()
    sizes.bind("out", out, "B H T D")
    sizes.bind("lse", lse, "B H T")
    sizes.bind("q", q, "B H T D")
    check_float("out", out)
    check_float("lse", lse, accumulation_dtype(out))
    check_float("q", q, out.dtype)
    check_last_stride("out", out)
    check_last_stride("q", q)
    check_virtual_keys(q, sizes["B"], weight, bias, shift, adapter_ids, prefix)
    prefixes = prefix if isinstance(prefix, Tensor) else None
    check_same_device(
        out=out, lse=lse, q=q, weight=weight, bias=bias, shift=shift, adapter_ids=adapter_ids, prefix=prefixes
    )
