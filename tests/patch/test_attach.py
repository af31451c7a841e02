"""Attaching and detaching: nothing remains, nothing else is touched, every refusal leaves the plain model."""

import copy
import gc
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.patch.sites.residual import ResidualHook
from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_inputs, tiny_model
from tests.patch.snapshots import assert_same_objects, changes, snapshot, used_model
from tests.support.published import (
    SELF_ATTENTIONS,
    counted_calls,
    logits,
    multiply,
    random_adapter,
    text_config,
)
from tests.support.residuals import library, random_shift


@pytest.fixture(params=TINY_MODELS)
def model(request):
    return used_model(request.param)


def test_detach_restores_everything(model):
    inputs = tiny_inputs(model, padding="left")
    before, plain = snapshot(model), logits(model, inputs)
    handle = mk.attach(model, random_adapter(model))
    assert not torch.equal(logits(model, inputs), plain)
    handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert_same_objects(snapshot(model), before)
    handle.detach()  # again does nothing
    for method in (handle.enable, handle.disable):
        with pytest.raises(RuntimeError, match="detached"):
            method()
    with pytest.raises(RuntimeError, match="detached"):
        handle.add("x", random_adapter(model))
    with pytest.raises(RuntimeError, match="detached"), handle.rows(None):
        pass
    assert torch.equal(logits(model, inputs), plain)


def test_context_manager_detaches_after_an_error(model):
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), mk.attach(model, random_adapter(model)):
        raise KeyboardInterrupt
    assert_same_objects(snapshot(model), before)


def test_attached_changes_only_the_configs_of_self_attention(model):
    before = snapshot(model)
    with mk.attach(model, random_adapter(model)):
        after = snapshot(model)
    assert {key[0].removesuffix(".config") for key in changes(after, before)} == {
        name for name, _ in model.named_modules() if SELF_ATTENTIONS.match(name)
    }


def test_parameters_and_files_are_the_plain_models(model, tmp_path):
    parameters = dict(model.named_parameters())
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    with mk.attach(model, random_adapter(model)):
        attached = dict(model.named_parameters())
        assert list(attached) == list(parameters)
        assert all(attached[name] is parameters[name] for name in parameters)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        model.save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes(), name


def test_only_self_attention_is_called_differently(model, monkeypatch):
    """Vision towers, perceivers and Idefics v1's cross-attention keep their implementation."""
    inputs = tiny_inputs(model)
    served = []
    function = hf_attention.attention_forward

    def spy(module, *args, **kwargs):
        served.append(module)
        return function(module, *args, **kwargs)

    monkeypatch.setattr(hf_attention, "attention_forward", spy)
    calls, stop = counted_calls(model)
    logits(model, inputs)
    plain_calls = dict(calls)
    calls.clear()
    with mk.attach(model, random_adapter(model)):
        logits(model, inputs)
    stop()
    assert calls == plain_calls
    names = {id(module): name for name, module in model.named_modules()}
    layers = text_config(model).num_hidden_layers
    served_names = [names[id(module)] for module in served]
    assert len(served_names) == layers
    assert all(SELF_ATTENTIONS.match(name) for name in served_names)
    elsewhere = {
        name
        for name in calls
        if re.search(r"(self_attn|cross_attn|attn)$", name) and not SELF_ATTENTIONS.match(name)
    }
    assert elsewhere, "the model has no other attention, so the test shows nothing"


def test_vision_states_are_untouched(model):
    inputs = tiny_inputs(model)
    vision = next(module for name, module in model.named_modules() if re.search(r"(vision|visual)", name))
    states = []
    hook = vision.register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    logits(model, inputs)
    with mk.attach(model, random_adapter(model)):
        logits(model, inputs)
    hook.remove()
    plain, attached = (getattr(state, "last_hidden_state", state) for state in states)
    assert torch.equal(plain, attached)


def test_another_instance_is_untouched():
    model, other = used_model("llava-llama"), used_model("llava-llama")
    inputs = tiny_inputs(model)
    before, plain = snapshot(other), logits(other, inputs)
    with mk.attach(model, random_adapter(model)):
        assert torch.equal(logits(other, inputs), plain)
        assert_same_objects(snapshot(other), before)
        with mk.attach(other, random_adapter(other, seed=1)):
            both = logits(model, inputs), logits(other, inputs)
        assert not torch.equal(*both)
        assert torch.equal(logits(model, inputs), both[0])


@pytest.mark.parametrize("make", [random_adapter, random_shift])
def test_deepcopy_works_independently(model, make):
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    adapter = make(model)
    handle = mk.attach(model, adapter)
    shifted = logits(model, inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, inputs), shifted)

    multiply(adapter, 2.0)
    assert not torch.equal(logits(model, inputs), shifted)
    assert torch.equal(logits(copied, inputs), shifted), "the copy shares the adapter"
    handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(copied, inputs), shifted), "the copy was detached too"
    with pytest.raises(ValueError, match="patched already"):
        mk.attach(copied, adapter)
    mk.detach(copied)
    assert torch.equal(logits(copied, inputs), plain)


