"""Where the vectors go: the residual stream of every family moves by exactly what was added."""

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import PRE_NORM_MODELS, TEXT, TINY_MODELS, tiny_inputs, tiny_model
from tests.support.published import doubled, in_double, random_adapter, relative_error
from tests.support.residuals import biased, decoder_layers, random_shift, renormed

# Two ways to the same sums, a few roundings per layer apart, three or four layers deep.
ROUNDINGS = 64
CONFIGS = [mk.M2IVConfig(), mk.LIVEConfig(), mk.LIVEConfig(site="layer")]


class Recorder:
    """What modules got and returned, seen from inside: hooks come after, so they do not show here."""

    def __init__(self, *modules):
        self.inputs, self.outputs, self._modules = {}, {}, modules

    def __enter__(self):
        for module in self._modules:
            assert "forward" not in vars(module)
            module.forward = self._wrapped(module)
        return self

    def __exit__(self, *exception):
        for module in self._modules:
            del module.forward

    def _wrapped(self, module):
        forward = module.forward

        def call(*args, **kwargs):
            self.inputs[module] = args[0] if args else kwargs["hidden_states"]
            output = forward(*args, **kwargs)
            self.outputs[module] = output[0] if isinstance(output, tuple) else output
            return output

        return call


def keep_first(into):
    """A hook before a module that appends its first argument."""
    return lambda module, args: into.append(args[0])


def setup(family, dtype):
    model = tiny_model(family)
    adapter = random_shift(model)
    inputs = tiny_inputs(model, padding="left")
    if dtype == torch.float64:
        model, adapter, inputs = in_double(model), adapter.double(), doubled(inputs)
    return model, adapter, inputs


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", PRE_NORM_MODELS)
def test_m2iv_moves_the_stream_by_exactly_its_vectors(family, dtype):
    model, adapter, inputs = setup(family, dtype)
    layers = decoder_layers(model)
    for index, layer in layers.items():
        middle, after = [], []
        hooks = [layer.post_attention_layernorm.register_forward_pre_hook(keep_first(middle))]
        following = layers.get(str(int(index) + 1))
        if following is not None and family != "idefics":  # whose cross-attention layers stand between
            hooks.append(following.register_forward_pre_hook(keep_first(after)))
        with Recorder(layer, layer.self_attn, layer.mlp) as seen, mk.attach(model, adapter):
            logits(model, inputs)
        for hook in hooks:
            hook.remove()
        of = adapter.layers[index]
        attention = seen.outputs[layer.self_attn] + of.attn.scale * of.attn.vector
        assert torch.equal(middle[0], seen.inputs[layer] + attention)
        assert torch.equal(seen.outputs[layer], middle[0] + seen.outputs[layer.mlp])
        for stream in after:
            assert torch.equal(stream, seen.outputs[layer] + of.mlp.scale * of.mlp.vector)


