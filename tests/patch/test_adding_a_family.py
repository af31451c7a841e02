"""The tables, and the page that says how to extend them."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.models import families
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available, tiny_inputs, tiny_model
from tests.support.published import logits
from tests.support.residuals import random_shift

# Two ways to the same sums, a few roundings per layer apart, four layers deep.
ROUNDINGS = 64
README = Path(families.__file__).with_name("README.md")


@pytest.fixture
def extended():
    """The tables with what the README's example adds."""
    before = dict(families.FAMILIES), dict(families.DECODERS)
    exec(re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1], {})
    yield
    for table, entries in zip((families.FAMILIES, families.DECODERS), before, strict=True):
        table.clear()
        table.update(entries)


def my_vlm():
    """A LLaVA of another name, whose second layer has a mixer without softmax and whose last is skipped."""
    model = tiny_model("llava-llama")
    model.config.model_type, model.config.text_config.model_type = "my_vlm", "my_text"
    first, second, third = model.model.language_model.layers
    for layer in (first, second, third):
        layer.ffn = nn.Sequential(layer.mlp)
    second.mamba = nn.Sequential(second.self_attn)
    third.cross_attn = nn.Sequential(third.self_attn)
    return model


def test_the_readmes_example(extended):
    model = my_vlm()
    first, second = find_anchors(model)
    layers = model.model.language_model.layers
    assert (first.index, first.num_heads) == (0, 4)
    assert first.mixer is layers[0].self_attn and first.mlp is layers[0].ffn
    assert (second.index, second.mixer, second.num_heads) == (1, layers[1].mamba, 0)
    adapter = mk.create(model, mk.MimICConfig())
    assert list(adapter.layers) == ["0"]
    adapters = {"gate": adapter, "vector": mk.create(model, mk.M2IVConfig())}
    with mk.attach(model, adapters) as handle:
        assert str(handle.report()).splitlines() == [
            "layer 0  LlamaAttention: attention of gate; after_attention of vector; layer of vector",
            "layer 1  Sequential: after_attention of vector; layer of vector; no softmax for gate to shift",
            "layer 2  Sequential: left alone by every method",
        ]


def test_without_the_example_it_is_refused():
    with pytest.raises(mk.UnsupportedModelError, match="'my_vlm'") as error:
        find_anchors(my_vlm())
    assert "model.language_model.layers of 3 LlamaDecoderLayer (self_attn: LlamaAttention" in str(error.value)
    assert "ffn: Sequential" in str(error.value)


@pytest.mark.parametrize("table", ["FAMILIES", "DECODERS"])
def test_no_entry_of_the_tables_is_unproven(table):
    """Every family and every decoder is in a tiny model."""
    if len(list(filter(is_available, ALL_MODELS))) < len(ALL_MODELS):
        pytest.skip(f"transformers {transformers.__version__} lacks some of the tiny models")
    configs = [tiny_model(name).config for name in ALL_MODELS]
    proven = {config.model_type for config in configs}
    if table == "DECODERS":
        texts = [config.get_text_config() for config in configs]
        proven = {x.model_type + ":norm_after" * bool(getattr(x, "norm_after", False)) for x in texts}
    assert set(getattr(families, table)) == proven


def test_mixtures_of_experts_return_tokens_in_one_row():
    """LIVE's site in Llama4 and OPT is two-dimensional; rows of a batch still have adapters of their own."""
    for name in ("llama4", "blip2"):
        model = tiny_model(name)
        inputs = tiny_inputs(model)
        adapters = {x: random_shift(model, mk.LIVEConfig(), seed=i) for i, x in enumerate("ab")}
        expected = []
        for adapter in adapters.values():
            with mk.attach(model, adapter):
                expected.append(model(**inputs).logits)
        with mk.attach(model, adapters) as handle, handle.rows(["a", "b"]):
            actual = logits(model, inputs)
        rows = [expected[0][0], expected[1][1]]
        for row, x in zip(rows, actual.unflatten(0, (2, -1)), strict=True):
            assert (x - row).norm() <= ROUNDINGS * torch.finfo(x.dtype).eps * row.norm()
