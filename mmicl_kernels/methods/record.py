"""Capture the outputs of modules at chosen tokens during a forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def record_outputs(
    modules: Sequence[nn.Module], tokens: Tensor, *, whole: bool = False
) -> Iterator[list[Tensor]]:
    """Fill the yielded list with each module's output ``[N, C]`` at ``tokens``, bool ``[B, T]``.

    The list is in the order of the calls. Only the chosen rows are kept, or with ``whole`` the outputs
    themselves, ``[B, T, C]``; hooks are removed at the end, also after an error.

    Raises:
        RuntimeError: not every module was called once with its hook, as after some were compiled; or a whole
        output was changed in place afterwards, so that it is not what the module had returned.
    """
    recorded: list[Tensor] = []
    versions: list[int] = []  # of what is kept as it is
    # Once: a mask would be counted anew, on the host, at each module.
    places = () if whole else tokens.nonzero(as_tuple=True)

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        # Mixtures of experts, and OPT, return all tokens in one row.
        states = states.view(*tokens.shape, -1) if states.dim() == 2 else states
        if whole:
            versions.append(_version(states))
        recorded.append(states if whole else states[tuple(x.to(states.device) for x in places)])

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    if len(recorded) != len(modules):
        raise RuntimeError(
            f"{len(recorded)} outputs of {len(modules)} modules were seen: train with layers that were not "
            "compiled by themselves, or torch._dynamo.reset() first"
        )
    changed = [i for i, version in enumerate(versions) if _version(recorded[i]) != version]
    if changed:
        raise RuntimeError(
            f"the model changed the outputs of modules {changed} in place after they had been recorded, "
            "expected layers that add to new tensors"
        )


def _version(x: Tensor) -> int:
    """How often ``x`` was changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version
