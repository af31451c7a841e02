"""What ``alignment_loss`` is measured on and compared with: boolean indexing and a loss of wide copies.

A case has LAYERS layers of B right-padded prompts, of which about three quarters are the query's tokens. The
op is the relative form, its default; "mse" is what official code computes, the mean squared error. A
backward is of the states.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import DTYPES, Case
from benchmarks.values import Part
from mmicl_kernels.ops.alignment_loss import alignment_loss
from mmicl_kernels.testing.budgets import gradients

Inputs = tuple[Tensor, ...]
Function = Callable[[], Tensor | tuple[Tensor, ...]]
Loss = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]

LAYERS = 8


def _case(
    B: int, T: int, H: int, D: int = 128, dtype: str = "bfloat16", backward: bool = False, model: str = ""
) -> Case:
    return Case(B=B, H=H, G=H, T=T, S=T, D=D, dtype=dtype, backward=backward, model=model)


CPU_CASES = tuple(
    _case(4, T, 16, dtype=dtype, backward=backward)
    for backward, dtype, T in product((False, True), DTYPES, (64, 256))
)
CUDA_CASES = tuple(
    _case(B, T, 32, backward=backward, model="Idefics2-8b")
    for backward, (B, T) in product((False, True), ((2, 256), (8, 512)))
)


def query_tokens(case: Case) -> list[int]:
    """Of each batch row, from its first on, the same ones every time."""
    return [case.T * (5 + b % 3) // 8 for b in range(case.B)]


def make_inputs(case: Case, device: str) -> Inputs:
    """The mask, the layers' states, their targets."""
    torch.manual_seed(0)
    C, options = case.H * case.D, {"dtype": case.torch_dtype, "device": device}
    counts = torch.tensor(query_tokens(case), device=device)
    mask = torch.arange(case.T, device=device) < counts[:, None]
    states = [torch.randn(case.B, case.T, C, **options) for _ in range(LAYERS)]
    targets = [torch.randn(sum(query_tokens(case)), C, **options) for _ in range(LAYERS)]
    return mask, *(x.requires_grad_(case.backward) for x in states), *targets


def count_bytes(case: Case) -> int:
    """Rows of both read; backward: read again, and the whole gradient written."""
    N, C = sum(query_tokens(case)), case.H * case.D
    elements = 2 * N + (2 * N + case.B * case.T) * case.backward
    return LAYERS * elements * C * case.torch_dtype.itemsize


def count_flops(case: Case) -> int:
    """A difference, three squares and sums forward; backward it again, its product and that of the state."""
    return LAYERS * sum(query_tokens(case)) * case.H * case.D * (7 + 4 * case.backward)


def _bound(case: Case, inputs: Inputs, fn: Loss) -> Function:
    mask, *layers = inputs
    states, targets = layers[:LAYERS], layers[LAYERS:]
    if not case.backward:
        return lambda: fn(states, targets, mask)
    return lambda: torch.autograd.grad(fn(states, targets, mask), states)


def ours(impl: str) -> Callable[[Case, Inputs], Function]:
    return lambda case, inputs: _bound(case, inputs, lambda *x: alignment_loss(*x, impl=impl))


def memcpy(case: Case, inputs: Inputs) -> Function:
    """As many bytes moved, into memory that is there already."""
    half = torch.zeros(2, count_bytes(case) // 2, dtype=torch.uint8, device=inputs[0].device)
    return lambda: half[1].copy_(half[0])


def mse_loss(states: list[Tensor], targets: list[Tensor], mask: Tensor) -> Tensor:
    losses = [F.mse_loss(x[mask].float(), y.float()) for x, y in zip(states, targets, strict=True)]
    return sum(losses) / len(losses)


def relative_loss(states: list[Tensor], targets: list[Tensor], mask: Tensor) -> Tensor:
    losses = [_relative_loss(x[mask], y) for x, y in zip(states, targets, strict=True)]
    return sum(losses) / len(losses)


def relative_loss_of_rows(states: list[Tensor], targets: list[Tensor], index: Tensor) -> Tensor:
    losses = [_relative_loss(x.flatten(0, 1)[index], y) for x, y in zip(states, targets, strict=True)]
    return sum(losses) / len(losses)


def _relative_loss(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float(), y.float()
    return ((x - y).square().sum(1) / (x.square() + y.square()).sum(1)).mean()


def mse(case: Case, inputs: Inputs) -> Function:
    return _bound(case, inputs, mse_loss)


def formula(case: Case, inputs: Inputs) -> Function:
    """As one would write it; on CUDA the host waits for the number of rows."""
    return _bound(case, inputs, relative_loss)


def compiled(case: Case, inputs: Inputs) -> Function:
    """In one graph: the mask's rows, whose number it would break at, are found before."""
    fn = torch.compile(relative_loss_of_rows, dynamic=False, fullgraph=True)
    return _bound(case, inputs, lambda x, y, mask: fn(x, y, mask.flatten().nonzero()[:, 0]))


def parts(case: Case, inputs: Inputs) -> list[Part]:
    """The loss, or of a backward the first and the last layer's gradient."""
    mask, *layers = (x.detach() for x in inputs)
    states, targets = layers[:LAYERS], layers[LAYERS:]
    wide = [y.double() for y in targets]
    one = torch.ones((), device=mask.device)
    low = gradients(lambda *x: relative_loss(x, targets, mask), states, (one,))
    exact = gradients(
        lambda *x: alignment_loss(x, wide, mask, impl="reference"),
        [x.double() for x in states],
        (one.double(),),
    )
    if not case.backward:
        return [Part("loss", 0, (...,), low[0][0], exact[0][0])]
    return [Part(f"gradient {i}", i, (...,), low[1][i], exact[1][i]) for i in (0, LAYERS - 1)]


FLOORS = {"memcpy": memcpy}
PEERS = {"formula": formula, "compiled": compiled, "mse": mse}
STOCK = ("formula", "compiled")  # mse is another loss
