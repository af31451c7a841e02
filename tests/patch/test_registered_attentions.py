"""Base attentions that somebody else registered: their masks are understood, or MimIC is refused."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.family_oracles import adapter_of
from tests.patch.test_support_matrix import logit_budget, model_of, relative_error, with_base
from tests.support.published import logits, random_adapter

MASKS = {
    "sdpa_mask": sdpa_mask,
    "eager_mask": eager_mask,
    "flash_attention_mask": flash_attention_mask,
    "flex_attention_mask": flex_attention_mask,
}
# What the masks mean must not be read from a name.
NAMES = ("flash_of_mine", "somebody/sdpa-kernel")


@pytest.fixture
def registered(monkeypatch):
    """``register(name, mask)``: a function that must not be called, and who makes its masks, if anybody."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))

    def register(name, mask=None):
        AttentionInterface.register(name, replaced)
        if mask is not None:
            AttentionMaskInterface.register(name, mask)

    return register


def replaced(*args, **kwargs):
    raise AssertionError("a patched layer asked for the function it replaces")


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_masks_of_transformers_mean_what_they_mean(name, mask, padding, registered):
    registered(name, MASKS[mask])
    known = model_of("llava-llama")
    adapter, inputs = adapter_of(known, "mimic"), tiny_inputs(known, padding=padding)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = 5
    with torch.no_grad(), mk.attach(known, adapter):
        expected = known(**inputs).logits
    model = with_base("llava-llama", name)
    with torch.no_grad(), mk.attach(model, adapter):
        actual = model(**inputs).logits
        other = model(**{**inputs, "input_ids": changed}).logits
    seen = inputs["attention_mask"].bool()
    assert relative_error(actual[seen], expected[seen]) <= logit_budget("llava-llama", "mimic")
    assert torch.equal(other[:, :-1][seen[:, :-1]], actual[:, :-1][seen[:, :-1]])
    assert padding == "right" or not torch.equal(other[:, -1], actual[:, -1])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("mask", ["sdpa_mask", "eager_mask"])
def test_generation(mask, cache, registered):
    registered("mine", MASKS[mask])
    adapter = adapter_of(model_of("llava-llama"), "mimic")
    inputs = tiny_inputs(model_of("llava-llama"), padding="left")
    options = {"max_new_tokens": 8, "do_sample": False, **cache}
    with mk.attach(model_of("llava-llama"), adapter):
        expected = model_of("llava-llama").generate(**inputs, **options)
    model = with_base("llava-llama", "mine")
    with mk.attach(model, adapter):
        assert torch.equal(model.generate(**inputs, **options), expected)


def wrapped_sdpa_mask(*args, **kwargs):
    return sdpa_mask(*args, **kwargs)


@dataclass
class Maker:
    """One that cannot be looked up in a dict."""

    __name__ = "wrapped_sdpa_mask"

    def __call__(self, *args, **kwargs):
        return sdpa_mask(*args, **kwargs)


UNKNOWN = {"none": None, "a function of its own": wrapped_sdpa_mask, "an object": Maker()}
REFUSAL = "MimIC cannot stand in for attention implementation 'mine'"


@pytest.mark.parametrize("mask", UNKNOWN)
def test_masks_that_may_mean_anything_are_refused(mask, registered):
    registered("mine", UNKNOWN[mask])
    model = with_base("llava-llama", "mine")
    gates, vectors = random_adapter(model), adapter_of(model, "m2iv")
    found = "found none" if mask == "none" else "found wrapped_sdpa_mask"
    with pytest.raises(
        mk.UnsupportedModelError, match=f"{REFUSAL}.*expected masks made by sdpa_mask.*{found}"
    ):
        mk.attach(model, gates)
    assert not [x for x in model.modules() if hasattr(x, "mmicl_layer")]
    with mk.attach(model, {"vectors": vectors}) as handle:  # which replace no attention
        with pytest.raises(mk.UnsupportedModelError, match=REFUSAL):
            handle.add("gates", gates)
        assert list(handle.adapters) == ["vectors"]


@pytest.mark.parametrize("mask", UNKNOWN)
def test_a_change_after_attach_is_refused(mask, registered):
    registered("mine", UNKNOWN[mask])
    model = tiny_model("llava-llama")
    adapter, inputs = random_adapter(model), tiny_inputs(model)
    with mk.attach(model, adapter) as handle:
        expected = logits(model, inputs)
        model.set_attn_implementation({"text_config": "mine"})
        for _ in range(2):
            with pytest.raises(mk.UnsupportedModelError, match=REFUSAL):
                model(**inputs)
        handle.disable()
        handle.enable()
        with pytest.raises(mk.UnsupportedModelError, match=REFUSAL):
            model(**inputs)
        model.set_attn_implementation({"text_config": "sdpa"})
        assert torch.equal(logits(model, inputs), expected)
        AttentionMaskInterface.register("sdpa", wrapped_sdpa_mask)
        with pytest.raises(mk.UnsupportedModelError, match="'sdpa'.*found wrapped_sdpa_mask"):
            model(**inputs)


def test_a_mask_overridden_for_this_process_alone(registered, monkeypatch):
    """``ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = ...`` wins over what is registered."""
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", wrapped_sdpa_mask)
    model = tiny_model("llava-llama")
    with pytest.raises(mk.UnsupportedModelError, match="found wrapped_sdpa_mask"):
        mk.attach(model, random_adapter(model))


def test_the_report_says_whose_function_is_replaced(registered):
    registered("mine", sdpa_mask)
    lines = {}
    for base in ("sdpa", "eager", "mine"):
        model = with_base("llava-llama", base)
        with mk.attach(model, random_adapter(model)) as handle:
            lines[base] = str(handle.report())
    assert lines["sdpa"] == lines["eager"] and "in place of" not in lines["sdpa"]
    assert lines["mine"] == lines["sdpa"].replace("of default", "of default; in place of 'mine'")
    for base in ("sdpa", "eager"):
        AttentionInterface.register(base, lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
        model = with_base("llava-llama", base)
        with mk.attach(model, random_adapter(model)) as handle:
            assert f"in place of {base!r}" in str(handle.report())


def test_a_patched_attentions_config_is_one_to_show_and_to_save(tmp_path):
    model = tiny_model("llava-llama")
    attention = model.model.language_model.layers[0].self_attn
    plain = attention.config
    with mk.attach(model, random_adapter(model)):
        config = attention.config
        assert config is not plain
        assert repr(config) == repr(plain) and config.to_dict() == plain.to_dict()
        assert json.loads(config.to_json_string()) == json.loads(plain.to_json_string())
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(tmp_path).to_dict() == plain.to_dict()
        assert copy.deepcopy(config).to_dict() == plain.to_dict() and config == plain
        copied = type(config)(**config.to_dict())
        assert copied.to_dict() == plain.to_dict()
    assert attention.config is plain
