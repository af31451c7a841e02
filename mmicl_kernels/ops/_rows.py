"""Chosen rows of ``[B, T, C]``: a mask, or indices of them; and who uses which row."""

import torch
from torch import Tensor

from mmicl_kernels.ops._checks import Sizes, check_range


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
