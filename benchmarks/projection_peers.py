"""What ``row_projection`` is measured on and compared with: boolean indexing and ``nn.Linear``.

A case has B demonstrations of T positions, of which about the last eighth is text. The floor is the product
of rows that are packed already; a backward is of the weight and the bias, as when AIM trains.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import DTYPES, Case
from benchmarks.values import ROWS, Part
from mmicl_kernels.ops.row_projection import row_projection
from mmicl_kernels.testing.budgets import gradients

Inputs = tuple[Tensor, ...]
Function = Callable[[], Tensor | tuple[Tensor, ...]]


def _case(
    B: int, T: int, H: int, D: int = 128, dtype: str = "bfloat16", backward: bool = False, model: str = ""
) -> Case:
    return Case(B=B, H=H, G=H, T=T, S=T, D=D, dtype=dtype, backward=backward, model=model)


CPU_CASES = tuple(
    _case(4, 256, H, dtype=dtype, backward=backward)
    for backward, dtype, H in product((False, True), DTYPES, (8, 32))
)
CUDA_CASES = tuple(
    _case(B, T, 32, backward=backward, model="Idefics2-8b")
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


def count_bytes(case: Case) -> int:
    """Rows and weight read, the result written; backward: rows and dout read, dweight written."""
    N, C = sum(text_tokens(case)), case.H * case.D
    return (2 * N * C + C * C) * case.torch_dtype.itemsize * (2 if case.backward else 1)


def count_flops(case: Case) -> int:
    """One product forward, one backward."""
    return 2 * sum(text_tokens(case)) * (case.H * case.D) ** 2 * (2 if case.backward else 1)


def _bound(case: Case, inputs: Inputs, fn: Callable[..., Tensor]) -> Function:
    hidden, mask, weight, bias, dout = inputs
    if not case.backward:
        return lambda: fn(hidden, mask, weight, bias)
    return lambda: torch.autograd.grad(fn(hidden, mask, weight, bias), (weight, bias), dout)


def ours(impl: str) -> Callable[[Case, Inputs], Function]:
    def bind(case: Case, inputs: Inputs) -> Function:
        num_rows = sum(text_tokens(case))
        return _bound(case, inputs, lambda *x: row_projection(*x, num_rows=num_rows, impl=impl))

    return bind


def packed(case: Case, inputs: Inputs) -> Function:
    """The product alone, of as many other rows."""
    x = torch.randn_like(inputs[-1])
    return _bound(case, inputs, lambda hidden, mask, weight, bias: F.linear(x, weight, bias))


def _indexed_linear(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(hidden[mask], weight, bias)


def indexed(case: Case, inputs: Inputs) -> Function:
    """As one would write it; on CUDA the host waits for the number of rows."""
    return _bound(case, inputs, _indexed_linear)


def compiled(case: Case, inputs: Inputs) -> Function:
    return _bound(case, inputs, torch.compile(_indexed_linear, dynamic=False))


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


FLOORS = {"packed": packed}
PEERS = {"indexed": indexed, "compiled": compiled}
