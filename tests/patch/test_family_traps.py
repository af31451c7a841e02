"""Ways in which a family could be patched wrong and nobody would see: the stream, and what is not ours."""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

import mmicl_kernels as mk
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import (
    ALL_MODELS,
    PRE_NORM_MODELS,
    TINY_MODELS,
    is_available,
    tiny_inputs,
    tiny_model,
)
from tests.patch.empty_cells import REFUSED
from tests.patch.family_oracles import MLPS, MovedWithNorm, adapter_of, decoder_layers, independent, submodule
from tests.patch.snapshots import snapshot
from tests.patch.test_support_matrix import base_of, logit_budget
from tests.patch.trap_tools import (
    EPS,
    QUICK,
    cross_attentions,
    families,
    frozen,
    recorded,
    relative_error,
    restored,
    zero_shift,
)
from tests.support.published import fix_gates, random_adapter, whole_logits
from tests.support.residuals import random_shift

ATTENTION = re.compile(r"norm|^(self_attn|linear_attn|conv)$")


def zero_all_but_attention(layer):
    """So that a layer returns its input and what its attention brings, whatever the MLP is called."""
    for name, child in layer.named_children():
        if not ATTENTION.search(name):
            for x in child.parameters():
                x.zero_()
    if hasattr(layer, "layer_scalar"):  # Gemma4 scales the whole stream at the end
        layer.layer_scalar.fill_(1.0)


@families(quick=(*QUICK, *TINY_MODELS))
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


@families(quick=(*QUICK, *TINY_MODELS))
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


@families(
    "gemma4", "glm4v", "mllama", "phi4_multimodal", "qwen3_5", *PRE_NORM_MODELS,
    quick=("glm4v", "mllama", *PRE_NORM_MODELS),
)  # fmt: skip
@torch.no_grad()
def test_recorded_hidden_states_see_the_shift(name):
    """HuggingFace records them with hooks: without prepend=True ours would come too late for them."""
    model = frozen(name)
    inputs, adapter = tiny_inputs(model), random_shift(model)
    # First, so that HuggingFace's hooks are there before ours. (Phi4 of 5.23 fails if it first runs without.)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    with mk.attach(model, adapter):
        actual = model(**inputs, output_hidden_states=True).hidden_states
    with independent(model, "m2iv", adapter):
        expected = model(**inputs, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) > len(adapter.layers)
    moved = 0
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
        whole_logits(model, tiny_inputs(model))
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
        whole_logits(model, tiny_inputs(model))
    attention, whole = calls
    middle = whole.hidden + (layer.input_layernorm(attention.result) + vector)
    expected = middle + layer.post_attention_layernorm(layer.mlp(middle))
    assert torch.equal(whole.result, expected)
    wrong = whole.hidden + layer.input_layernorm(attention.result + vector)
    assert relative_error(wrong, middle) > 0.1


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
    ours.add(id(model.base_model))  # AIM looks at how long the cache is that it is called with
    outside = {path: module for path, module in model.named_modules() if id(module) not in ours}
    configs = {path: getattr(module, "config", None) for path, module in outside.items()}
    configs = {path: x for path, x in configs.items() if isinstance(x, PreTrainedConfig)}
    implementations = {path: config._attn_implementation for path, config in configs.items()}
    first = next(iter(layers.values()))
    with recorded(*outside.values(), first) as calls:
        whole_logits(model, inputs)
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
                whole_logits(model, inputs)
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
            whole_logits(model, inputs, use_cache=False)
            for (_, attention), config in zip(found, configs, strict=True):
                assert attention.config is config and not hasattr(attention, "mmicl_layer")
                assert config._attn_implementation == "sdpa"
        patched = list(calls)
        assert len(patched) == 4
        for call in patched:
            again = call.module(*call.args, **call.kwargs)
            for a, b in zip(tree_leaves(again), tree_leaves(call.output), strict=True):
                assert a is b is None or torch.equal(a, b)


REPORTS = {
    "llava-llama": "layers 0-2  LlamaAttention: attention of default",
    "mllama": (
        "layer 0  MllamaTextSelfAttention: attention of default\n"
        "layer 1  MllamaTextCrossAttention: left alone by every method\n"
        "layer 2  MllamaTextSelfAttention: attention of default\n"
        "layer 3  MllamaTextCrossAttention: left alone by every method"
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
        "embedding  tokens of aim",
        f"layer 0  Qwen3_5GatedDeltaNet: {sites}; no softmax for mimic to shift",
        f"layer 1  Qwen3_5Attention: attention of mimic; {sites}",
        f"layer 2  Qwen3_5GatedDeltaNet: {sites}; no softmax for mimic to shift",
        f"layer 3  Qwen3_5Attention: attention of mimic; {sites}",
    ]


ENDS_OF_MLPS = {
    "gemma3": "post_feedforward_layernorm",
    "gemma4": "post_feedforward_layernorm",
    "gemma4-moe": "post_feedforward_layernorm",
    "glm4v": "post_mlp_layernorm",
    "molmo2-norm_after": "post_attention_layernorm",
    "paligemma2": "post_feedforward_layernorm",
}


@pytest.mark.parametrize("name", filter(is_available, ALL_MODELS))
def test_mlps_end_where_their_branch_joins_the_stream(name):
    """M2IV's synergy compares what both branches add; before a norm they are several times as large."""
    for anchor in find_anchors(tiny_model(name)):
        end = ENDS_OF_MLPS.get(name)
        assert anchor.after_mlp is (getattr(anchor.layer, end) if end else anchor.mlp)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_the_official_shift_of_mlps_where_some_layers_have_no_gate(name):
    """Its rows are all layers', those without softmax included."""
    model = tiny_model(name)
    inputs = tiny_inputs(model)
    adapter = random_adapter(model, ffn_shift=True)
    fix_gates(adapter, -1e4)  # nothing else of the adapter acts
    shifts = dict(zip(map(str, adapter.backbone.layers), adapter.ffn_shift, strict=True))
    mlps = {index: submodule(layer, MLPS) for index, layer in decoder_layers(model).items()}
    for index, mlp in mlps.items():
        mlp.forward = MovedWithNorm(mlp.forward, shifts[index])
    expected = whole_logits(model, inputs)
    for mlp in mlps.values():
        del mlp.forward
    with mk.attach(model, adapter):
        actual = whole_logits(model, inputs)
    assert relative_error(expected, whole_logits(model, inputs)) > 1000 * logit_budget(name, "live")
    assert relative_error(actual, expected) <= logit_budget(name, "live")
