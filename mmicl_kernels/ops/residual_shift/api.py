"""The public op: contract, checks, dispatch."""

from torch import Tensor

from mmicl_kernels.ops._core.checks import Sizes, check_float, check_last_stride, check_same_device
from mmicl_kernels.ops._core.dispatch import require_triton, resolve
from mmicl_kernels.ops.residual_shift._op import residual_shift_op
from mmicl_kernels.ops.residual_shift.entries import check_entries, entries
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
    Entries whose coefficient ``strength * scale`` is 0 and ids of -1 are off: a token without another entry
    is ``x`` bit for bit, ``preserve_norm`` too; the coefficient's gradient is still that of the formula.

    Args:
        x: hidden states ``[B, T, C]``, fp16, bf16, fp32 or fp64, contiguous last dimension.
        vector: ``[C]``; ``[B, C]``, one of each batch row; or with ``adapter_ids`` ``[A, C]``. Any floating
            dtype.
        scale: a number, ``[]``, or beside a 2-D vector one of each of its rows; any floating dtype.
        adapter_ids: int32 or int64 ``[B]``; ``[B, K]`` for a sum of K entries per batch row; or ``[B, T, K]``
            for those of every token (two dimensions are never ``[B, T]``). -1 is none. Checked against A on
            CPU only.
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
