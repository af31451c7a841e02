"""The public op: contract, checks, dispatch, and what the rows' squares make a loss of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import (
    Sizes,
    check_choice,
    check_float,
    check_last_stride,
    is_readable,
)
from mmicl_kernels.ops._core.dispatch import require_triton, resolve
from mmicl_kernels.ops._core.rows import check_rows, index_of
from mmicl_kernels.ops.alignment_loss._op import alignment_squares_op
from mmicl_kernels.ops.alignment_loss.reference import alignment_loss_reference

FORMS = ("relative", "mean_square")


def alignment_loss(
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Tensor,
    *,
    form: str = "relative",
    impl: str = "auto",
) -> Tensor:
    """How far chosen tokens' states are from a teacher's, as a mean over layers.

    With ``d_n = |x_n - y_n|^2`` and ``s_n = |x_n|^2 + |y_n|^2`` of the N rows a layer's loss is
    ``mean(d / s)`` ("relative"), between 0 and 2 and without a scale of its own, or ``sum d / (N C)``
    ("mean_square": MimIC, arXiv 2504.08851, section 3.3). A row whose ``s_n`` is 0 has 0 of "relative", and
    no gradient; so has a call without rows. States are read in place: no layers are stacked, no rows copied,
    nothing is made wide.

    Args:
        states: the student's, ``[B, T, C]`` of each of L layers, fp16, bf16, fp32 or fp64, contiguous last
            dimension. C may differ between layers, and so may the device.
        targets: the teacher's, ``[N, C]`` of each layer, on the device of its states, any of the dtypes,
            contiguous last dimension; without gradient.
        rows: where the targets' tokens are among the states: a bool mask ``[B, T]`` of N in order of batch,
            then token; or int32 or int64 ``[N]``, rows ``b * T + t``, -1 for none, which does not count. One
            given twice counts twice. On any device. Checked on CPU only.
        form: "relative" or "mean_square".
        impl: "reference", "composed" (C++ on CPU if it was built, Triton on CUDA), "triton" or "auto".

    Returns:
        ``[]`` in fp32, or fp64 where states are, on the device of the first layer. NaN and infinities of
        chosen rows are in it, others' are not.

    Raises:
        TypeError: no sequence, or a dtype. ValueError: a number of layers, a shape, stride, device, index, a
        mask's count, targets that require grad, an unknown ``form`` or ``impl``.
        NotImplementedError: an ``impl`` this op does not have. RuntimeError: "triton" on CPU tensors
        without ``TRITON_INTERPRET=1``.
    """
    check_choice("form", form, FORMS)
    impl, index = _checked(states, targets, rows, impl)
    if impl == "reference":
        return alignment_loss_reference(states, targets, index, form)
    d, s = alignment_squares_op(states, targets, index, impl)
    shares = _shares(_on_first(d), _on_first(s)) if form == "relative" else _on_first(_per_column(d, states))
    return shares.sum() / _count(index, states[0]) / len(states)


def _checked(
    states: Sequence[Tensor], targets: Sequence[Tensor], rows: Tensor, impl: str
) -> tuple[str, Tensor]:
    """The implementation, and the index of every row; raises what the op says."""
    for name, layers in (("states", states), ("targets", targets)):
        if not isinstance(layers, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(layers).__name__}")
    if not states or len(states) != len(targets):
        raise ValueError(
            f"states has {len(states)} layers and targets {len(targets)}, expected as many, 1 or more"
        )
    sizes = Sizes()
    for i, (x, y) in enumerate(zip(states, targets, strict=True)):
        sizes.pop("C", None)
        _check_layer(sizes, f"states[{i}]", x, f"targets[{i}]", y)
    check_rows(sizes, rows)
    N = targets[0].shape[0]
    if rows.dtype == torch.bool and is_readable(rows) and (count := int(rows.count_nonzero())) != N:
        raise ValueError(f"rows has {count} rows, expected the {N} that targets has")
    impl = resolve(impl, ("reference", "composed", "triton"), "composed", "alignment_loss")
    if impl == "triton":
        for x in states:
            require_triton(x.device)
    return impl, index_of(rows, N)


def _check_layer(sizes: Sizes, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    sizes.bind(x_name, x, "B T C")
    sizes.bind(y_name, y, "N C")
    for name, tensor in ((x_name, x), (y_name, y)):
        check_float(name, tensor)
        check_last_stride(name, tensor)
    if y.device != x.device:
        raise ValueError(f"{y_name} is on {y.device}, expected {x.device} like {x_name}")
    if y.requires_grad:
        raise ValueError(f"{y_name} requires grad, expected a teacher's states without")


def _on_first(layers: Sequence[Tensor]) -> Tensor:
    """``[L, N]`` on the device of the first."""
    return torch.stack([x.to(layers[0].device) for x in layers])


def _count(index: Tensor, states: Tensor) -> Tensor:
    """The number of rows that are some, at least 1."""
    is_row = (index >= 0) & (index < states.shape[0] * states.shape[1])
    return is_row.sum().clamp(min=1).to(states.device)


def _per_column(d: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
    return [squares / max(x.shape[-1], 1) for squares, x in zip(d, states, strict=True)]


def _shares(d: Tensor, s: Tensor) -> Tensor:
    """``d / s``, 0 where ``s`` is, without gradient there."""
    zero = s < torch.finfo(s.dtype).tiny  # whose inverse overflows
    return (d / s.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
