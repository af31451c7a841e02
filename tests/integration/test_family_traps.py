"""Each way in which a family could be patched wrong and nobody would see: a test that falls into it fails."""

import copy
import re

import pytest
import torch
import transformers
from empty_cells import REFUSED, VERSION
from family_oracles import adapter_of, attached, decoder_layers, independent
from residuals import random_shift
from snapshots import snapshot
from spliced_prompts import CHOSEN, PLACEHOLDERS, longer, ordinary_tokens
from test_support_matrix import base_of, logit_budget
from torch.utils._pytree import tree_leaves
from trap_tools import (
    EPS,
    assert_by_hand,
    frozen,
    recorded,
    recorded_attention,
    relative_error,
    restored,
)
from transformers import LogitsProcessor, PreTrainedConfig, StaticCache

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available, tiny_inputs

# Of each way in which the stream, the masks and the tower differ, one, in `make test`.
QUICK = ("blip2", "cohere2_vision", "gemma4", "glm4v", "llama4", "mllama", "molmo2-norm_after", "qwen3_5")
ATTENTION = re.compile(r"norm|^(self_attn|linear_attn|conv)$")
M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe")


def families(*names, quick=QUICK):
    """Those of ``names`` that the installed transformers has, all by default; slow but for ``quick``."""
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in names or ALL_MODELS}
    for name, x in marks.items():
        if not is_available(name):
            x.append(pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {name}"))
    return pytest.mark.parametrize("name", [pytest.param(name, marks=x) for name, x in marks.items()])


@torch.no_grad()
def logits(model, inputs, **options):
    return model(**inputs, **options).logits


# --- the residual stream


def zero_shift(model):
    adapter = mk.create(model, mk.M2IVConfig()).requires_grad_(False)
    for name, x in adapter.named_parameters():
        x.fill_(1.0 if name.endswith("scale") else 0.0)
    return adapter


def zero_all_but_attention(layer):
    """So that a layer returns its input and what its attention's branch brings, whatever the MLP is called."""
    for name, child in layer.named_children():
        if not ATTENTION.search(name):
            for x in child.parameters():
                x.zero_()
    if hasattr(layer, "layer_scalar"):  # Gemma4 scales the whole stream at the end
        layer.layer_scalar.fill_(1.0)


@families()
@torch.no_grad()
def test_after_attention_the_stream_moves_by_exactly_the_vector(name):
    """A vector before the norm of a branch, or in a module that only the MLP reads, moves it otherwise."""
    model = frozen(name, base_of(name))
    inputs, layers, adapter = tiny_inputs(model), decoder_layers(model), zero_shift(model)
    assert list(adapter.layers) == list(layers)
    with recorded(*layers.values()) as calls, mk.attach(model, adapter) as handle:
        for index, layer in layers.items():
            vector = adapter.layers[index].attn.vector.normal_()
            calls.clear()
            with restored(layer):
                zero_all_but_attention(layer)
                model(**inputs)
                with handle.disabled():
                    model(**inputs)
            moved, plain = (call for call in calls if call.module is layer)
            assert torch.equal(moved.hidden, plain.hidden)
            error = (moved.result.double() - plain.result.double() - vector.double()).abs()
            # Rounded are x + a, a + v and x + (a + v), by half an epsilon each.
            terms = (plain.hidden, plain.result, moved.result, vector)
            assert (error <= EPS * sum(x.abs() for x in terms)).all(), index
            vector.zero_()


@families()
@torch.no_grad()
def test_after_the_mlp_the_stream_moves_by_exactly_the_vector(name):
    """Gemma4 adds per-layer embeddings after the MLP and scales the sum: the MLP's end is not the layer's."""
    model = frozen(name, base_of(name))
    inputs, layers, adapter = tiny_inputs(model), decoder_layers(model), zero_shift(model)
    with recorded(*layers.values()) as calls, mk.attach(model, adapter) as handle:
        for index, layer in layers.items():
            vector = adapter.layers[index].mlp.vector.normal_()
            calls.clear()
            model(**inputs)
            with handle.disabled():
                model(**inputs)
            moved, plain = (call.result for call in calls if call.module is layer)
            assert torch.equal(moved, plain + vector), index
            vector.zero_()


@families("gemma4", "glm4v", "idefics", "mllama", "phi4_multimodal", "qwen3_5", quick=("glm4v", "mllama"))
@torch.no_grad()
def test_recorded_hidden_states_see_the_shift(name):
    """HuggingFace records them with hooks: without prepend=True ours would come too late for them."""
    model = frozen(name)
    inputs, adapter = tiny_inputs(model), random_shift(model)
    with mk.attach(model, adapter):  # before a forward pass without them, which Phi4 of 5.23 needs
        actual = model(**inputs, output_hidden_states=True).hidden_states
    with independent(model, "m2iv", adapter):
        expected = model(**inputs, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) > len(adapter.layers)
    moved = 0
    plain = model(**inputs, output_hidden_states=True).hidden_states
    for x, y, before in zip(actual, expected, plain, strict=True):
        assert relative_error(x, y) <= logit_budget(name, "m2iv")
        moved += relative_error(x, before) > 0.1
    # All but those before the first decoder layer, of which Mllama has the cross-attention's.
    assert moved >= len(adapter.layers)


@torch.no_grad()
def test_glm4vs_post_attention_layernorm_is_before_the_mlp():
    """Gemma's site of that name: there the vector would reach the MLP, and never the stream."""
    model = frozen("glm4v")
    adapter = zero_shift(model)
    layer, vector = decoder_layers(model)["1"], adapter.layers["1"].attn.vector.normal_()
    with recorded(layer, layer.self_attn) as calls, mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    attention, whole = calls
    middle = whole.hidden + (layer.post_self_attn_layernorm(attention.result) + vector)
    expected = middle + layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(middle)))
    assert torch.equal(whole.result, expected)
    without = middle - vector
    wrong = without + layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(without) + vector))
    assert relative_error(wrong, expected) > 0.1


