"""Right before fast, at the very shapes that are timed: outputs against fp64, as near as plain PyTorch is.

Parts of the output are compared, because the whole would not fit in fp64: for a forward the first, middle
and last queries of the first and the last key/value head (the last in the last batch row, where an offset
overflows first), for gradients everything that belongs to these two heads.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import Case
from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.testing.budgets import (
    assert_within_budget,
    eager_attention_shift,
    eager_shifted_attention,
    gradients,
    product_error,
)

ROWS = 128  # queries in a part of a forward
BLOCK_ELEMENTS = 2**26  # of the scores of one block of queries: half a GiB in fp64

Inputs = Sequence[Tensor]
Op = Callable[..., Tensor]


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
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    try:
        for part in parts:
            actual = outputs[part.output].detach()[part.index]
            assert_within_budget(part.name, actual, part.low, part.exact)
    except AssertionError as error:
        return str(error)
    return None


def attention_parts(case: Case, inputs: Inputs) -> list[Part]:
    """Of ``out``, or where the case is a backward of the six gradients. ``inputs`` end with dout."""
    *inputs, dout = (x.detach() for x in inputs)
    heads = dict.fromkeys((0, case.G - 1))
    if case.backward:
        return [part for g in heads for part in _gradient_parts(case, inputs, dout, g)]
    corners = dict.fromkeys(((0, 0), (case.B - 1, case.G - 1)))
    return [_output_part(case, inputs, b, g, rows) for b, g in corners for rows in _corner_rows(case.T)]


def shift_parts(case: Case, inputs: Inputs) -> list[Part]:
    """Of the result of ``attention_shift``, all heads."""
    out, lse, q, *parameters = inputs
    parts = []
    for b in dict.fromkeys((0, case.B - 1)):
        for rows in _corner_rows(case.T):
            index = (slice(b, b + 1), slice(None), rows)
            part = (out[index], lse[index], q[index], *parameters)
            low = eager_attention_shift(*part)
            exact = attention_shift(*(x.double() for x in part), impl="reference")
            parts.append(Part(f"out[{b}, :, {rows.start}:{rows.stop}]", 0, index, low, exact))
    return parts


def residual_parts(op: Op, eager: Op, backward: bool, inputs: Inputs, num_inputs: int) -> list[Part]:
    """Of a residual op: rows of its outputs, or its gradients. Gradients of its outputs end ``inputs``."""
    inputs = [x.detach() for x in inputs]
    arguments, douts = inputs[:num_inputs], inputs[num_inputs:]
    exact = functools.partial(op, impl="reference")
    if backward:
        low = gradients(eager, arguments, douts)[1]
        wide = gradients(exact, [x.double() for x in arguments], [x.double() for x in douts])[1]
        parts = []
        for number, (a, b) in enumerate(zip(low, wide, strict=True)):
            # The scale's gradient is one number, which can come out exact by luck.
            lows = a if a.dim() > 0 else (a, b + _scale_error(arguments, low, wide))
            parts.append(Part(f"gradient {number}", number, (...,), lows, b))
        return parts
    parts = []
    B, T = inputs[0].shape[:2]
    for b in dict.fromkeys((0, B - 1)):
        for rows in _corner_rows(T):
            index = (slice(b, b + 1), rows)
            block = [x[index] if x.dim() == 3 else x for x in arguments]
            low, wide = eager(*block), exact(*(x.double() for x in block))
            for number, (a, w) in enumerate(zip(_tuple(low), _tuple(wide), strict=True)):
                parts.append(Part(f"output {number}[{b}, {rows.start}:{rows.stop}]", number, index, a, w))
    return parts


def _scale_error(arguments: Inputs, low: Inputs, wide: Inputs) -> float:
    """What the error of the vector's gradient makes of the scale's, which is a product with the vector."""
    vector, scale = arguments[-3:-1] if arguments[-1].dim() == 1 else arguments[-2:]
    number = next(i for i, x in enumerate(arguments) if x is vector)
    return product_error(float(_relative_error(low[number], wide[number])), wide[number] / scale, vector)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _output_part(case: Case, inputs: Inputs, b: int, g: int, rows: slice) -> Part:
    heads = _query_heads(case, g)
    block = _block(case, inputs, slice(b, b + 1), g, rows)
    low, exact = _eager(case)(*block), _exact(case)(*(x.double() for x in block))
    name = f"out[{b}, {heads.start}:{heads.stop}, {rows.start}:{rows.stop}]"
    return Part(name, 0, (slice(b, b + 1), heads, rows), low, exact)


def _gradient_parts(case: Case, inputs: Inputs, dout: Tensor, g: int) -> list[Part]:
    heads, everything = _query_heads(case, g), slice(None)
    low = _block_gradients(_eager(case), case, inputs, dout, g)
    exact = _block_gradients(_exact(case), case, [x.double() for x in inputs], dout.double(), g)
    indices = (
        *((everything, heads), (everything, slice(g, g + 1)), (everything, slice(g, g + 1))),
        *((heads,), (heads,), (heads,)),
    )
    lows = [x.to(like.dtype) for x, like in zip(low, inputs, strict=True)]
    # The dbias of a head is one number, which can come out exact by luck; dweight sums the same terms.
    lows[4] = (lows[4], exact[4] * (1 + _relative_error(low[3], exact[3])))
    names = ("dq", "dk", "dv", "dweight", "dbias", "dshift")
    return [
        Part(f"{name} of key head {g}", number, indices[number], lows[number], exact[number])
        for number, name in enumerate(names)
    ]


def _relative_error(actual: Tensor, exact: Tensor) -> Tensor:
    return (actual.double() - exact).norm() / exact.norm()


def _block_gradients(op: Op, case: Case, inputs: Inputs, dout: Tensor, g: int) -> list[Tensor]:
    """The six gradients of key head ``g`` and its queries, summed over blocks of queries in fp32 or fp64."""
    heads, acc = _query_heads(case, g), torch.promote_types(dout.dtype, torch.float32)
    q, k, v, *parameters = inputs
    selected = (q[:, heads], k[:, g : g + 1], v[:, g : g + 1], *(x[heads] for x in parameters))
    totals = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in selected]
    length = max(BLOCK_ELEMENTS // (case.B * (heads.stop - heads.start) * case.S), 1)
    for start in range(0, case.T, length):
        rows = slice(start, min(start + length, case.T))
        block = _block(case, inputs, slice(None), g, rows)
        _, (dq, dk, dv, *rest) = gradients(op, block, [dout[:, heads, rows]])
        totals[0][:, :, rows] += dq
        for total, part in zip(totals[1:3], (dk, dv), strict=True):
            total[:, :, : part.shape[2]] += part
        for total, part in zip(totals[3:], rest, strict=True):
            total += part
    return totals


def _block(case: Case, inputs: Inputs, batch: slice, g: int, rows: slice) -> tuple[Tensor, ...]:
    """Inputs of some queries alone. Where causal, the keys end with the block: so it is bottom-right."""
    q, k, v, *parameters = inputs
    heads, keys = _query_heads(case, g), slice(rows.stop if case.causal else case.S)
    return (
        q[batch, heads, rows],
        k[batch, g : g + 1, keys],
        v[batch, g : g + 1, keys],
        *(x[heads] for x in parameters),
    )


def _eager(case: Case) -> Op:
    def op(*inputs: Tensor) -> Tensor:
        with torch.device(inputs[0].device):  # it makes its masks on the default device
            return eager_shifted_attention(*inputs, causal=case.causal)[0]

    return op


def _exact(case: Case) -> Op:
    return lambda *inputs: shifted_attention(*inputs, causal=case.causal, impl="reference")


def _query_heads(case: Case, g: int) -> slice:
    groups = case.H // case.G
    return slice(g * groups, (g + 1) * groups)


def _corner_rows(T: int) -> list[slice]:
    length = min(ROWS, T)
    starts = dict.fromkeys((0, (T - length) // 2, T - length))
    return [slice(start, start + length) for start in starts]
