"""Parameters that become other tensors while rows() are open: read as they are now."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.support.published import multiply, random_adapter, whole_logits
from tests.support.residuals import random_shift

METHODS = {
    "mimic": random_adapter,
    "ffn_shift": lambda model, **options: random_adapter(model, ffn_shift=True, **options),
    "m2iv": random_shift,
    "live": lambda model, **options: random_shift(model, mk.LIVEConfig(), **options),
}
FACTOR = 3.0


class Multiplied(nn.Module):
    def forward(self, x):
        return FACTOR * x


def owners(adapter):
    """Every parameter with the module that has it."""
    return [(of, name) for of in adapter.modules() for name, _ in of.named_parameters(recurse=False)]


def assign(adapter):
    adapter.load_state_dict({key: FACTOR * x for key, x in adapter.state_dict().items()}, assign=True)


def new_parameters(adapter):
    for of, name in owners(adapter):
        setattr(of, name, nn.Parameter(FACTOR * getattr(of, name).detach()))


def new_layers(adapter):
    if hasattr(adapter, "ffn_shift"):
        adapter.ffn_shift = nn.Parameter(FACTOR * adapter.ffn_shift.detach())
    for key, layer in list(adapter.layers.items()):
        layer = copy.deepcopy(layer)
        new_parameters(layer)
        adapter.layers[key] = layer


def parametrized(adapter):
    for of, name in owners(adapter):
        parametrize.register_parametrization(of, name, Multiplied())


def new_data(adapter):
    for x in adapter.parameters():
        x.data = FACTOR * x.data


def data_from_an_empty_place(adapter):
    """As ZeRO-3 does: the memory of the old values is free when the new ones come."""
    for x in adapter.parameters():
        value = FACTOR * x.detach()
        x.data = torch.empty(0)
        x.data = value.clone()


def in_place(adapter):
    multiply(adapter, FACTOR)


def wider(adapter):
    in_place(adapter)
    adapter.double()


CHANGES = [
    assign,
    new_parameters,
    new_layers,
    parametrized,
    new_data,
    data_from_an_empty_place,
    in_place,
    wider,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_open_rows_read_what_is_there_now(method, change):
    model = tiny_model("llava-llama")
    inputs, changed = tiny_inputs(model), METHODS[method](model)
    other = METHODS[method](model, seed=1)
    with mk.attach(model, {"a": changed, "b": other}) as handle:
        with handle.rows(["a", "b"]):
            before = whole_logits(model, inputs)
            change(changed)
            inside = whole_logits(model, inputs)
        with handle.rows(["a", "b"]):
            assert torch.equal(whole_logits(model, inputs), inside)
    expected = METHODS[method](model)
    in_place(expected)
    with mk.attach(model, {"a": expected, "b": other}) as handle, handle.rows(["a", "b"]):
        torch.testing.assert_close(inside, whole_logits(model, inputs))
    assert torch.equal(inside[1], before[1]) and not torch.allclose(inside[0], before[0])


@pytest.mark.parametrize("method", METHODS)
def test_functional_call(method):
    """The tensors are others within the call alone."""
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), METHODS[method](model)
    adapters = {"a": adapter, "b": METHODS[method](model, seed=1)}
    handle = mk.attach(model, adapters)

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter = adapter

        def forward(self):
            return model(**inputs).logits

    called = Called()
    tripled = {f"adapter.{key}": FACTOR * x.detach() for key, x in adapter.named_parameters()}
    with torch.no_grad(), handle.rows(["a", "b"]):
        before = called()
        during = torch.func.functional_call(called, tripled, ())
        assert torch.equal(called(), before)
    in_place(adapter)
    with torch.no_grad(), handle.rows(["a", "b"]):
        assert torch.equal(called(), during)
    assert not torch.allclose(during, before)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_new_parameters(method):
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs, adapter = tiny_inputs(model), METHODS[method](model)
    adapters = {"a": adapter, "b": METHODS[method](model, seed=1).requires_grad_(False)}
    with mk.attach(model, adapters) as handle, handle.rows(["a", "b"]):
        whole_logits(model, inputs)
        old = list(adapter.parameters())
        new_parameters(adapter)
        model(**inputs).logits.square().mean().backward()
    assert all(x.grad is None for x in old)
    assert all(x.grad is not None and x.grad.count_nonzero() > 0 for x in adapter.parameters())
