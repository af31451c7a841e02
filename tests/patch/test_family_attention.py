"""Ways in which attention could be shifted wrong and nobody would see: masks, scales, caps and gates."""

import copy

import pytest
import torch
from transformers import StaticCache

import mmicl_kernels as mk
from mmicl_kernels.patch.sites.hf_attention import attention_forward
from mmicl_kernels.testing.tiny_models import tiny_inputs
from tests.patch.empty_cells import VERSION
from tests.patch.family_oracles import adapter_of, attached, decoder_layers, independent
from tests.patch.test_support_matrix import base_of, logit_budget
from tests.patch.trap_tools import (
    EPS,
    M_ROPE,
    assert_by_hand,
    cross_attentions,
    families,
    frozen,
    mimic_calls,
    recorded,
    recorded_attention,
    relative_error,
)
from tests.support.published import fix_gates, whole_logits


def alone(inputs, row, padding):
    """The prompt of one row by itself, without its padding on the left."""
    R, T = inputs["input_ids"].shape
    picked = {}
    for name, x in inputs.items():
        picked[name] = x.chunk(R, 0 if x.shape[0] % R == 0 else -1)[row]  # MiniCPM's images are side by side
        if x.shape[:2] == (R, T):
            picked[name] = picked[name][:, padding:]
        if name == "image_token_pooling":  # counts the patches of all images
            picked[name] = picked[name] - picked[name].min()
    return picked


def with_positions(model, name, inputs):
    """As ``generate`` gives them, where a family does not make them from the mask itself.

    Scores of rotated queries and keys do not feel where a prompt begins, but MimIC's gate does.
    """
    if name in (*M_ROPE, "idefics", "blip2"):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@families()
def test_padding_on_the_left_changes_nothing(name):
    """An attention under a name without a mask function gets no mask at all: padding is attended to."""
    model = frozen(name, base_of(name))
    inputs = with_positions(model, name, tiny_inputs(model, padding="left"))
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        expected = whole_logits(model, alone(inputs, 1, 2))[0]
        actual = whole_logits(model, inputs)[1, 2:]
        unmasked = whole_logits(
            model, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        )
    assert relative_error(actual, expected) <= logit_budget(name, "mimic")
    assert relative_error(unmasked[1, 2:], expected) > 1000 * logit_budget(name, "mimic")


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_gemma4_slices_its_prefill_before_layers_that_share_keys(base, padding):
    """It reads the implementation's name to know whether it may: another one would leave causality out."""
    model = frozen("gemma4", base)
    inputs = tiny_inputs(model, padding=padding)
    adapter = adapter_of(model, "mimic")
    with independent(model, "mimic", adapter):
        expected = whole_logits(model, inputs)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    last = decoder_layers(model)["3"]
    with recorded(last) as calls, attached(model, "mimic", adapter):
        full = whole_logits(model, inputs)
        two = whole_logits(model, inputs, logits_to_keep=2)
        one = whole_logits(model, inputs, logits_to_keep=1, past_key_values=cache)
    budget = logit_budget("gemma4", "mimic")
    shown = inputs["attention_mask"].bool()
    assert relative_error(full[shown], expected[shown]) <= budget
    assert relative_error(two, expected[:, -2:]) <= budget
    assert relative_error(one, expected[:, -1:]) <= budget
    # Where it may, it does: else the test would show nothing.
    sliced = VERSION == "5.23" and (base == "eager" or padding == "left")
    assert calls[1].hidden.shape[1] == (2 if sliced else 12)


@torch.no_grad()
def test_paligemma_without_token_types_is_not_causal():
    """Its attentions have is_causal=False, which a mask that is None leaves to them."""
    model = frozen("paligemma")
    inputs = {name: x for name, x in tiny_inputs(model).items() if name != "token_type_ids"}
    adapter = adapter_of(model, "mimic")
    fix_gates(adapter, -1e4)
    plain = whole_logits(model, inputs)
    with mk.attach(model, adapter):
        assert relative_error(whole_logits(model, inputs), plain) <= logit_budget("paligemma", "mimic")
    layers = decoder_layers(model).values()
    assert not any(layer.self_attn.is_causal for layer in layers)


@torch.no_grad()
def test_paligemmas_attention_of_a_prompt_goes_both_ways(monkeypatch):
    """With a mask and without: who took None for causal would hide the later tokens of the prefix."""
    model, calls = frozen("paligemma"), recorded_attention(monkeypatch)
    adapter, inputs = adapter_of(model, "mimic"), tiny_inputs(model)
    every = torch.ones(12, 12, dtype=torch.bool)
    with mk.attach(model, adapter):
        whole_logits(model, inputs)
        for call, layer in zip(list(calls), adapter.layers.values(), strict=True):
            further = assert_by_hand(call, layer, every, scaling=8**-0.5)
            assert further(every.tril()) > 1000
            bare, _ = attention_forward(call.module, call.query, call.key, call.value, None, scaling=8**-0.5)
            assert relative_error(bare, call.out) <= 16 * EPS


def windows(size):
    """Causal ``[12, 12]``, keys at most ``size - 1`` before."""
    return torch.ones(12, 12, dtype=torch.bool).tril().triu(1 - size)


