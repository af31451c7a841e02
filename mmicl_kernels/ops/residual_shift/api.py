"""The public op: contract, checks, dispatch."""

from torch import Tensor

from mmicl_kernels.ops._checks import (
    Sizes,
    check_fits,
    check_float,
    check_integer,
    check_last_stride,
    check_range,
    check_same_device,
    is_number,
)
from mmicl_kernels.ops._impl import require_triton, resolve
from mmicl_kernels.ops.attention_shift._composed import accumulation_dtype
from mmicl_kernels.ops.residual_shift._op import residual_shift_op
from mmicl_kernels.ops.residual_shift.reference import residual_shift_reference


def residual_shift(
    x: Tensor,
    vector: Tensor,
    scale: float | Tensor = 1.0,
    *,
    preserve_norm: bool = False,
    adapter_ids: Tensor | None = None,
    strengths: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add a vector to every token of the residual stream: ``y = x + scale * vector``.

    M2IV (arXiv 2504.04633); with ``preserve_norm`` rescaled to the length of ``x``, ``y * |x| / |y|``, as
    LIVE (arXiv 2406.13185) does, where a row of ``x`` or ``y`` without length gives 0 and no gradient.
    Entries whose coefficient ``strength * scale`` is 0 and ids of -1 are off: a row without another entry
    is ``x`` bit for bit, ``preserve_norm`` too; the coefficient's gradient is still that of the formula.

    Args:
        x: hidden states ``[B, T, C]``, fp16, bf16, fp32 or fp64, contiguous last dimension.
        vector: ``[C]``, or with ``adapter_ids`` ``[A, C]``; any floating dtype.
        scale: a number, ``[]``, or beside a stacked vector ``[A]``; any floating dtype.
        adapter_ids: int32 or int64 ``[B]``, or ``[B, K]`` for a sum of K entries per row; -1 is none.
            Checked against A on CPU only.
        strengths: the entries' weights in the shape of ``adapter_ids``, any floating dtype; 1 if None.
        impl: "reference", "composed" (C++ on CPU if it was built, Triton on CUDA), "triton" or "auto".

    Returns:
        ``[B, T, C]`` in the dtype of ``x``, a new tensor: in the layout of ``x`` where that is dense, else
        contiguous (``reference``: elementwise layout).

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device or id, or an unknown ``impl``.
        NotImplementedError: an ``impl`` this op does not have. RuntimeError: "triton" on CPU tensors
        without ``TRITON_INTERPRET=1``.
    """
    sizes = Sizes()
    sizes.bind("x", x, "B T C")
    check_float("x", x)
    check_last_stride("x", x)
    check_entries(sizes, x, vector, scale, adapter_ids, strengths)
    check_same_device(x=x, vector=vector, adapter_ids=adapter_ids, strengths=strengths)
    scale, adapter_ids, strengths = entries(x, scale, adapter_ids, strengths)
    impl = resolve(impl, ("reference", "composed", "triton"), "composed", "residual_shift")
    if impl == "reference":
        return residual_shift_reference(x, vector, scale, adapter_ids, strengths, preserve_norm)
    if impl == "triton":
        require_triton(x.device)
    return residual_shift_op(x, vector, scale, adapter_ids, strengths, bool(preserve_norm), impl)


def check_entries(
    sizes: Sizes,
    x: Tensor,
    vector: Tensor,
    scale: float | Tensor,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
) -> None:
    """Check ``vector [C]`` or with ids ``[A, C]`` and what goes with it; ``sizes`` has B and C bound."""
    if isinstance(vector, Tensor) and vector.dim() == 2 and adapter_ids is None:
        raise ValueError(f"vector has shape {list(vector.shape)}: a 2-D vector needs adapter_ids, got None")
    if isinstance(vector, Tensor) and vector.dim() == 1 and adapter_ids is not None:
        raise ValueError(f"adapter_ids were given beside a 1-D vector {list(vector.shape)}, expected [A, C]")
    sizes.bind("vector", vector, "C" if adapter_ids is None else "A C")
    check_float("vector", vector)
    _check_scale(sizes, x, scale)
    if adapter_ids is None:
        if strengths is not None:
            raise ValueError("strengths were given without adapter_ids, expected both or a scale")
        return
    several = isinstance(adapter_ids, Tensor) and adapter_ids.dim() == 2
    sizes.bind("adapter_ids", adapter_ids, "B K" if several else "B")
    check_integer("adapter_ids", adapter_ids)
    check_range("adapter_ids", adapter_ids, -1, sizes["A"] - 1)
    if strengths is not None:
        sizes.bind("strengths", strengths, "B K" if several else "B")
        check_float("strengths", strengths)


def _check_scale(sizes: Sizes, x: Tensor, scale: float | Tensor) -> None:
    if is_number(scale):
        return check_fits("scale", scale)
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
    check_float("scale", scale)
    check_same_device(x=x, scale=scale)
    if scale.dim() > 0:
        if "A" not in sizes:
            raise ValueError(f"scale has shape {list(scale.shape)}, expected [] beside a 1-D vector")
        sizes.bind("scale", scale, "A")


def entries(
    x: Tensor, scale: float | Tensor, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A scale on the device of ``x`` (None for 1), ids ``[B, K]`` int32, strengths ``[B, K]``."""
    if not isinstance(scale, Tensor):
        scale = None if scale == 1 else x.new_full((), scale, dtype=accumulation_dtype(x))
    if adapter_ids is not None:
        adapter_ids = adapter_ids.int()
        adapter_ids = adapter_ids[:, None] if adapter_ids.dim() == 1 else adapter_ids
    if strengths is not None and strengths.dim() == 1:
        strengths = strengths[:, None]
    return scale, adapter_ids, strengths
