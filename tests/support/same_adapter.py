"""Adapters that are the same."""

import torch


def assert_same(x, y):
    """The same parameters, bit for bit."""
    assert x.state_dict().keys() == y.state_dict().keys()
    for (name, a), b in zip(x.state_dict().items(), y.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
