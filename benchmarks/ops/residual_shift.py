"""``residual_shift``, and what its kin share: beside a copy of as many bytes, and a formula in PyTorch.

Hidden states are ``[B, T, C]``, C = H * D.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.harness.case import DTYPES, IDEFICS2, QWEN, SMOLVLM, Case, prefill, square, training
from benchmarks.harness.spec import Inputs, Outputs, Spec, bound, compiled, memcpy, on_both
from benchmarks.harness.timing import Function
from benchmarks.harness.values import Part, as_tuple, corners, relative_error
from mmicl_kernels.ops import residual_shift
from mmicl_kernels.testing.budgets import eager_residual_shift, gradients, product_error

Op = Callable[..., Outputs]

_K = 1024
CPU_CASES = tuple(
    square(1, T, 32, dtype=dtype, backward=backward)
    for backward, dtype, T in product((False, True), DTYPES, (128, 512))
)
CUDA_CASES = (
    *(prefill(IDEFICS2, T, backward=backward) for T in (4 * _K, 16 * _K) for backward in (False, True)),
    *(Case(B=B, H=32, G=8, T=1, S=_K, D=128, dtype="bfloat16", model=IDEFICS2) for B in (1, 64)),
    prefill(SMOLVLM, 8 * _K),
    training(QWEN, 8 * _K),
    training(IDEFICS2, 512, B=8),
)


def hidden_states(count: int, case: Case, device: str) -> list[Tensor]:
    shape = (case.B, case.T, case.H * case.D)
    return [torch.randn(shape, dtype=case.torch_dtype, device=device) for _ in range(count)]


def make_inputs(case: Case, device: str) -> Inputs:
    """``x, vector, scale`` and the gradient of the result."""
    torch.manual_seed(0)
    x, dout = hidden_states(2, case, device)
    vector, scale = torch.randn(case.H * case.D, device=device), torch.full((), 0.1, device=device)
    return *(x.requires_grad_(case.backward) for x in (x, vector, scale)), dout


def added(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    """M2IV's shift as one would write it."""
    return (x.float() + scale * vector).to(x.dtype)


def residual_spec(
    name: str,
    op: Op,
    formula: Op,
    eager: Op,
    passes: tuple[int, int],
    *,
    tests: str = "tests/ops/test_residual_shift.py",
    make_inputs: Callable[[Case, str], Inputs] = make_inputs,
    num_inputs: int = 3,
    num_outputs: int = 1,
    row_bytes: int = 0,
) -> Spec:
    """Of an op of hidden states, a vector and a scale.

    passes: how often its forward and its backward read or write a tensor like x, and ``row_bytes`` for
    every row beside. eager: the formula that errors are measured by.
    """

    def num_bytes(case: Case) -> int:
        row = case.H * case.D * case.torch_dtype.itemsize
        forward, backward = (case.B * case.T * (times * row + row_bytes) for times in passes)
        return forward + backward * case.backward

    return Spec(
        name=name,
        tests=(tests,),
        make_inputs=make_inputs,
        bytes=num_bytes,
        flops=lambda case: 2 * case.B * case.T * case.H * case.D,
        parts=lambda case, inputs: _parts(op, eager, case, inputs, num_inputs),
        lineups=on_both(
            cpu=CPU_CASES,
            cuda=CUDA_CASES,
            floors={"memcpy": memcpy(num_bytes)},
            others={
                "formula": bound(formula, num_inputs, num_outputs),
                "compiled": compiled(formula, num_inputs, num_outputs),
            },
            stock=("formula", "compiled"),
            ours=lambda impl: bound(partial(op, impl=impl), num_inputs, num_outputs),
        ),
        share=0.06,
    )


def _parts(op: Op, eager: Op, case: Case, inputs: Inputs, num_inputs: int) -> list[Part]:
    """Rows of its outputs, or its gradients. Gradients of its outputs end ``inputs``."""
    inputs = [x.detach() for x in inputs]
    arguments, douts = inputs[:num_inputs], inputs[num_inputs:]
    exact = partial(op, impl="reference")
    if case.backward:
        return _gradient_parts(exact, eager, arguments, douts)
    parts = []
    for b, rows in corners(case.B, case.T):
        index = (slice(b, b + 1), rows)
        block = [x[index] if x.dim() == 3 else x for x in arguments]
        low, wide = eager(*block), exact(*(x.double() for x in block))
        for number, (a, w) in enumerate(zip(as_tuple(low), as_tuple(wide), strict=True)):
            parts.append(Part(f"output {number}[{b}, {rows.start}:{rows.stop}]", number, index, a, w))
    return parts


def _gradient_parts(exact: Op, eager: Op, arguments: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Part]:
    low = gradients(eager, arguments, douts)[1]
    wide = gradients(exact, [x.double() for x in arguments], [x.double() for x in douts])[1]
    parts = []
    for number, (a, b) in enumerate(zip(low, wide, strict=True)):
        # The scale's gradient is one number, which can come out exact by luck.
        lows = a if a.dim() > 0 else (a, b + _scale_error(arguments, low, wide))
        parts.append(Part(f"gradient {number}", number, (...,), lows, b))
    return parts


def _scale_error(arguments: Sequence[Tensor], low: Sequence[Tensor], wide: Sequence[Tensor]) -> float:
    """What the error of the vector's gradient makes of the scale's, which is a product with the vector."""
    vector, scale = arguments[-3:-1] if arguments[-1].dim() == 1 else arguments[-2:]
    number = next(i for i, x in enumerate(arguments) if x is vector)
    return product_error(relative_error(low[number], wide[number]), wide[number] / scale, vector)


def of_tokens(case: Case, inputs: Inputs) -> Function:
    """Composed with an id of every token's own, all of them of one adapter: the same results."""
    ids = torch.zeros(case.B, case.T, 1, dtype=torch.int32, device=inputs[0].device)

    def op(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
        return residual_shift(x, vector[None], scale[None], adapter_ids=ids, impl="composed")

    return bound(op, 3)(case, inputs)


# dx is dout: the backward reads alone.
_ROWS = residual_spec("residual_shift", residual_shift, added, eager_residual_shift, passes=(2, 1))
SPEC = replace(
    _ROWS,
    lineups={
        device: replace(lineup, ours={**lineup.ours, "of tokens": of_tokens})
        for device, lineup in _ROWS.lineups.items()
    },
)
