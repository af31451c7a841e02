"""Gradients of entries from ``sums``: those of what was added, by batch row in N parts, or by token.

``sums [B, N, C]`` add up over N to the gradient of every batch row's entries. Where every token has entries
of its own ``sums [B, T, C]`` are theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import backend, kernels_of
from mmicl_kernels.ops._core.rows import sum_rows
from mmicl_kernels.ops.residual_shift import _torch
from mmicl_kernels.ops.residual_shift.entries import of_entries, per_token, stacked

_kernels = kernels_of(__package__, _torch)


def parameter_grads(
    impl: str, sums, vector, scale, adapter_ids, strengths, weight_sums=None, norm_weight=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dvector``, ``dscale`` in the parameters' shapes, ``dweight`` of a norm; None where no sums are."""
    if sums is not None and per_token(adapter_ids):
        # As of rows that have one entry each: the tokens of one adapter are one.
        sums, adapter_ids = _kernels(impl, vector.device).adapter_sums(
            sums, adapter_ids, strengths, len(vector)
        )
        *dentry, _ = parameter_grads(impl, sums, vector, scale, adapter_ids, None)
        return *dentry, parameter_grads(impl, None, vector, None, None, None, weight_sums, norm_weight)[2]
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

    In the shapes of ``vector [C]``, ``[A, C]`` or ``[B, C]`` and ``scale []``, ``[A]`` or ``[B]``; None where
    there is no scale.
    """
    if adapter_ids is not None:
        total = _per_adapter(sums, adapter_ids, strengths, len(vector))
    else:
        total = sums.sum((0, 1) if vector.dim() == 1 else 1)
    if scale is None:
        return total, None
    dscale = (total * vector).sum(-1)
    if vector.dim() == 1:
        return total * scale, dscale
    dvector = total * scale.unsqueeze(-1)
    if adapter_ids is not None:
        unused = torch.isin(torch.arange(len(vector), device=sums.device), adapter_ids, invert=True)
        dvector, dscale = dvector.masked_fill(unused[:, None], 0.0), dscale.masked_fill(unused, 0.0)
    return dvector, dscale.sum_to_size(scale.shape)


def strength_grads(
    impl: str, sums: Tensor, vector: Tensor, scale: Tensor | None, adapter_ids: Tensor
) -> Tensor:
    """``dstrengths`` in the shape of ``adapter_ids``; 0 where an id is -1."""
    if per_token(adapter_ids):
        grads = _kernels(impl, sums.device).entry_products(sums, vector, adapter_ids)
    else:
        of_rows = of_entries(vector, adapter_ids).to(sums.dtype)
        grads = torch.einsum("bc,bkc->bk", sums.sum(1), of_rows)
    if scale is not None:
        grads = grads * of_entries(scale.expand(vector.shape[0]), adapter_ids)
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


def _per_adapter(sums: Tensor, adapter_ids: Tensor, strengths: Tensor | None, A: int) -> Tensor:
    B, K = adapter_ids.shape
    entries = sums.sum(1)[:, None].expand(B, K, -1)
    if strengths is not None:
        entries = entries * strengths[..., None]
    return sum_rows(entries.flatten(0, 1), adapter_ids.flatten(), A)