@torch.no_grad()
def test_llama4s_chunks_are_in_the_mask_alone(monkeypatch):
    """The attention function is told nothing of them: without the mask it would look into other chunks."""
    causal = windows(12)
    chunks = causal & (torch.arange(12)[:, None] // 8 == torch.arange(12) // 8)
    for (call, layer), chunked in zip(mimic_calls(monkeypatch, "llama4"), [1, 1, 0, 0], strict=True):
        assert call.options.get("sliding_window") is None
        further = assert_by_hand(call, layer, chunks if chunked else causal, scaling=16**-0.5)
        assert further(causal if chunked else chunks) > 1000


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_mistrals_window_is_in_the_mask(monkeypatch, base):
    """The attention function is told a window too, which must not be cut out once more, nor be left out."""
    for call, layer in mimic_calls(monkeypatch, "mistral", base):
        further = assert_by_hand(call, layer, windows(8), scaling=8**-0.5)
        assert further(windows(12)) > 1000
        assert further(windows(7)) > 1000


@torch.no_grad()
def test_paligemma2s_cap_is_in_the_gates_normalizer(monkeypatch):
    """The lse is of the capped scores: softmax and gate must divide by the same sum."""
    for call, layer in mimic_calls(monkeypatch, "paligemma2", "eager"):
        seen = call.mask[0, 0] > -1
        further = assert_by_hand(call, layer, seen, scaling=0.25, softcap=50.0)
        assert further(capped_gate=False) > 100
        assert further(softcap=None) > 100


@torch.no_grad()
def test_blip2s_queries_come_scaled(monkeypatch):
    """OPT scales them by itself and says 1: another 1 / sqrt(D) would flatten softmax and gate."""
    model, calls = frozen("blip2"), recorded_attention(monkeypatch)
    adapter = adapter_of(model, "mimic")
    attentions = [layer.self_attn for layer in decoder_layers(model).values()]
    with recorded(*attentions) as inputs, mk.attach(model, adapter):
        whole_logits(model, tiny_inputs(model))
    for call, layer, given in zip(calls, adapter.layers.values(), inputs, strict=True):
        scaled = given.module.q_proj(given.hidden).unflatten(-1, (4, 8)).transpose(1, 2) * 8**-0.5
        assert relative_error(call.query, scaled) <= EPS
        further = assert_by_hand(call, layer, windows(12), scaling=1.0)
        assert further(scaling=8**-0.5) > 1000


@torch.no_grad()
def test_gemma4s_layers_have_heads_of_different_size(monkeypatch):
    """Global layers have wider heads than sliding ones: one geometry for all would not fit."""
    for (call, layer), width in zip(mimic_calls(monkeypatch, "gemma4"), [32, 64, 32, 64], strict=True):
        assert call.module.o_proj.in_features == width
        assert layer.weight.shape == layer.shift.shape == (4, width // 4)
        # Gemma4 norms its queries and scales no scores; its sliding layers see 8 keys.
        assert_by_hand(call, layer, windows(8 if width == 32 else 12), scaling=1.0)


@torch.no_grad()
def test_qwen3_5s_output_gate_multiplies_the_shift():
    """A shift after the gate would reach o_proj whole, where attention itself does not."""
    model = frozen("qwen3_5")
    adapter = adapter_of(model, "mimic").requires_grad_(False)
    fix_gates(adapter, 1e4)  # MimIC's own gate is open: 1 - exp(-1e4)
    still = copy.deepcopy(adapter)
    first, *_ = still.layers
    still.layers[first].shift.zero_()
    attention = decoder_layers(model)[first].self_attn
    with recorded(attention, attention.o_proj) as calls:
        for x in (adapter, still):
            with mk.attach(model, x):
                whole_logits(model, tiny_inputs(model))
    moved, whole, unmoved, _ = calls
    gate = attention.q_proj(whole.hidden).unflatten(-1, (4, 32))[..., 16:].sigmoid()
    expected = (gate * adapter.layers[first].shift).flatten(-2)
    error = (moved.hidden - unmoved.hidden - expected).abs()
    # Roundings of a gate, a sum and a product, on both sides.
    assert (error <= 8 * EPS * (moved.hidden.abs() + unmoved.hidden.abs() + expected.abs())).all()
    ungated = adapter.layers[first].shift.flatten().expand_as(expected)
    assert relative_error(ungated, expected) > 0.1


@torch.no_grad()
def test_idefics_numbers_its_cross_attention_anew(monkeypatch):
    """By layer_idx cross-attention would get the shift of the self-attention of the same number."""
    model, calls = frozen("idefics"), recorded_attention(monkeypatch)
    layers = decoder_layers(model)
    numbers = [attention.layer_idx for _, attention in cross_attentions(model, "idefics")]
    assert numbers == [0, 1] and [x.self_attn.layer_idx for x in layers.values()] == [0, 1, 2, 3]
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        whole_logits(model, tiny_inputs(model))
    assert [call.module for call in calls] == [layer.self_attn for layer in layers.values()]
    for index, call in zip(layers, calls, strict=True):
        further = assert_by_hand(call, adapter.layers[index], windows(12), scaling=8**-0.5)
        other = adapter.layers[str((int(index) + 1) % 4)]
        with pytest.raises(AssertionError):
            assert_by_hand(call, other, windows(12), scaling=8**-0.5)
        assert further() <= 1
