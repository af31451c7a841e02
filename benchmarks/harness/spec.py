"""What a benchmark of an op is, and the providers that many of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness.case import Case
from benchmarks.harness.timing import Function
from benchmarks.harness.values import Part

Inputs = tuple[Tensor, ...]
Outputs = Tensor | tuple[Tensor, ...]
Provider = Callable[[Case, Inputs], Function | None]

IMPLS = {"cpu": ("composed",), "cuda": ("composed", "triton", "auto")}


@dataclass(frozen=True)
class Lineup:
    """Who takes part on one device, in what.

    cases: the most valuable first. A provider makes of inputs a function of no arguments, or None where
    it takes no part in a case. floors: those that no implementation can beat, the one to name first.
    others: further ones that ratios are taken to. stock: those among them that compute the same as the
    op. ours: the op's implementations.
    """

    cases: tuple[Case, ...]
    floors: Mapping[str, Provider]
    ours: Mapping[str, Provider]
    others: Mapping[str, Provider] = field(default_factory=dict)
    stock: tuple[str, ...] = ()

    @property
    def providers(self) -> dict[str, Provider]:
        return {**self.floors, **self.others, **self.ours}

    @property
    def peers(self) -> tuple[str, ...]:
        return (*self.floors, *self.others)

    @property
    def checked(self) -> tuple[str, ...]:
        """The providers whose values must be the op's."""
        return (*self.stock, *self.ours)


@dataclass(frozen=True)
class Spec:
    """An op's benchmark.

    tests: what pytest must pass before anything is measured on a CPU. make_inputs: from a case and a
    device; those that gradients are taken of require them in a backward. bytes, flops: the least memory
    traffic and the products of a case, whoever computes it. parts: what outputs must be near. lineups: by
    device. share: of a run's time, where that is limited.
    """

    name: str
    tests: tuple[str, ...]
    make_inputs: Callable[[Case, str], Inputs]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    parts: Callable[[Case, Inputs], list[Part]]
    lineups: Mapping[str, Lineup]
    share: float


def on_both(
    cpu: tuple[Case, ...],
    cuda: tuple[Case, ...],
    floors: Mapping[str, Provider],
    others: Mapping[str, Provider],
    stock: tuple[str, ...],
    ours: Callable[[str], Provider],
) -> dict[str, Lineup]:
    """The same peers on both devices; ``ours`` makes a provider of an implementation's name."""
    cases = {"cpu": cpu, "cuda": cuda}
    return {
        device: Lineup(cases[device], floors, {impl: ours(impl) for impl in impls}, others, stock)
        for device, impls in IMPLS.items()
    }


def bound(fn: Callable[..., Outputs], num_inputs: int, num_douts: int = 1) -> Provider:
    """Of a function of the first ``num_inputs``; in a backward, of its gradients where they are required.

    The last ``num_douts`` inputs are the gradients of its outputs; there are none of a loss.
    """

    def bind(case: Case, inputs: Inputs) -> Function:
        arguments, douts = inputs[:num_inputs], inputs[len(inputs) - num_douts :]
        if not case.backward:
            return lambda: fn(*arguments)
        leaves = [x for x in arguments if x.requires_grad]
        return lambda: torch.autograd.grad(fn(*arguments), leaves, douts or None, allow_unused=True)

    return bind


def compiled(fn: Callable[..., Outputs], num_inputs: int, num_douts: int = 1) -> Provider:
    """The same by torch.compile, for every case anew."""
    return lambda case, inputs: bound(torch.compile(fn, dynamic=False), num_inputs, num_douts)(case, inputs)


def memcpy(num_bytes: Callable[[Case], int]) -> Provider:
    """As many bytes moved, half of them read and half written, into memory that is there already."""

    def bind(case: Case, inputs: Inputs) -> Function:
        half = torch.zeros(2, num_bytes(case) // 2, dtype=torch.uint8, device=inputs[0].device)
        return lambda: half[1].copy_(half[0])

    return bind
