"""Compiled static-cache generation after fused tokens: one graph, whichever demonstrations there are."""

import pytest
import torch

from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.compiled_generation import assert_graphs, fresh_dynamo, generate  # noqa: F401
from tests.patch.test_splice import attached, longer, ordinary_tokens
from tests.support.published import logits

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("idefics2", "qwen2_5_vl")]


@pytest.mark.parametrize("name", ["llava-llama", *SLOW])
def test_generation(name):
    model = tiny_model(name)
    inputs = tiny_inputs(model, padding="left")
    expected = {}
    for chosen in ((3, 3, 3), (2,) * 21):
        prompts = longer(inputs, [list(chosen), [4, 0]])
        expected[chosen] = generate(model, prompts, compiled=False)[:, prompts["input_ids"].shape[1] :]
    assert not torch.equal(*expected.values())
    with attached(model) as handle:
        for chosen in expected:
            spliced = handle.splice(inputs, [list(chosen), [4, 0]], tokens=ordinary_tokens(model))
            generated = generate(model, spliced)[:, spliced["input_ids"].shape[1] :]
            assert torch.equal(generated, expected[chosen])
            assert_graphs(1)


@pytest.mark.slow
def test_whole_forward():
    """The prompt's own pass too, for other demonstrations of as many tokens, without another graph."""
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model, padding="left")
    choices = ([[0, 3], [4, 0]], [[3, 0], [0, 4]])
    expected = [logits(model, longer(inputs, chosen)) for chosen in choices]
    with attached(model) as handle:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for chosen, plain in zip(choices, expected, strict=True):
            spliced = handle.splice(inputs, chosen, tokens=ordinary_tokens(model))
            with torch.no_grad():
                found = compiled(**spliced).logits[spliced["attention_mask"].bool()]
            torch.testing.assert_close(found, plain)
            assert_graphs(1)
