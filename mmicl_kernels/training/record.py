"""Capture the outputs of modules at chosen tokens during a forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def record_outputs(modules: Sequence[nn.Module], tokens: Tensor) -> Iterator[list[Tensor]]:
    """Fill the yielded list with each module's output ``[N, C]`` at ``tokens``, bool ``[B, T]``.

    The list is in the order of the calls. Only the chosen rows are kept, and hooks are removed at the
    end, also after an error.
    """
    recorded: list[Tensor] = []
    places = tokens.nonzero(as_tuple=True)  # once: a mask would be counted anew, on the host, at each module

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        recorded.append(states[tuple(x.to(states.device) for x in places)])

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
