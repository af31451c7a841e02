"""Where the vectors go: the residual stream of every family moves by exactly what was added."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import PRE_NORM_MODELS, TINY_MODELS, tiny_inputs, tiny_model
from tests.patch.trap_tools import recorded
from tests.support.published import doubled, fix_gates, in_double, logits, random_adapter, relative_error
from tests.support.residuals import biased, decoder_layers, random_shift, renormed

# Two ways to the same sums, a few roundings per layer apart, three or four layers deep.
ROUNDINGS = 64
CONFIGS = [mk.M2IVConfig(), mk.LIVEConfig(), mk.LIVEConfig(site="layer")]


def setup(family):
    """In fp64."""
    model = tiny_model(family)
    return in_double(model), random_shift(model).double(), doubled(tiny_inputs(model, padding="left"))


@pytest.mark.parametrize("family", PRE_NORM_MODELS)
def test_m2iv_is_a_bias_of_both_branches(family):
    """Its logits are those of the model whose branches end in linear layers with these biases."""
    model, adapter, inputs = setup(family)
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
    model, _, inputs = setup(family)
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
    model, _, inputs = setup(family)
    adapter = random_adapter(model, ffn_shift=True).double()
    fix_gates(adapter, -1e4)
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
    model, m2iv, inputs = setup("llava-llama")
    adapters = {"m2iv": m2iv, "live": random_shift(model, mk.LIVEConfig(site="layer"), seed=1).double()}
    live, of = adapters["live"].layers["0"], m2iv.layers["0"].mlp
    with torch.no_grad():
        m2iv.layers["0"].attn.vector.zero_()  # nothing moves the stream before the layer's end
    first = decoder_layers(model)["0"]
    with recorded(first) as calls, mk.attach(model, {names[0]: adapters[names[0]]}) as handle:
        handle.add(names[1], adapters[names[1]])
        with handle.disabled():
            logits(model, inputs)
        with handle.rows([names]):
            logits(model, inputs)
    x, actual = (call.result for call in calls)
    y = x + live.scale * live.vector
    expected = y * (torch.linalg.norm(x, dim=-1) / torch.linalg.norm(y, dim=-1))[..., None]
    expected = expected + of.scale * of.vector
    assert relative_error(actual, expected) <= ROUNDINGS * torch.finfo(torch.float64).eps


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
