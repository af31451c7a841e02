"""The strength of M2IV's and LIVE's vectors: 0 is plain, others multiply, and what is none is refused."""

import copy

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_inputs, tiny_model
from tests.patch.snapshots import used_model
from tests.support.published import logits, random_adapter
from tests.support.residuals import library, random_shift

EPS = torch.finfo(torch.float32).eps
# Another path to the same sums, a few roundings per layer apart, three or four layers deep.
SAME = {"rtol": 64 * EPS, "atol": 64 * EPS}


@pytest.fixture
def model():
    return tiny_model("llava-llama")


@pytest.mark.parametrize("name", ["a", "live", "stream"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_strength(family, name):
    model = used_model(family)
    inputs, adapter = tiny_inputs(model, padding="left"), library(model)[name]
    plain = logits(model, inputs)
    tripled = copy.deepcopy(adapter)
    with torch.no_grad():
        for parameter_name, parameter in tripled.named_parameters():
            if parameter_name.endswith("scale"):
                parameter.mul_(3.0)
    with mk.attach(model, tripled):
        expected = logits(model, inputs)
    with mk.attach(model, adapter, strength=0) as handle:
        assert torch.equal(logits(model, inputs), plain)
        handle.strength(3.0)
        assert torch.equal(logits(model, inputs), expected)
        with handle.strength(0.0):
            assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(logits(model, inputs), expected)
    with mk.attach(model, {name: adapter}) as handle, handle.rows(name):
        one = logits(model, inputs)
        with handle.strength(3.0):
            torch.testing.assert_close(logits(model, inputs), expected, **SAME)
            with handle.rows({name: 1 / 3}):
                torch.testing.assert_close(logits(model, inputs), one, **SAME)
            with handle.strength(0):
                assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(logits(model, inputs), one)


@pytest.mark.parametrize("name", ["a", "live", "stream"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["vector", "scale"])
def test_strength_zero_is_plain_whatever_the_adapter_learned(model, name, value, parameter):
    inputs, adapters = tiny_inputs(model), library(model)
    plain, broken = logits(model, inputs), adapters[name]
    with torch.no_grad():
        for key, x in broken.named_parameters():
            if key.endswith(parameter):
                x.fill_(value)
    with mk.attach(model, broken, strength=0):
        assert torch.equal(logits(model, inputs), plain)
        model(**inputs).logits.sum().backward()
        assert not any(x.grad.any() for x in broken.parameters() if x.grad is not None)
    others = {"b": adapters["b"], name: broken}
    with mk.attach(model, others) as handle:
        for names in (None, {name: 0.0}, {name: 1e-30}):
            with handle.strength(1e-30), handle.rows(names):
                assert torch.equal(logits(model, inputs), plain), names
        with handle.strength(0.0), handle.rows([name, ("b", name)]):
            assert torch.equal(logits(model, inputs), plain)


def test_strengths_are_fp32_whatever_the_default_dtype(model):
    inputs, adapter = tiny_inputs(model), random_shift(model)
    with mk.attach(model, adapter, strength=0.3):
        expected = logits(model, inputs)
    with mk.attach(model, {"a": adapter}) as handle, handle.rows({"a": 0.3}):
        rows = logits(model, inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mk.attach(model, adapter, strength=0.3):
            alone = logits(model, inputs)
        with mk.attach(model, {"a": adapter}) as handle, handle.rows({"a": 0.3}):
            assert torch.equal(logits(model, inputs), rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(alone, expected)


def test_strengths_that_are_no_fp32_together(model):
    inputs = tiny_inputs(model)
    message = "strength of 'a' times the global 1e\\+30 is 1.*e\\+60, expected a finite number in fp32"
    with mk.attach(model, {"a": random_shift(model)}) as handle:
        with handle.rows({"a": 1e30}):
            expected = logits(model, inputs)
            with pytest.raises(ValueError, match=message):
                handle.strength(1e30)
            assert torch.equal(logits(model, inputs), expected)
        handle.strength(1e30)
        with pytest.raises(ValueError, match=message), handle.rows(["a", {"a": 1e30}]):
            pytest.fail("the block was entered")


def test_strength_outlives_the_handle(model):
    inputs, plain = tiny_inputs(model), logits(model, tiny_inputs(model))
    handle = mk.attach(model, random_shift(model))
    with handle.strength(0.5):
        handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    with pytest.raises(RuntimeError, match="detached"):
        handle.strength(1.0)


def test_strength_and_mimic_exclude_each_other(model):
    inputs = tiny_inputs(model)
    with mk.attach(model, library(model)) as handle, handle.rows(["a", "mimic"]):
        expected = logits(model, inputs)
        with pytest.raises(ValueError, match=r"strength is 0\.5, expected 1: 'mimic'"):
            handle.strength(0.5)
        assert torch.equal(logits(model, inputs), expected)
    with mk.attach(model, random_shift(model), strength=0.5) as handle:
        with pytest.raises(ValueError, match=r"strength is 0\.5, expected 1: 'm' is a MimIC"):
            handle.add("m", random_adapter(model))
        assert list(handle.adapters) == ["default"]
