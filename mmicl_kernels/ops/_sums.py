"""Sums of rows that have a number each, in plain PyTorch."""

from torch import Tensor


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