@families("molmo2-norm_after")
@torch.no_grad()
def test_molmo2_may_norm_after_its_branches(name):
    """Its input_layernorm is then what ends the attention's branch: a vector before it would be normed."""
    model = frozen(name)
    adapter = zero_shift(model)
    layer, vector = decoder_layers(model)["1"], adapter.layers["1"].attn.vector.normal_()
    with recorded(layer, layer.self_attn) as calls, mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    attention, whole = calls
    middle = whole.hidden + (layer.input_layernorm(attention.result) + vector)
    expected = middle + layer.post_attention_layernorm(layer.mlp(middle))
    assert torch.equal(whole.result, expected)
    wrong = whole.hidden + layer.input_layernorm(attention.result + vector)
    assert relative_error(wrong, middle) > 0.1


# --- masks


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
    """An attention without a mask function of its own gets no mask from HuggingFace: padding is attended to."""
    model = frozen(name, base_of(name))
    inputs = with_positions(model, name, tiny_inputs(model, padding="left"))
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        expected = logits(model, alone(inputs, 1, 2))[0]
        actual = logits(model, inputs)[1, 2:]
        unmasked = logits(model, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
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
        expected = logits(model, inputs)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    last = decoder_layers(model)["3"]
    with recorded(last) as calls, attached(model, "mimic", adapter):
        full = logits(model, inputs)
        two = logits(model, inputs, logits_to_keep=2)
        one = logits(model, inputs, logits_to_keep=1, past_key_values=cache)
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
    closed = copy.deepcopy(adapter).requires_grad_(False)
    for layer in closed.layers.values():
        layer.weight.zero_()
        layer.bias.fill_(-1e4)
    plain = logits(model, inputs)
    with mk.attach(model, closed):
        assert relative_error(logits(model, inputs), plain) <= logit_budget("paligemma", "mimic")
    layers = decoder_layers(model).values()
    assert not any(layer.self_attn.is_causal for layer in layers)


@torch.no_grad()
def test_paligemmas_attention_of_a_prompt_goes_both_ways(monkeypatch):
    """With a mask and without: who took None for causal would hide the later tokens of the prefix."""
    model, calls = frozen("paligemma"), recorded_attention(monkeypatch)
    adapter, inputs = adapter_of(model, "mimic"), tiny_inputs(model)
    every = torch.ones(12, 12, dtype=torch.bool)
    with mk.attach(model, adapter):
        logits(model, inputs)
        for call, layer in zip(list(calls), adapter.layers.values(), strict=True):
            further = assert_by_hand(call, layer, every, scaling=8**-0.5)
            assert further(every.tril()) > 1000
            bare, _ = mk.integration.hf_attention.attention_forward(
                call.module, call.query, call.key, call.value, None, scaling=8**-0.5
            )
            assert relative_error(bare, call.out) <= 16 * EPS


def windows(size):
    """Causal ``[12, 12]``, keys at most ``size - 1`` before."""
    return torch.ones(12, 12, dtype=torch.bool).tril().triu(1 - size)


@torch.no_grad()
def test_llama4s_chunks_are_in_the_mask_alone(monkeypatch):
    """The attention function is told nothing of them: without the mask it would look into other chunks."""
    model, calls = frozen("llama4"), recorded_attention(monkeypatch)
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    causal = windows(12)
    chunks = causal & (torch.arange(12)[:, None] // 8 == torch.arange(12) // 8)
    for call, layer, chunked in zip(calls, adapter.layers.values(), [1, 1, 0, 0], strict=True):
        assert call.options.get("sliding_window") is None
        further = assert_by_hand(call, layer, chunks if chunked else causal, scaling=16**-0.5)
        assert further(causal if chunked else chunks) > 1000


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@torch.no_grad()
def test_mistrals_window_is_in_the_mask(monkeypatch, base):
    """The attention function is told a window too, which must not be cut out once more, nor be left out."""
    model, calls = frozen("mistral", base), recorded_attention(monkeypatch)
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    for call, layer in zip(calls, adapter.layers.values(), strict=True):
        further = assert_by_hand(call, layer, windows(8), scaling=8**-0.5)
        assert further(windows(12)) > 1000
        assert further(windows(7)) > 1000


# --- attentions of their own


@torch.no_grad()
def test_paligemma2s_cap_is_in_the_gates_normalizer(monkeypatch):
    """The lse is of the capped scores: softmax and gate must divide by the same sum."""
    model, calls = frozen("paligemma2", "eager"), recorded_attention(monkeypatch)
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    for call, layer in zip(calls, adapter.layers.values(), strict=True):
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
        logits(model, tiny_inputs(model))
    for call, layer, given in zip(calls, adapter.layers.values(), inputs, strict=True):
        scaled = given.module.q_proj(given.hidden).unflatten(-1, (4, 8)).transpose(1, 2) * 8**-0.5
        assert relative_error(call.query, scaled) <= EPS
        further = assert_by_hand(call, layer, windows(12), scaling=1.0)
        assert further(scaling=8**-0.5) > 1000


@torch.no_grad()
def test_gemma4s_layers_have_heads_of_different_size(monkeypatch):
    """Global layers have wider heads than sliding ones: one geometry for all would not fit."""
    model, calls = frozen("gemma4"), recorded_attention(monkeypatch)
    adapter = adapter_of(model, "mimic")
    widths = [layer.self_attn.o_proj.in_features for layer in decoder_layers(model).values()]
    assert widths == [32, 64, 32, 64]
    with mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    for i, (call, layer) in enumerate(zip(calls, adapter.layers.values(), strict=True)):
        assert layer.weight.shape == layer.shift.shape == (4, widths[i] // 4)
        # Gemma4 norms its queries and scales no scores; its sliding layers see 8 keys.
        assert_by_hand(call, layer, windows(8 if widths[i] == 32 else 12), scaling=1.0)


@torch.no_grad()
def test_qwen3_5s_output_gate_multiplies_the_shift():
    """A shift after the gate would reach o_proj whole, where attention itself does not."""
    model = frozen("qwen3_5")
    adapter = adapter_of(model, "mimic").requires_grad_(False)
    for layer in adapter.layers.values():  # MimIC's own gate is open: 1 - exp(-1e4)
        layer.weight.zero_()
        layer.bias.fill_(1e4)
    still = copy.deepcopy(adapter)
    first, *_ = still.layers
    still.layers[first].shift.zero_()
    attention = decoder_layers(model)[first].self_attn
    with recorded(attention, attention.o_proj) as calls:
        for x in (adapter, still):
            with mk.attach(model, x):
                logits(model, tiny_inputs(model))
    moved, whole, unmoved, _ = calls
    gate = attention.q_proj(whole.hidden).unflatten(-1, (4, 32))[..., 16:].sigmoid()
    expected = (gate * adapter.layers[first].shift).flatten(-2)
    error = (moved.hidden - unmoved.hidden - expected).abs()
    # Roundings of a gate, a sum and a product, on both sides.
    assert (error <= 8 * EPS * (moved.hidden.abs() + unmoved.hidden.abs() + expected.abs())).all()
    ungated = adapter.layers[first].shift.flatten().expand_as(expected)
    assert relative_error(ungated, expected) > 0.1


# --- what is not the text decoder's


def adapters_of_all(model, name):
    methods = [x for x in ("mimic", "m2iv", "live", "aim") if (name, x) not in REFUSED]
    return {method: adapter_of(model, method) for method in methods}


@families()
@torch.no_grad()
def test_nothing_outside_of_the_text_decoder_changes(name):
    """An implementation set by its name reaches the vision tower too, and Idefics v1's by a copied config."""
    model = frozen(name, base_of(name))
    inputs, layers = tiny_inputs(model), decoder_layers(model)
    ours = {id(module) for layer in layers.values() for module in layer.modules()}
    ours.add(id(model.get_input_embeddings()))
    outside = {path: module for path, module in model.named_modules() if id(module) not in ours}
    configs = {path: getattr(module, "config", None) for path, module in outside.items()}
    configs = {path: x for path, x in configs.items() if isinstance(x, PreTrainedConfig)}
    implementations = {path: config._attn_implementation for path, config in configs.items()}
    first = next(iter(layers.values()))
    with recorded(*outside.values(), first) as calls:
        logits(model, inputs)
        plain, before = up_to(calls, first), snapshot(model)
        calls.clear()
        with mk.attach(model, adapters_of_all(model, name)) as handle:
            after = snapshot(model)
            changed = {key[0] for key in before.keys() ^ after.keys()}
            changed |= {key[0] for key in before.keys() & after.keys() if before[key] is not after[key]}
            assert changed and not {path.removesuffix(".config") for path in changed} & outside.keys()
            assert all(outside[path].config is config for path, config in configs.items())
            assert {path: config._attn_implementation for path, config in configs.items()} == implementations
            with handle.rows(("mimic", "m2iv", "live")):
                logits(model, inputs)
    shifted = up_to(calls, first)
    assert [x.module for x in shifted] == [x.module for x in plain]
    # What images become is among it, and so is what the first layer is given.
    names = {id(module): path for path, module in outside.items()}
    assert "pixel_values" not in inputs or any("vis" in names.get(id(x.module), "") for x in plain)
    for x, y in zip(plain, shifted, strict=True):
        for a, b in zip(leaves(x), leaves(y), strict=True):
            assert torch.equal(a, b), names.get(id(x.module))


def up_to(calls, first):
    """The calls before that of ``first``, and it; the calls in it are not recorded."""
    return calls[: [call.module for call in calls].index(first) + 1]


def leaves(call):
    of_layer = call.module.__class__.__name__.endswith("DecoderLayer")
    return [x for x in tree_leaves(call.hidden if of_layer else call.output) if isinstance(x, torch.Tensor)]


def cross_attentions(model, name):
    """The layers of cross-attention and their attentions."""
    if name == "idefics":
        return [(layer, layer.cross_attn) for layer in model.model.gated_cross_attn_layers]
    layers = model.model.language_model.layers
    return [(layer, layer.cross_attn) for layer in layers if hasattr(layer, "cross_attn")]


@families("idefics", "mllama", quick=("idefics", "mllama"))
@torch.no_grad()
def test_cross_attention_is_untouched(name):
    """It calls the attention of its config, which it shares with self-attention: a shift meant for text."""
    model = frozen(name)
    inputs, found = tiny_inputs(model), cross_attentions(model, name)
    assert len(found) == 2
    configs = [attention.config for _, attention in found]
    adapters = {method: adapter_of(model, method) for method in ("mimic", "m2iv", "live")}
    with recorded(*(module for pair in found for module in pair)) as calls:
        with mk.attach(model, adapters) as handle, handle.rows(("mimic", "m2iv", "live")):
            logits(model, inputs, use_cache=False)
            for (_, attention), config in zip(found, configs, strict=True):
                assert attention.config is config and not hasattr(config, "mmicl_layer")
                assert config._attn_implementation == "sdpa"
        patched = list(calls)
        assert len(patched) == 4
        for call in patched:
            again = call.module(*call.args, **call.kwargs)
            for a, b in zip(tree_leaves(again), tree_leaves(call.output), strict=True):
                assert a is b is None or torch.equal(a, b)


@torch.no_grad()
def test_idefics_numbers_its_cross_attention_anew(monkeypatch):
    """By layer_idx the cross-attention of a number would get the shift of the self-attention of that number."""
    model, calls = frozen("idefics"), recorded_attention(monkeypatch)
    layers = decoder_layers(model)
    numbers = [attention.layer_idx for _, attention in cross_attentions(model, "idefics")]
    assert numbers == [0, 1] and [x.self_attn.layer_idx for x in layers.values()] == [0, 1, 2, 3]
    adapter = adapter_of(model, "mimic")
    with mk.attach(model, adapter):
        logits(model, tiny_inputs(model))
    assert [call.module for call in calls] == [layer.self_attn for layer in layers.values()]
    for index, call in zip(layers, calls, strict=True):
        further = assert_by_hand(call, adapter.layers[index], windows(12), scaling=8**-0.5)
        other = adapter.layers[str((int(index) + 1) % 4)]
        with pytest.raises(AssertionError):
            assert_by_hand(call, other, windows(12), scaling=8**-0.5)
        assert further() <= 1


# --- fused tokens


def ids_within(config):
    """Every id under a name that says so, in a config as a dict and the dicts in it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ids_within(value)
        elif isinstance(key, str) and re.search(r"(token|patch)_(id|ids|index)$", key) and value is not None:
            yield from value if isinstance(value, list) else [value]


@families(quick=ALL_MODELS)
def test_placeholders_have_no_other_meaning(name):
    """Fused tokens in the places of an image's, or of what frames it, would make an image of them."""
    model = frozen(name, base_of(name))
    for _ in range(4):
        handle = mk.attach(model, zero_shift(model))
        chosen = handle._splicer.hook.placeholder_ids
        handle.detach()
        named = {*ids_within(model.config.to_dict()), *ids_within(model.generation_config.to_dict())}
        assert len(set(chosen)) == 2 and not named & set(chosen)
        model.generation_config.decoder_start_token_id = chosen[0]
        model.config.get_text_config().sep_token_id = chosen[1]


class Says(LogitsProcessor):
    """The second token that is generated is ``token``."""

    def __init__(self, token, length):
        self.token, self.length = token, length + 1

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != self.length:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def generated(model, inputs, said, use_cache):
    """The new tokens, of which the second is ``said``, and the logits of every step."""
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        logits_processor=[Says(said, inputs["input_ids"].shape[1])],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -4:], torch.stack(output.logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llava-llama", "qwen2_5_vl"])
def test_a_model_may_say_a_placeholder(name, use_cache):
    """It is then a token like any other: a hook that looks for the id alone would overwrite it."""
    model = frozen(name)
    inputs, adapter = tiny_inputs(model, padding="left"), adapter_of(model, "aim")
    for said in PLACEHOLDERS:
        tokens, expected = generated(model, longer(inputs, CHOSEN), said, use_cache)
        with attached(model, "aim", adapter) as prompts:
            actual_tokens, actual = generated(model, prompts(inputs), said, use_cache)
        assert (tokens[:, 1] == said).all()
        assert torch.equal(actual_tokens, tokens) and torch.equal(actual, expected)


def test_a_prompt_with_a_placeholder_is_refused():
    """Its tokens would be taken for fused ones, or these for its tokens."""
    model = frozen("llava-llama")
    inputs, adapter = tiny_inputs(model), adapter_of(model, "aim")
    for said in PLACEHOLDERS:
        strange = {**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([8]), said)}
        with attached(model, "aim", adapter) as prompts:
            spliced = prompts(inputs)
            with pytest.raises(RuntimeError, match="input_ids have a placeholder"):
                logits(model, strange)
            with pytest.raises(RuntimeError, match="input_ids have a placeholder"):
                model.generate(**strange, max_new_tokens=1)
            expected = longer(inputs, CHOSEN)
            shown = expected["attention_mask"].bool()
            actual = logits(model, spliced)[shown]
        assert torch.equal(actual, logits(model, expected)[shown])
        # Spliced itself it is known where its own token stands.
        expected = longer(strange, CHOSEN)
        with attached(model, "aim", adapter) as prompts:
            actual = logits(model, prompts(strange))[shown]
        assert torch.equal(actual, logits(model, expected)[shown])


@families(*M_ROPE, "minicpmv4_6", "gemma3", quick=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"))
def test_positions_of_spliced_prompts(name):
    """M-RoPE numbers images in three dimensions from the ids: embeddings by themselves would lose them."""
    model = frozen(name)
    inputs, decoder = tiny_inputs(model, padding="left"), model.model.language_model
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with recorded(decoder) as calls:
        logits(model, longer(inputs, CHOSEN))
        model.generate(**longer(inputs, CHOSEN), **options)
        expected = [call.kwargs["position_ids"] for call in calls]
        calls.clear()
        with attached(model, "aim", adapter_of(model, "aim")) as prompts:
            logits(model, prompts(inputs))
            model.generate(**prompts(inputs), **options)
        actual = [call.kwargs["position_ids"] for call in calls]
    assert len(actual) == len(expected) == 5
    for x, y in zip(actual, expected, strict=True):
        assert x is y is None or torch.equal(x, y)
    if name in M_ROPE:
        *_, height, width = expected[0]
        assert not torch.equal(height, width), "the image has no two dimensions, so the test shows nothing"


@families("gemma3", "paligemma", "gemma4-moe", "molmo2", quick=("gemma3", "paligemma", "gemma4-moe", "molmo2"))
def test_token_types_grow_with_the_prefix(name):
    """Of another length or with another type the prefix would be masked as an image or a target is."""
    model = frozen(name)
    inputs, adapter = tiny_inputs(model), adapter_of(model, "aim")
    (key,) = [x for x in inputs if x.endswith("token_type_ids")]
    inputs[key][:, 8:11] = 1  # Gemma3's image has a single token, PaliGemma's prompt no target
    given = longer(inputs, CHOSEN)
    expected = logits(model, given)
    with attached(model, "aim", adapter) as prompts:
        spliced = prompts(inputs)
        assert torch.equal(spliced[key], given[key]) and spliced[key].dtype == inputs[key].dtype
        shown = spliced["attention_mask"].bool()
        assert torch.equal(logits(model, spliced)[shown], expected[shown])
        fused = torch.isin(spliced["input_ids"], torch.tensor(PLACEHOLDERS))
        for types in (spliced[key].masked_fill(fused, 1), inputs[key]):
            wrong = logits(model, {**spliced, key: types})
            assert relative_error(wrong[shown], expected[shown]) > 1000 * EPS


# --- layers without softmax


REPORTS = {
    "llava-llama": "layers 0-2  LlamaAttention: attention of default",
    "mllama": (
        "layer 0  MllamaTextSelfAttention: attention of default\n"
        "layer 1  MllamaTextCrossAttention: skipped: it attends to images\n"
        "layer 2  MllamaTextSelfAttention: attention of default\n"
        "layer 3  MllamaTextCrossAttention: skipped: it attends to images"
    ),
    "qwen3_5": (
        "layer 0  Qwen3_5GatedDeltaNet: no softmax for default to shift\n"
        "layer 1  Qwen3_5Attention: attention of default\n"
        "layer 2  Qwen3_5GatedDeltaNet: no softmax for default to shift\n"
        "layer 3  Qwen3_5Attention: attention of default"
    ),
    "lfm2_vl": (
        "layer 0  Lfm2ShortConv: no softmax for default to shift\n"
        "layers 1-2  Lfm2Attention: attention of default\n"
        "layer 3  Lfm2ShortConv: no softmax for default to shift"
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_layers_without_softmax_have_no_gate(name):
    """Parameters that nothing reads would be saved, trained for nothing, and look like a patch."""
    model = frozen(name)
    adapter = adapter_of(model, "mimic")
    softmax = [i for i, x in decoder_layers(model).items() if hasattr(x, "self_attn")]
    assert list(adapter.layers) == softmax
    with mk.attach(model, adapter) as handle:
        assert str(handle.report()) == REPORTS[name]
    sites = "after_attention of default; layer of default"
    kept = re.sub(r"attention of default|no softmax for default to shift", sites, REPORTS[name])
    with mk.attach(model, adapter_of(model, "m2iv")) as handle:
        lines = {line.split("  ", 1)[1] for line in str(handle.report()).splitlines()}
    assert lines == {line.split("  ", 1)[1] for line in kept.splitlines()}


def test_the_report_names_every_method():
    model = frozen("qwen3_5")
    adapters = {method: adapter_of(model, method) for method in ("mimic", "m2iv", "live", "aim")}
    with mk.attach(model, adapters) as handle:
        report = str(handle.report()).splitlines()
    sites = "after_attention of m2iv; layer of m2iv; mlp of live"
    assert report == [
        "embedding  fused tokens of aim",
        f"layer 0  Qwen3_5GatedDeltaNet: {sites}; no softmax for mimic to shift",
        f"layer 1  Qwen3_5Attention: attention of mimic; {sites}",
        f"layer 2  Qwen3_5GatedDeltaNet: {sites}; no softmax for mimic to shift",
        f"layer 3  Qwen3_5Attention: attention of mimic; {sites}",
    ]
