"""Right before fast, at the very shapes that are timed: outputs against fp64, as near as plain PyTorch is.

Parts of the output are compared, because the whole would not fit in fp64: of a forward the first, middle
and last rows, in the first and the last batch row, where an offset overflows first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmicl_kernels.testing.budgets import assert_within_budget

ROWS = 128  # queries in a part of a forward


@dataclass(frozen=True)
class Part:
    """A part of one output: which output, which of its elements, and what they must be near."""

    name: str
    output: int
    index: tuple[slice, ...]
    low: Tensor | tuple[Tensor, ...]  # of several the worst counts
    exact: Tensor


def find_fault(parts: Sequence[Part], outputs: Tensor | Sequence[Tensor]) -> str | None:
    """What is wrong with the outputs of a provider, in one line, or None.

    The tolerance is that of :func:`mmicl_kernels.testing.budgets.assert_within_budget`.
    """
    outputs = as_tuple(outputs)
    try:
        for part in parts:
            actual = outputs[part.output].detach()[part.index]
            assert_within_budget(part.name, actual, part.low, part.exact)
    except AssertionError as error:
        return str(error)
    return None


def corners(B: int, T: int) -> list[tuple[int, slice]]:
    """The first and the last batch row, each with the first, middle and last of its rows."""
    return [(b, rows) for b in dict.fromkeys((0, B - 1)) for rows in corner_rows(T)]


def corner_rows(T: int) -> list[slice]:
    length = min(ROWS, T)
    starts = dict.fromkeys((0, (T - length) // 2, T - length))
    return [slice(start, start + length) for start in starts]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