@pytest.mark.parametrize("family", PRE_NORM_MODELS)
def test_m2iv_is_a_bias_of_both_branches(family):
    """Its logits are those of the model whose branches end in linear layers with these biases."""
    model, adapter, inputs = setup(family, torch.float64)
    plain = logits(model, inputs)
    with biased(model, adapter):
        expected = logits(model, inputs)
    with mk.attach(model, adapter):
        actual = logits(model, inputs)
    assert relative_error(expected, plain) > 0.1
    assert relative_error(actual, expected) <= ROUNDINGS * torch.finfo(torch.float64).eps
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("site", ["mlp", "layer"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_live_keeps_the_norm_at_its_site(family, site):
    model, _, inputs = setup(family, torch.float64)
    adapter = random_shift(model, mk.LIVEConfig(site=site)).double()
    plain = logits(model, inputs)
    vectors = {index: of.scale * of.vector for index, of in adapter.layers.items()}
    with renormed(model, vectors, site):
        expected = logits(model, inputs)
    with mk.attach(model, adapter):
        actual = logits(model, inputs)
    assert relative_error(expected, plain) > 0.05
    assert relative_error(actual, expected) <= ROUNDINGS * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("family", TINY_MODELS)
def test_mimics_ffn_shift_is_a_shift_of_the_mlp_that_keeps_its_norm(family):
    """With gates closed to exactly 0, nothing else of the adapter acts."""
    model, _, inputs = setup(family, torch.float64)
    adapter = random_adapter(model, ffn_shift=True).double()
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.weight.zero_()
            layer.bias.fill_(-1e4)
    plain = logits(model, inputs)
    with renormed(model, dict(zip(adapter.layers, adapter.ffn_shift, strict=True)), "mlp"):
        expected = logits(model, inputs)
    with mk.attach(model, adapter) as handle:
        actual = logits(model, inputs)
        assert relative_error(actual, expected) <= ROUNDINGS * torch.finfo(torch.float64).eps
        handle.add("without", random_adapter(model, seed=1).double())
        with handle.rows("default"):
            stacked = logits(model, inputs)
        assert relative_error(stacked, expected) <= ROUNDINGS * torch.finfo(torch.float64).eps
    assert relative_error(expected, plain) > 0.05


@pytest.mark.parametrize("names", [("m2iv", "live"), ("live", "m2iv")])
def test_where_two_methods_meet_the_norm_is_kept_first(names):
    """Whichever was attached first: LIVE's option is the layer's output, and so is M2IV's second site."""
    model, m2iv, inputs = setup("llava-llama", torch.float64)
    adapters = {"m2iv": m2iv, "live": random_shift(model, mk.LIVEConfig(site="layer"), seed=1).double()}
    layers, after = decoder_layers(model), []
    hook = layers["1"].register_forward_pre_hook(keep_first(after))
    with Recorder(layers["0"]) as seen, mk.attach(model, {names[0]: adapters[names[0]]}) as handle:
        handle.add(names[1], adapters[names[1]])
        with handle.rows([names]):
            logits(model, inputs)
    hook.remove()
    x, live, of = seen.outputs[layers["0"]], adapters["live"].layers["0"], m2iv.layers["0"].mlp
    y = x + live.scale * live.vector
    expected = y * (torch.linalg.norm(x, dim=-1) / torch.linalg.norm(y, dim=-1))[..., None]
    expected = expected + of.scale * of.vector
    assert relative_error(after[0], expected) <= ROUNDINGS * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("family", PRE_NORM_MODELS)
def test_hidden_states_are_those_of_the_shifted_stream(family):
    """HuggingFace records them with hooks of its own, which must come after ours."""
    model = tiny_model(family)
    inputs, adapter = tiny_inputs(model), random_shift(model)

    @torch.no_grad()
    def hidden_states():
        return model(**inputs, output_hidden_states=True).hidden_states

    before = hidden_states()
    with mk.attach(model, adapter):
        actual = hidden_states()
    with biased(model, adapter):
        expected = hidden_states()
    assert len(actual) == len(expected) >= len(adapter.layers)
    for x, y, plain in list(zip(actual, expected, before, strict=True))[1:]:
        assert relative_error(x, y) <= ROUNDINGS * torch.finfo(torch.float32).eps
        assert relative_error(x, plain) > 0.1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_branch_with_dropout_is_refused(config):
    """Idefics v1 drops out what a branch returned, and a vector added there would be dropped with it."""
    model = tiny_model("idefics")
    inputs = tiny_inputs(model)
    for layer in decoder_layers(model).values():
        layer.dropout = 0.25
    with mk.attach(model, random_shift(model, config)):
        model(**inputs)
        model.train()
        if config == mk.LIVEConfig(site="layer"):
            model(**inputs)
        else:
            with pytest.raises(ValueError, match=r"dropout is 0\.25, expected 0"):
                model(**inputs)


@torch.no_grad()
def test_branches_end_in_their_norm_where_there_is_one():
    model = tiny_model("gemma3")
    vector = torch.randn(TEXT["hidden_size"])
    for anchor in find_anchors(model):
        layer, site, end = anchor.layer, anchor.after_attention, anchor.after_mlp
        assert site is layer.post_attention_layernorm and end is layer.post_feedforward_layernorm
        middle = []
        with Recorder(layer, site, end) as seen:
            hooks = [
                site.register_forward_hook(lambda module, args, output: output + vector),
                layer.pre_feedforward_layernorm.register_forward_pre_hook(keep_first(middle)),
            ]
            logits(model, tiny_inputs(model))
        for hook in hooks:
            hook.remove()
        assert torch.equal(middle[0], seen.inputs[layer] + (seen.outputs[site] + vector))
        assert torch.equal(seen.outputs[layer], middle[0] + seen.outputs[end])


@pytest.mark.parametrize("family", PRE_NORM_MODELS)
def test_after_attention_is_the_attention_elsewhere(family):
    for anchor in find_anchors(tiny_model(family)):
        assert anchor.after_attention is anchor.self_attn
        assert anchor.after_mlp is anchor.mlp
        assert isinstance(anchor.layer.post_attention_layernorm, nn.Module)
