"""Adapters that are the same, or whose parameters of a kind are compared."""

import torch
from torch import Tensor


def assert_same(x, y):
    """The same parameters, bit for bit."""
    assert x.state_dict().keys() == y.state_dict().keys()
    for (name, a), b in zip(x.state_dict().items(), y.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def by_kind(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All layers' weights as one vector, their biases as another, and so on."""
    kinds: dict[str, list[Tensor]] = {}
    for name, x in tensors.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(x.detach().flatten())
    return {kind: torch.cat(found) for kind, found in kinds.items()}
