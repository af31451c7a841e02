"""``row_projection``: beside the product alone, and boolean indexing with ``nn.Linear``.

A case has B demonstrations of T positions, of which about the last eighth is text. The floor is the product
of rows that are packed already; a backward is of the weight and the bias, as when AIM trains.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.case import DTYPES, Case, square
from benchmarks.harness.spec import Inputs, Provider, Spec, bound, compiled, on_both
from benchmarks.harness.timing import Function
from benchmarks.harness.values import ROWS, Part
from mmicl_kernels.ops import row_projection
from mmicl_kernels.testing.budgets import gradients

CPU_CASES = tuple(
    square(4, 256, H, dtype=dtype, backward=backward)
    for backward, dtype, H in product((False, True), DTYPES, (8, 32))
)
CUDA_CASES = tuple(
    square(B, T, 32, backward=backward, model="Idefics2-8b")
    for backward, (B, T) in product((False, True), ((16, 256), (64, 1024), (1, 256)))
)


def text_tokens(case: Case) -> list[int]:
    """Chosen rows of each batch row, the same ones every time; some have a quarter less than others."""
    most = case.T // 8
    return [most - b % max(most // 4, 1) for b in range(case.B)]


def make_inputs(case: Case, device: str) -> Inputs:
    """``hidden, mask, weight, bias`` and the gradient of the result."""
    torch.manual_seed(0)
    C, options = case.H * case.D, {"dtype": case.torch_dtype, "device": device}
    counts = torch.tensor(text_tokens(case), device=device)
    mask = torch.arange(case.T, device=device) >= case.T - counts[:, None]
    weight, bias = torch.randn(C, C, **options) * C**-0.5, torch.randn(C, **options)
    parameters = (x.requires_grad_(case.backward) for x in (weight, bias))
    hidden = torch.randn(case.B, case.T, C, **options)
    return hidden, mask, *parameters, torch.randn(sum(text_tokens(case)), C, **options)


def num_bytes(case: Case) -> int:
    """Rows and weight read, the result written; backward: rows and dout read, dweight written."""
    N, C = sum(text_tokens(case)), case.H * case.D
    return (2 * N * C + C * C) * case.torch_dtype.itemsize * (2 if case.backward else 1)


def num_flops(case: Case) -> int:
    """One product forward, one backward."""
    return 2 * sum(text_tokens(case)) * (case.H * case.D) ** 2 * (2 if case.backward else 1)


def _ours(impl: str) -> Provider:
    def bind(case: Case, inputs: Inputs) -> Function:
        num_rows = sum(text_tokens(case))
        return bound(lambda *x: row_projection(*x, num_rows=num_rows, impl=impl), 4)(case, inputs)

    return bind


def _packed(case: Case, inputs: Inputs) -> Function:
    """The product alone, of as many other rows."""
    x = torch.randn_like(inputs[-1])
    return bound(lambda hidden, mask, weight, bias: F.linear(x, weight, bias), 4)(case, inputs)


def _indexed_linear(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As one would write it; on CUDA the host waits for the number of rows."""
    return F.linear(hidden[mask], weight, bias)


def parts(case: Case, inputs: Inputs) -> list[Part]:
    """Of a forward the first and the last rows, of a backward both gradients."""
    hidden, mask, *parameters, dout = (x.detach() for x in inputs)
    index = mask.flatten().nonzero()[:, 0]

    def eager(rows: Tensor) -> Callable[..., Tensor]:
        return lambda weight, bias: F.linear(hidden.flatten(0, 1)[rows], weight, bias)

    def exact(rows: Tensor) -> Callable[..., Tensor]:
        return lambda *x: row_projection(hidden.double(), rows, *x, impl="reference")

    wide = [x.double() for x in parameters]
    if case.backward:
        low, high = (
            gradients(fn(index), x, (dy,))[1]
            for fn, x, dy in ((eager, parameters, dout), (exact, wide, dout.double()))
        )
        return [Part(name, i, (...,), low[i], high[i]) for i, name in enumerate(("dweight", "dbias"))]
    N = len(index)
    corners = [slice(i, min(i + ROWS, N)) for i in dict.fromkeys((0, max(N - ROWS, 0)))]
    return [
        Part(f"out[{x.start}:{x.stop}]", 0, (x,), eager(index[x])(*parameters), exact(index[x])(*wide))
        for x in corners
    ]


SPEC = Spec(
    name="row_projection",
    tests=("tests/ops/test_row_projection.py",),
    make_inputs=make_inputs,
    bytes=num_bytes,
    flops=num_flops,
    parts=parts,
    lineups=on_both(
        cpu=CPU_CASES,
        cuda=CUDA_CASES,
        floors={"packed": _packed},
        others={"indexed": bound(_indexed_linear, 4), "compiled": compiled(_indexed_linear, 4)},
        stock=("indexed", "compiled"),
        ours=_ours,
    ),
    share=0.04,
)
