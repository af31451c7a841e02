"""The public op: contract, checks, dispatch."""

from torch import Tensor

from mmicl_kernels.ops._core.checks import (
    Sizes,
    check_fits,
    check_float,
    check_last_stride,
    check_same_device,
    is_number,
)
from mmicl_kernels.ops._core.dispatch import require_triton, resolve
from mmicl_kernels.ops.residual_shift.entries import check_entries, entries
from mmicl_kernels.ops.residual_shift_rms_norm._op import residual_shift_rms_norm_op
from mmicl_kernels.ops.residual_shift_rms_norm.reference import residual_shift_rms_norm_reference


def residual_shift_rms_norm(
    x: Tensor,
    residual: Tensor,
    vector: Tensor,
    scale: float | Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    adapter_ids: Tensor | None = None,
    strengths: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual add, shift and the RMSNorm that follows: ``h = residual + x + scale * vector``, and its norm.

    For own blocks and importing libraries (M2IV, arXiv 2504.04633). ``h`` is summed in fp32 (fp64 for fp64)
    and rounded once; the norm reads the rounded ``h``, as the norm of the next layer would. With
    ``weight_offset=0`` as transformers' ``LlamaRMSNorm``: the normalised row is rounded to the dtype of
    ``x`` before the product with the weight. With another as ``GemmaRMSNorm`` (which has 1): times
    ``weight_offset + weight``, rounded once. Where all entries are off ``h = residual + x``.

    Args:
        x, residual: ``[B, T, C]``, one dtype of fp16, bf16, fp32 and fp64, contiguous last dimension.
        vector, scale, adapter_ids, strengths: as in :func:`mmicl_kernels.ops.residual_shift`.
        norm_weight: ``[C]``, any floating dtype.
        eps: added to the mean square, at least 0. weight_offset: added to the weight.
        impl: "reference", "composed" (C++ on CPU if it was built, Triton on CUDA), "triton" or "auto".

    Returns:
        ``(normed, h)``, each ``[B, T, C]`` in the dtype of ``x``, in the layout of ``x`` where that is
        dense, else contiguous (``reference``: elementwise layout).

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device, id or ``eps``, or an unknown ``impl``.
        NotImplementedError: an ``impl`` this op does not have. RuntimeError: "triton" on CPU tensors
        without ``TRITON_INTERPRET=1``.
    """
    _check(x, residual, norm_weight, eps, weight_offset, vector, scale, adapter_ids, strengths)
    scale, adapter_ids, strengths = entries(x, scale, adapter_ids, strengths)
    numbers = (float(eps), float(weight_offset))
    arguments = (x, residual, vector, scale, norm_weight, adapter_ids, strengths, *numbers)
    impl = resolve(impl, ("reference", "composed", "triton"), "composed", "residual_shift_rms_norm")
    if impl == "reference":
        return residual_shift_rms_norm_reference(*arguments)
    if impl == "triton":
        require_triton(x.device)
    return residual_shift_rms_norm_op(*arguments, impl)


def _check(x, residual, norm_weight, eps, weight_offset, vector, scale, adapter_ids, strengths) -> None:
    sizes = Sizes()
    sizes.bind("x", x, "B T C")
    check_float("x", x)
    check_last_stride("x", x)
    sizes.bind("residual", residual, "B T C")
    check_float("residual", residual, x.dtype)
    check_last_stride("residual", residual)
    check_entries(sizes, x, vector, scale, adapter_ids, strengths)
    sizes.bind("norm_weight", norm_weight, "C")
    check_float("norm_weight", norm_weight)
    check_same_device(x=x, residual=residual, vector=vector, norm_weight=norm_weight)
    check_same_device(x=x, adapter_ids=adapter_ids, strengths=strengths)
    for name, value in (("eps", eps), ("weight_offset", weight_offset)):
        if not is_number(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        check_fits(name, value)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected at least 0")
