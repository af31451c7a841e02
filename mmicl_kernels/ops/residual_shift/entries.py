"""Entries, the sum of which is added to a batch row: each a vector, a scale, an adapter's id, a strength.

Kernels take ``vector [A, C]``, ``scale [1]`` or ``[A]`` (None for 1), ``adapter_ids`` and ``strengths
[B, K]``, contiguous, in the accumulation dtype (Triton: in any); ``A = 1`` where there are no ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import (
    Sizes,
    check_fits,
    check_float,
    check_integer,
    check_range,
    check_same_device,
    is_number,
)
from mmicl_kernels.ops._core.dispatch import backend
from mmicl_kernels.ops._core.layout import accumulated, accumulation_dtype
from mmicl_kernels.ops._core.rows import sum_rows


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


def prepared(x: Tensor, impl: str, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """The parameters as the kernels take them: contiguous, and unless Triton reads them in fp32 or fp64."""
    if backend(impl, x.device) == "triton":
        return [p if p is None else p.contiguous() for p in parameters]
    return accumulated(x, *parameters)


def stacked(vector: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``vector [A, C]`` and ``scale [1]`` or ``[A]``, as the kernels take them."""
    vector = vector.unsqueeze(0) if vector.dim() == 1 else vector
    return vector, scale.unsqueeze(0) if scale is not None and scale.dim() == 0 else scale


def row_entries(
    vector: Tensor, scale: Tensor | None, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is added to the rows of each batch row ``[B, 1, C]``, and where nothing is; B is 1 without ids."""
    if adapter_ids is None:
        coefficient = vector.new_ones(1, 1) if scale is None else scale[:, None]
        stacked = vector[None]
    else:
        stacked = _of_entries(vector, adapter_ids)
        coefficient = vector.new_ones(adapter_ids.shape) if strengths is None else strengths
        if scale is not None:
            coefficient = coefficient * _of_entries(scale.expand(vector.shape[0]), adapter_ids)
        coefficient = coefficient.masked_fill(adapter_ids < 0, 0.0)
    zero = (coefficient == 0)[..., None]
    d = (coefficient[..., None] * stacked).masked_fill(zero, 0.0).sum(1, keepdim=True)
    return d, zero.all(1, keepdim=True)


def parameter_grads(
    impl: str, sums, vector, scale, adapter_ids, strengths, weight_sums=None, norm_weight=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dvector``, ``dscale`` in the parameters' shapes, ``dweight`` of a norm; None where no sums are."""
    if backend(impl, vector.device) == "triton":
        from mmicl_kernels.ops.residual_shift import _triton

        dvector, dscale, dweight = _triton.entry_grads(
            sums, *stacked(vector, scale), adapter_ids, strengths, weight_sums, norm_weight
        )
        if sums is None:
            return None, None, dweight
        dscale = None if scale is None else dscale.sum_to_size(scale.shape)
        return dvector.view(vector.shape), dscale, dweight
    dentry = (None, None) if sums is None else entry_grads(sums, vector, scale, adapter_ids, strengths)
    return *dentry, None if weight_sums is None else weight_sums.sum((0, 1))


def entry_grads(
    sums: Tensor,
    vector: Tensor,
    scale: Tensor | None,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``dvector`` and ``dscale`` from the gradients of the rows' entries ``[B, N, C]``.

    In the shapes of ``vector [C]`` or ``[A, C]`` and ``scale []`` or ``[A]``; None where there is no scale.
    """
    one = adapter_ids is None
    total = sums.sum((0, 1)) if one else _per_adapter(sums, adapter_ids, strengths, len(vector))
    if scale is None:
        return total, None
    dscale = (total * vector).sum(-1)
    if one:
        return total * scale, dscale
    unused = torch.isin(torch.arange(len(vector), device=sums.device), adapter_ids, invert=True)
    dvector = (total * scale.unsqueeze(-1)).masked_fill(unused[:, None], 0.0)
    return dvector, dscale.masked_fill(unused, 0.0).sum_to_size(scale.shape)


def strength_grads(sums: Tensor, vector: Tensor, scale: Tensor | None, adapter_ids: Tensor) -> Tensor:
    """``dstrengths [B, K]``; 0 where an id is -1."""
    grads = torch.einsum("bc,bkc->bk", sums.sum(1), _of_entries(vector, adapter_ids).to(sums.dtype))
    if scale is not None:
        grads = grads * _of_entries(scale.expand(vector.shape[0]), adapter_ids)
    return grads.masked_fill(adapter_ids < 0, 0.0)


def outputs(grads: Sequence[Tensor | None], given: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The gradients in the dtypes of what was given; empty, and no two one tensor, where there are none."""
    return [
        like.new_empty(0) if grad is None else grad.to(p.dtype) for grad, p in zip(grads, given, strict=True)
    ]


def fake_entry_grads(
    vector: Tensor, scale: Tensor | None, needed: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    if not needed:
        return like.new_empty(0), like.new_empty(0)
    dscale = like.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return vector.new_empty(vector.shape), dscale


def _of_entries(parameter: Tensor, adapter_ids: Tensor) -> Tensor:
    """The ``[A, ...]`` parameter of every entry ``[B, K, ...]``; anything where the id is -1."""
    if parameter.shape[0] == 0:
        return parameter.new_zeros(*adapter_ids.shape, *parameter.shape[1:])
    return parameter[adapter_ids.clamp(min=0).long()]


def _per_adapter(sums: Tensor, adapter_ids: Tensor, strengths: Tensor | None, A: int) -> Tensor:
    B, K = adapter_ids.shape
    entries = sums.sum(1)[:, None].expand(B, K, -1)
    if strengths is not None:
        entries = entries * strengths[..., None]
    return sum_rows(entries.flatten(0, 1), adapter_ids.flatten(), A)
