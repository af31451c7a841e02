"""Attaching and detaching: nothing remains, nothing else is touched, every refusal leaves the plain model."""

import copy
import gc
import re
import weakref

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, LlavaConfig, LlavaForConditionalGeneration

import mmicl_kernels as mk
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.patch.sites.residual import ResidualHook
from mmicl_kernels.testing.tiny_models import TEXT, TINY_MODELS, VISION, tiny_inputs, tiny_model
from tests.patch.snapshots import assert_same_objects, changes, snapshot, used_model
from tests.support.published import (
    SELF_ATTENTIONS,
    counted_calls,
    logits,
    multiply,
    random_adapter,
    text_config,
)


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


def test_deepcopy_works_independently(model):
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    adapter = random_adapter(model)
    handle = mk.attach(model, adapter)
    shifted = logits(model, inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, inputs), shifted)

    multiply(adapter, -1.0)
    assert not torch.equal(logits(model, inputs), shifted)
    assert torch.equal(logits(copied, inputs), shifted), "the copy shares the adapter"
    handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(copied, inputs), shifted), "the copy was detached too"
    with pytest.raises(ValueError, match="patched already"):
        mk.attach(copied, adapter)


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
    with pytest.raises(ValueError, match="patched already"):
        mk.attach(model, random_adapter(model, seed=1))
    first.enable()
    assert torch.equal(logits(model, inputs), shifted)
    first.detach()
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


class Unsupported:
    """Models that are refused, with what the message must name."""

    @staticmethod
    def plain_module():
        return nn.Linear(2, 2), ["Linear", "None", "idefics", "llava", "qwen2_5_vl"]

    @staticmethod
    def unknown_family():
        model = tiny_model("llava-llama")
        model.config.model_type = "video_llava"
        return model, ["video_llava", "idefics2"]

    @staticmethod
    def unknown_text_model():
        config = LlavaConfig(text_config=GPTNeoXConfig(**TEXT), vision_config=clip())
        model = LlavaForConditionalGeneration(config)
        return model, ["llava", "gpt_neox", "llama", "qwen2", "GPTNeoXAttention"]

    @staticmethod
    def missing_child():
        model = tiny_model("llava-llama")
        del model.model.language_model.layers[1].mlp
        return model, ["llava", "layers.1", "mlp", "self_attn"]

    @staticmethod
    def missing_path():
        model = tiny_model("idefics2")
        model.model.decoder = model.model.text_model
        del model.model.text_model
        return model, ["idefics2", "text_model", "decoder"]

    @staticmethod
    def no_layers():
        model = tiny_model("llava-llama")
        model.model.language_model.layers = nn.ModuleList()
        return model, ["llava", "layers"]

    @staticmethod
    def odd_head_dim():
        model = tiny_model("llava-llama")
        model.model.language_model.layers[2].self_attn.head_dim = 7
        return model, ["layers.2", "head_dim", "7", "32"]


def clip():
    return tiny_model("llava-llama").config.vision_config if VISION else None


@pytest.mark.parametrize("case", [x for x in vars(Unsupported) if not x.startswith("_")])
def test_unsupported_models_name_what_was_looked_for(case):
    model, words = getattr(Unsupported, case)()
    before = snapshot(model)
    adapter = random_adapter(tiny_model("llava-llama"))
    for call in (
        lambda: mk.attach(model, adapter),
        lambda: mk.create(model, mk.MimICConfig()),
        lambda: mk.load("nowhere", model),
        lambda: mk.load_official("nowhere", model),
    ):
        with pytest.raises(mk.UnsupportedModelError) as error:
            call()
        assert [word for word in words if word not in str(error.value)] == []
    assert_same_objects(snapshot(model), before)


def of_other_weights():
    return random_adapter(tiny_model("llava-llama", seed=1))


def of_other_class():
    return random_adapter(tiny_model("llava-qwen2"))


def of_other_geometry():
    model = tiny_model("llava-llama")
    model.model.language_model.layers = model.model.language_model.layers[:2]
    return random_adapter(model)


def on_meta():
    return random_adapter(tiny_model("llava-llama")).to("meta")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (of_other_weights, mk.CheckpointError, "weights are not those"),
        (of_other_class, mk.CheckpointError, "text_model_type is 'qwen2' in the adapter and 'llama'"),
        (of_other_geometry, mk.CheckpointError, "layers is"),
        (on_meta, ValueError, "on meta, expected cpu"),
        (lambda: nn.Linear(2, 2), TypeError, "expected an Adapter or a dict"),
        (lambda: "adapter", TypeError, "'adapter', expected an Adapter"),
        (dict, TypeError, "expected an Adapter or a dict"),
        (lambda: {"a": nn.Linear(2, 2)}, TypeError, "'a' is a Linear, expected one of MimICAdapter"),
        (
            lambda: {
                "a": random_adapter(tiny_model("llava-llama")),
                "b": random_adapter(tiny_model("llava-llama"), normalizer="all_keys"),
            },
            ValueError,
            "'b' has normalizer 'all_keys', expected 'visible'",
        ),
    ],
)
def test_refused_adapters_leave_the_model_alone(make, error, message):
    model = tiny_model("llava-llama")
    before, adapter = snapshot(model), make()
    with pytest.raises(error, match=message):
        mk.attach(model, adapter)
    assert_same_objects(snapshot(model), before)
    with mk.attach(model, random_adapter(model)) as handle:  # a refusal is no handle
        if isinstance(adapter, mk.MimICAdapter):
            with pytest.raises(error, match=message):
                handle.add("other", adapter)
            assert list(handle.adapters) == ["default"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"impl": "fast"}, "impl is 'fast'"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": "many"}, "slots is 'many'"),
    ],
)
def test_refused_options(options, message):
    model = tiny_model("llava-llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        mk.attach(model, random_adapter(model), **options)
    assert_same_objects(snapshot(model), before)


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
