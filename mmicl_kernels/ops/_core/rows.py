"""Chosen rows of ``[B, T, C]``, by mask or indices: who uses which row, copies and sums in plain PyTorch.

An index outside of the ``B * T`` rows is none: it reads zeros and adds nothing.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import Sizes, check_range


def check_rows(sizes: Sizes, rows: Tensor) -> None:
    """Check a bool mask ``[B, T]``, or int32 or int64 indices ``[N]`` of ``B * T`` rows, -1 for none.

    ``sizes`` must have B and T bound.
    """
    is_mask = isinstance(rows, Tensor) and rows.dtype == torch.bool
    sizes.bind("rows", rows, "B T" if is_mask else "N")
    if is_mask:
        return
    if rows.dtype not in (torch.int32, torch.int64):
        expected = "torch.bool, torch.int32 or torch.int64"
        raise TypeError(f"rows has dtype {rows.dtype}, expected {expected}")
    check_range("rows", rows, -1, sizes["B"] * sizes["T"] - 1)


def index_of(rows: Tensor, num_rows: int | None) -> Tensor:
    """``[N]`` int64: indices as they are; those of a mask ``[B, T]``, in order of batch, then token.

    With ``num_rows`` the host need not wait for a mask to be counted: ``B * T``, which is none, stands where
    it has fewer rows, and the first ones are taken where it has more.
    """
    if rows.dtype != torch.bool:
        return rows.long()
    if num_rows is None:
        return rows.flatten().nonzero()[:, 0]
    # The k-th row is the first at which k have been counted.
    return torch.searchsorted(rows.flatten().cumsum(0), torch.arange(1, num_rows + 1, device=rows.device))


def uses_of(index: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """``order [N]`` and ``starts [R + 1]``: ``order[starts[r]:starts[r + 1]]`` use row r, in their order."""
    ascending, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ascending, torch.arange(R + 1, device=index.device))


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """``[N, C]``: the rows ``index`` of ``hidden [B, T, C]``."""
    B, T, C = hidden.shape
    if B * T == 0:
        return hidden.new_zeros(index.shape[0], C)
    inside = index.clamp(0, B * T - 1)
    # Not of the flattened tensor, which would be a copy of it where batch rows are not next to each other.
    return clear_rows_(hidden[inside // T, inside % T], index, B * T)


def scatter_rows(dx: Tensor, index: Tensor, B: int, T: int) -> Tensor:
    """``[B, T, C]`` contiguous: every row's sum of the ``dx [N, C]`` that belong to it, in their order."""
    return sum_rows(dx, index, B * T).view(B, T, dx.shape[1])


def clear_rows_(x: Tensor, index: Tensor, R: int) -> Tensor:
    """``x [N, D]``, contiguous, with zeros where ``index`` is none of R rows; in place."""
    outside = (index < 0) | (index >= R)
    if x.device.type == "cpu":  # where counting them is free, few rows or none are touched instead of all
        return x.index_fill_(0, outside.nonzero()[:, 0], 0)
    return x.masked_fill_(outside[:, None], 0)


def sum_rows(rows: Tensor, numbers: Tensor, R: int) -> Tensor:
    """``[R, ...]``: for every number the sum of those ``rows [N, ...]`` that have it, in their order.

    A number outside of ``[0, R)`` is none. Rows of other numbers may hold NaN: none is multiplied by 0.
    """
    numbers = numbers.long().masked_fill((numbers < 0) | (numbers >= R), R)  # one more row takes what is none
    total = rows.new_zeros(R + 1, *rows.shape[1:])
    # Of the two the one that adds in a fixed order, on CPU in fp32.
    if rows.device.type == "cpu":
        total.index_add_(0, numbers, rows)
    else:
        total.index_put_((numbers,), rows, accumulate=True)
    return total[:R]