def test_enable_and_disable(model):
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    with mk.attach(model, random_adapter(model)) as handle:
        shifted = logits(model, inputs)
        assert handle.enabled
        handle.disable()
        handle.disable()
        assert not handle.enabled
        assert torch.equal(logits(model, inputs), plain)
        handle.enable()
        assert handle.enabled
        assert torch.equal(logits(model, inputs), shifted)
    assert not handle.enabled


def test_disabled_nests_and_survives_errors():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    with mk.attach(model, random_adapter(model)) as handle:
        shifted = logits(model, inputs)
        with handle.disabled():
            with handle.disabled():
                assert torch.equal(logits(model, inputs), plain)
            assert not handle.enabled, "the inner block switched the adapters on"
            assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(logits(model, inputs), shifted)

        with pytest.raises(ZeroDivisionError), handle.disabled():
            raise ZeroDivisionError
        assert torch.equal(logits(model, inputs), shifted)

        handle.disable()
        with handle.disabled():
            pass
        assert not handle.enabled, "the block switched on what was off before"
        handle.enable()
        with handle.disabled():
            handle.detach()
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("enabled", [True, False])
def test_second_handle_is_refused(enabled):
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    first = mk.attach(model, random_adapter(model))
    shifted = logits(model, inputs)
    if not enabled:
        first.disable()
    with pytest.raises(ValueError, match=r"patched already.*mk.handle_of\(model\).*mk.detach\(model\)"):
        mk.attach(model, random_adapter(model, seed=1))
    first.enable()
    assert torch.equal(logits(model, inputs), shifted)
    first.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a handle that makes way
        with mk.attach(model, random_adapter(model, seed=1)):
            assert not torch.equal(logits(model, inputs), shifted)


def test_nothing_is_kept_alive():
    model = tiny_model("llava-llama")
    handle = mk.attach(model, random_adapter(model))
    alive = weakref.ref(model), weakref.ref(handle)
    del model, handle
    gc.collect()
    assert [x() for x in alive] == [None, None]


def test_adapter_changes_take_effect_at_once():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    adapter = random_adapter(model)
    with mk.attach(model, adapter):
        logits(model, inputs)
        multiply(adapter, 0.0)
        zeroed = logits(model, inputs)
    scale = float(zeroed.norm())
    # A shift of zero is the plain model up to rounding: sdpa and the op take other kernels.
    error = float((zeroed - logits(model, inputs)).norm())
    assert error <= 32 * torch.finfo(torch.float32).eps * scale


def test_implementation_without_attach_is_a_clear_error():
    model = tiny_model("llava-llama")
    hf_attention.register()
    model.config.text_config._attn_implementation_internal = hf_attention.NAME
    with pytest.raises(RuntimeError, match=r"mmicl_kernels\.attach"):
        logits(model, tiny_inputs(model))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_attention_dropout_is_refused(name):
    model = tiny_model(name)
    attentions = [x for key, x in model.named_modules() if SELF_ATTENTIONS.match(key)]
    for attention in attentions:
        attribute = "dropout" if hasattr(attention, "dropout") else "attention_dropout"
        assert hasattr(attention, attribute)
        setattr(attention, attribute, 0.1)
    inputs = tiny_inputs(model)
    with mk.attach(model, random_adapter(model)):
        logits(model, inputs)  # eval: there is no dropout
        model.train()
        with pytest.raises(ValueError, match=r"dropout is 0\.1"):
            logits(model, inputs)


def cut(model):
    model.model.language_model.layers = model.model.language_model.layers[:2]
    return model


OTHERS = [
    (lambda make: make(tiny_model("llava-llama", seed=1)), mk.CheckpointError, "weights are not those"),
    (
        lambda make: make(tiny_model("llava-qwen2")),
        mk.CheckpointError,
        "text_model_type is 'qwen2' in the adapter and 'llama'",
    ),
    (lambda make: make(cut(tiny_model("llava-llama"))), mk.CheckpointError, "layers is"),
    (lambda make: make(tiny_model("llava-llama")).to("meta"), ValueError, "on meta, expected cpu"),
]


@pytest.mark.parametrize("make", [random_adapter, random_shift])
@pytest.mark.parametrize("other, error, message", OTHERS)
def test_adapters_of_other_models_leave_the_model_alone(other, error, message, make):
    model = tiny_model("llava-llama")
    before, adapter = snapshot(model), other(make)
    with pytest.raises(error, match=message):
        mk.attach(model, adapter)
    assert_same_objects(snapshot(model), before)
    with mk.attach(model, make(model)) as handle:  # a refusal is no handle
        with pytest.raises(error, match=message):
            handle.add("other", adapter)
        assert list(handle.adapters) == ["default"]


