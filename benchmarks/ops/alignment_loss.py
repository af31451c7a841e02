"""``alignment_loss``: beside a copy of as many bytes, and boolean indexing with a loss of wide copies.

A case has LAYERS layers of B right-padded prompts, of which about three quarters are the query's tokens. The
op is the relative form, its default; "mse" is what official code computes, the mean squared error. A
backward is of the states.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.case import DTYPES, Case, square
from benchmarks.harness.spec import Inputs, Provider, Spec, bound, memcpy, on_both
from benchmarks.harness.values import Part
from mmicl_kernels.ops import alignment_loss
from mmicl_kernels.testing.budgets import gradients

Loss = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]

LAYERS = 8

CPU_CASES = tuple(
    square(4, T, 16, dtype=dtype, backward=backward)
    for backward, dtype, T in product((False, True), DTYPES, (64, 256))
)
CUDA_CASES = tuple(
    square(B, T, 32, backward=backward, model="Idefics2-8b")
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


def num_bytes(case: Case) -> int:
    """Rows of both read; backward: read again, and the whole gradient written."""
    N, C = sum(query_tokens(case)), case.H * case.D
    elements = 2 * N + (2 * N + case.B * case.T) * case.backward
    return LAYERS * elements * C * case.torch_dtype.itemsize


def num_flops(case: Case) -> int:
    """A difference, three squares and sums forward; backward it again, its product and that of the state."""
    return LAYERS * sum(query_tokens(case)) * case.H * case.D * (7 + 4 * case.backward)


def _bound(loss: Loss) -> Provider:
    def fn(mask: Tensor, *layers: Tensor) -> Tensor:
        return loss(layers[:LAYERS], layers[LAYERS:], mask)

    return bound(fn, 1 + 2 * LAYERS, num_douts=0)


def mse_loss(states: list[Tensor], targets: list[Tensor], mask: Tensor) -> Tensor:
    losses = [F.mse_loss(x[mask].float(), y.float()) for x, y in zip(states, targets, strict=True)]
    return sum(losses) / len(losses)


def relative_loss(states: list[Tensor], targets: list[Tensor], mask: Tensor) -> Tensor:
    """As one would write it; on CUDA the host waits for the number of rows."""
    losses = [_relative_loss(x[mask], y) for x, y in zip(states, targets, strict=True)]
    return sum(losses) / len(losses)


def relative_loss_of_rows(states: list[Tensor], targets: list[Tensor], index: Tensor) -> Tensor:
    losses = [_relative_loss(x.flatten(0, 1)[index], y) for x, y in zip(states, targets, strict=True)]
    return sum(losses) / len(losses)


def _relative_loss(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float(), y.float()
    return ((x - y).square().sum(1) / (x.square() + y.square()).sum(1)).mean()


def _compiled(case: Case, inputs: Inputs) -> Callable[[], object]:
    """In one graph: the mask's rows, whose number it would break at, are found before."""
    fn = torch.compile(relative_loss_of_rows, dynamic=False, fullgraph=True)
    return _bound(lambda x, y, mask: fn(x, y, mask.flatten().nonzero()[:, 0]))(case, inputs)


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


SPEC = Spec(
    name="alignment_loss",
    tests=("tests/ops/test_alignment_loss.py",),
    make_inputs=make_inputs,
    bytes=num_bytes,
    flops=num_flops,
    parts=parts,
    lineups=on_both(
        cpu=CPU_CASES,
        cuda=CUDA_CASES,
        floors={"memcpy": memcpy(num_bytes)},
        others={"formula": _bound(relative_loss), "compiled": _compiled, "mse": _bound(mse_loss)},
        stock=("formula", "compiled"),  # mse is another loss
        ours=lambda impl: _bound(partial(alignment_loss, impl=impl)),
    ),
    share=0.04,
)
