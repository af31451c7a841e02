"""Compiled static-cache generation: one graph, no breaks, no recompilation when adapters change."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.compiled_generation import assert_graphs, fresh_dynamo, generate  # noqa: F401
from tests.support.published import multiply, published, random_adapter

NAMES = ["llava-llama", "qwen2_5_vl"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("name, normalizer", [("llava-llama", "all_keys"), ("qwen2_5_vl", "visible")])
def test_single_adapter(name, normalizer):
    model = tiny_model(name)
    adapter = random_adapter(model, normalizer=normalizer)
    inputs = tiny_inputs(model, padding="left")
    plain = generate(model, inputs, compiled=False)
    with published(model, adapter):
        expected = generate(model, inputs, compiled=False)
    assert not torch.equal(expected, plain)
    with mk.attach(model, adapter):
        assert torch.equal(generate(model, inputs), expected)
        assert_graphs(1)
        multiply(adapter, -1.0)
        changed = generate(model, inputs)
        assert_graphs(1)
        assert not torch.equal(changed, expected)
    with published(model, adapter):
        assert torch.equal(generate(model, inputs, compiled=False), changed)
    assert torch.equal(generate(model, inputs, compiled=False), plain)


@pytest.mark.parametrize("name", NAMES)
def test_switching_adding_and_removing_do_not_recompile(name):
    model = tiny_model(name)
    inputs = tiny_inputs(model)
    adapters = {key: random_adapter(model, seed=seed) for seed, key in enumerate("abc")}
    expected = {None: generate(model, inputs, compiled=False)}
    for key, adapter in adapters.items():
        with published(model, adapter):
            expected[key] = generate(model, inputs, compiled=False)
    assert not torch.equal(expected["a"], expected["b"])

    def check(handle, rows):
        with handle.rows(rows):
            tokens = generate(model, inputs)
        for row, key in enumerate(rows):
            assert torch.equal(tokens[row], expected[key][row]), (rows, row)
        assert_graphs(1)

    with mk.attach(model, {"a": adapters["a"], "b": adapters["b"]}) as handle:
        check(handle, ["a", "b"])
        check(handle, ["b", None])
        handle.add("c", adapters["c"])
        check(handle, ["c", "a"])
        handle.remove("a")
        check(handle, ["b", "c"])
        adapters["b"].requires_grad_(False)
        check(handle, ["b", "b"])
