"""Entries, the sum of which is added to a batch row or to a token: each a vector, a scale, an id, a strength.

Kernels take ``vector [A, C]``, ``scale [1]`` or ``[A]`` (None for 1), ``adapter_ids`` and ``strengths``
``[B, K]`` or of every token ``[B, T, K]``, contiguous, in the accumulation dtype (Triton: in any). Without
ids ``A`` is 1, or B where every batch row has a vector of its own.
"""

from collections.abc import Sequence

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


def check_entries(
    sizes: Sizes,
    x: Tensor,
    vector: Tensor,
    scale: float | Tensor,
    adapter_ids: Tensor | None,
    strengths: Tensor | None,
) -> None:
    """Check ``vector [C]``, ``[B, C]`` or with ids ``[A, C]`` and what goes with it.

    ``sizes`` has B, T and C bound.
    """
    stack = _check_vector(sizes, vector, adapter_ids)
    _check_scale(sizes, x, scale, stack)
    if adapter_ids is None:
        if strengths is not None:
            raise ValueError("strengths were given without adapter_ids, expected both or a scale")
        return
    dims = adapter_ids.dim() if isinstance(adapter_ids, Tensor) else 1
    if dims not in (1, 2, 3):
        shape = list(adapter_ids.shape)
        raise ValueError(f"adapter_ids has shape {shape}, expected [B], [B, K] or [B, T, K]")
    pattern = ("B", "B K", "B T K")[dims - 1]
    sizes.bind("adapter_ids", adapter_ids, pattern)
    check_integer("adapter_ids", adapter_ids)
    check_range("adapter_ids", adapter_ids, -1, sizes["A"] - 1)
    if strengths is not None:
        sizes.bind("strengths", strengths, pattern)
        check_float("strengths", strengths)


def _check_vector(sizes: Sizes, vector: Tensor, adapter_ids: Tensor | None) -> str:
    """The letter of the stack that ``vector`` is, "" for none."""
    dims = vector.dim() if isinstance(vector, Tensor) else None  # what is no tensor is refused below
    if dims == 1 and adapter_ids is not None:
        raise ValueError(f"adapter_ids were given beside a 1-D vector {list(vector.shape)}, expected [A, C]")
    if dims == 2 and adapter_ids is None and len(vector) != sizes["B"]:
        expected = f"[B, C] with B = {sizes['B']}: a stack [A, C] needs adapter_ids"
        raise ValueError(f"vector has shape {list(vector.shape)} without adapter_ids, expected {expected}")
    stack = "A" if adapter_ids is not None else "B" if dims == 2 else ""
    sizes.bind("vector", vector, f"{stack} C")
    check_float("vector", vector)
    return stack


def _check_scale(sizes: Sizes, x: Tensor, scale: float | Tensor, stack: str) -> None:
    if is_number(scale):
        return check_fits("scale", scale)
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
    check_float("scale", scale)
    check_same_device(x=x, scale=scale)
    if scale.dim() > 0:
        if not stack:
            raise ValueError(f"scale has shape {list(scale.shape)}, expected [] beside a 1-D vector")
        sizes.bind("scale", scale, stack)


def entries(
    x: Tensor, scale: float | Tensor, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A scale on the device of ``x`` (None for 1), ids int32 and strengths ``[B, K]`` or ``[B, T, K]``."""
    if not isinstance(scale, Tensor):
        scale = None if scale == 1 else x.new_full((), scale, dtype=accumulation_dtype(x))
    if adapter_ids is not None:
        adapter_ids = adapter_ids.int()
        adapter_ids = adapter_ids[:, None] if adapter_ids.dim() == 1 else adapter_ids
    if strengths is not None and strengths.dim() == 1:
        strengths = strengths[:, None]
    return scale, adapter_ids, strengths


def per_token(adapter_ids: Tensor | None) -> bool:
    """Whether every token has entries of its own."""
    return adapter_ids is not None and adapter_ids.dim() == 3


def prepared(x: Tensor, impl: str, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """The parameters as the kernels take them: contiguous, and unless Triton reads them in fp32 or fp64."""
    if backend(impl, x.device) == "triton":
        return [p if p is None else p.contiguous() for p in parameters]
    return accumulated(x, *parameters)


def stacked(vector: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``vector [A, C]`` and ``scale [1]`` or ``[A]``, as the kernels take them."""
    vector = vector.unsqueeze(0) if vector.dim() == 1 else vector
    return vector, scale.unsqueeze(0) if scale is not None and scale.dim() == 0 else scale


def added_entries(
    vector: Tensor, scale: Tensor | None, adapter_ids: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is added, and where nothing is: ``[B, N, C]`` and ``[B, N, 1]``.

    N is T where every token has entries of its own, else 1; B is 1 for one vector without ids.
    """
    if adapter_ids is None:
        coefficient = vector.new_ones(1, 1) if scale is None else scale[:, None]
    else:
        coefficient = vector.new_ones(adapter_ids.shape) if strengths is None else strengths
        if scale is not None:
            coefficient = coefficient * of_entries(scale.expand(vector.shape[0]), adapter_ids)
        coefficient = coefficient.masked_fill(adapter_ids < 0, 0.0)
    coefficient = coefficient[..., None]
    zero = coefficient == 0
    if not per_token(adapter_ids):
        stacked = vector[:, None] if adapter_ids is None else of_entries(vector, adapter_ids)
        d = (coefficient * stacked).masked_fill(zero, 0.0).sum(1, keepdim=True)
        return d, zero.all(1, keepdim=True)
    d = vector.new_zeros(*adapter_ids.shape[:2], vector.shape[1])
    for k in range(adapter_ids.shape[2]):  # one after the other: K tensors of this size are never there
        term = coefficient[:, :, k] * of_entries(vector, adapter_ids[..., k])
        d += term.masked_fill(zero[:, :, k], 0.0)
    return d, zero.all(2)


def of_entries(parameter: Tensor, adapter_ids: Tensor) -> Tensor:
    """The ``[A, ...]`` parameter of every entry, in the shape of ``adapter_ids``; anything where it is -1."""
    if parameter.shape[0] == 0:
        return parameter.new_zeros(*adapter_ids.shape, *parameter.shape[1:])
    return parameter[adapter_ids.clamp(min=0).long()]