@pytest.mark.parametrize(
    "adapter, options, error, message",
    [
        (lambda m: nn.Linear(2, 2), {}, TypeError, "expected an Adapter or a dict"),
        (lambda m: "adapter", {}, TypeError, "'adapter', expected an Adapter"),
        (lambda m: {}, {}, TypeError, "expected an Adapter or a dict"),
        (lambda m: {"a": nn.Linear(2, 2)}, {}, TypeError, "'a' is a Linear, expected one of MimICAdapter"),
        (lambda m: {"a": random_shift(m), "b": nn.Linear(2, 2)}, {}, TypeError, "'b' is a Linear"),
        (
            lambda m: {"a": random_adapter(m), "b": random_adapter(m, normalizer="all_keys")},
            {},
            ValueError,
            "'b' has normalizer 'all_keys', expected 'visible'",
        ),
        (lambda m: dict.fromkeys("ab", random_shift(m)), {}, ValueError, "name 'b' or its adapter"),
        (lambda m: {"a": random_shift(m), "b": random_shift(m)}, {"slots": 1}, ValueError, "slots is 1"),
        (random_adapter, {"slots": 0}, ValueError, "slots is 0"),
        (random_adapter, {"slots": "many"}, ValueError, "slots is 'many'"),
        (random_adapter, {"impl": "fast"}, ValueError, "impl is 'fast'"),
        (random_shift, {"impl": "fast"}, ValueError, "impl is 'fast'"),
        (random_shift, {"strength": float("nan")}, ValueError, "strength is nan, expected a finite"),
        (random_shift, {"strength": 1e39}, ValueError, r"strength is 1e\+39, expected a finite .* fp32"),
        (random_shift, {"strength": 10**400}, ValueError, "strength is 1000.*, expected a finite"),
        (random_shift, {"strength": "full"}, TypeError, "strength is 'full', expected a number"),
        (random_shift, {"strength": True}, TypeError, "strength is True, expected a number"),
        (random_adapter, {"strength": 0.5}, ValueError, r"is 0\.5, expected 1: 'default' is a MimIC"),
        (library, {"strength": 2}, ValueError, "strength is 2.*'mimic' is a MimIC"),
    ],
)
def test_refused_arguments_leave_the_model_alone(adapter, options, error, message):
    model = tiny_model("llava-llama")
    before, adapter = snapshot(model), adapter(model)
    with pytest.raises(error, match=message):
        mk.attach(model, adapter, **options)
    assert_same_objects(snapshot(model), before)
    mk.attach(model, random_shift(model)).detach()  # a refusal is no handle


def test_create_refuses_another_config():
    with pytest.raises(TypeError, match="config is a dict, expected one of MimICConfig"):
        mk.create(tiny_model("llava-llama"), {"normalizer": "visible"})


def test_an_interrupted_add_leaves_what_was_there(monkeypatch):
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    with mk.attach(model, {"a": random_adapter(model)}) as handle:
        with handle.rows("a"):
            expected = logits(model, inputs)
        before, installed = snapshot(model), []

        def interrupted(hook):
            installed.append(hook)
            if len(installed) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(ResidualHook, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.add("b", mk.create(model, mk.M2IVConfig()))
        monkeypatch.undo()
        assert list(handle.adapters) == ["a"]
        assert_same_objects(snapshot(model), before)
        with handle.rows("a"):
            assert torch.equal(logits(model, inputs), expected)
        handle.add("b", mk.create(model, mk.M2IVConfig()))
    assert torch.equal(logits(model, inputs), plain)


def warnings_of_padding(implementation, normalizer, paddings, name="llava-llama"):
    """Of each forward pass, how many."""
    model = tiny_model(name, attn_implementation=implementation)
    found = []
    with mk.attach(model, random_adapter(model, normalizer=normalizer)):
        for padding in paddings:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                logits(model, tiny_inputs(model, padding=padding))
            found.append(sum("expected 'eager' for that code's numbers" in str(x.message) for x in caught))
    return found


def test_the_official_gate_meets_padding():
    """Said once, where its numbers are others, and only there."""
    assert warnings_of_padding("sdpa", "all_keys", [None, "right", "left", "left"]) == [0, 0, 1, 0]
    assert warnings_of_padding("eager", "all_keys", ["left"]) == [0]
    # Its first layers have no attention.
    assert warnings_of_padding("sdpa", "all_keys", ["left"], "lfm2_vl") == [1]
    assert warnings_of_padding("sdpa", "visible", ["left"]) == [0]
