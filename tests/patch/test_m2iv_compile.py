"""Compiled static-cache generation with vectors in the residual stream: no breaks, no second compilation."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.compiled_generation import assert_graphs, assert_no_breaks, fresh_dynamo, generate  # noqa: F401
from tests.support.published import published, random_adapter
from tests.support.residuals import biased, random_shift

NAMES = ["llava-llama", "idefics2", "qwen2_5_vl"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def negate(adapter):
    """Turn what the adapter adds around."""
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("vector"):
                parameter.neg_()


def expectations(model, inputs, m2iv):
    """Tokens of the plain model and of each M2IV adapter by name, eagerly and without our code."""
    expected = {None: generate(model, inputs, compiled=False)}
    for name, adapter in m2iv.items():
        with biased(model, adapter):
            expected[name] = generate(model, inputs, compiled=False)
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_single_adapter(name):
    model = tiny_model(name)
    inputs, adapter = tiny_inputs(model, padding="left"), random_shift(model)
    expected = expectations(model, inputs, {"a": adapter})
    with mk.attach(model, adapter) as handle:
        assert torch.equal(generate(model, inputs), expected["a"])
        assert_graphs(1)
        negate(adapter)
        turned = generate(model, inputs)
        assert not torch.equal(turned, expected["a"])
        with handle.strength(-1.0):
            assert torch.equal(generate(model, inputs), expected["a"])
        with handle.strength(0.0):
            assert torch.equal(generate(model, inputs), expected[None])
            scale = adapter.layers["0"].attn.scale
            kept = scale.item()
            for value in (float("nan"), kept):
                with torch.no_grad():
                    scale.fill_(value)
                assert torch.equal(generate(model, inputs), expected[None])
        assert torch.equal(generate(model, inputs), turned)
        assert_graphs(1)


@pytest.mark.parametrize("name", NAMES)
def test_entries_strengths_and_adapters_change_without_compiling(name):
    model = tiny_model(name)
    inputs = tiny_inputs(model, padding="left")
    adapters = {key: random_shift(model, seed=seed) for seed, key in enumerate("abc")}
    live = random_shift(model, mk.LIVEConfig(), seed=3)
    expected = expectations(model, inputs, adapters)
    assert not torch.equal(expected["a"], expected["b"])
    assert not torch.equal(expected["a"], expected[None])

    with mk.attach(model, {"a": adapters["a"], "b": adapters["b"], "live": live}) as handle:

        def check(*rows, graphs=1):
            """Against the expectations where a row has one adapter, and against eager generation."""
            with handle.rows(list(rows)):
                tokens = generate(model, inputs)
                assert torch.equal(tokens, generate(model, inputs, compiled=False))
            for row, key in enumerate(rows):
                if key is None or isinstance(key, str) and key in expected:
                    assert torch.equal(tokens[row], expected[key][row]), (rows, row)
            assert_graphs(graphs)

        check("a", "b")
        check("b", None)
        check(("a", "b"), "live")
        check({"a": 0.5, "live": -1.0}, ("a", "b", "live"))
        handle.add("c", adapters["c"])
        check("c", "a")
        handle.remove("a")
        check("b", "c")
        with handle.rows(["b", "c"]), handle.strength(0.0):
            assert torch.equal(generate(model, inputs), expected[None])
        adapters["b"].requires_grad_(False)
        check("b", "b")
        with handle.disabled():
            assert torch.equal(generate(model, inputs), expected[None])
        assert_graphs(2)
        check("c", "b", graphs=2)


def test_beside_mimic():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model, padding="left")
    mimic, m2iv = random_adapter(model), random_shift(model)
    expected = expectations(model, inputs, {"m2iv": m2iv})
    with published(model, mimic):
        expected["mimic"] = generate(model, inputs, compiled=False)
        with biased(model, m2iv):
            expected["mimic", "m2iv"] = generate(model, inputs, compiled=False)
    with mk.attach(model, {"mimic": mimic, "m2iv": m2iv}) as handle:
        for rows in ([("mimic", "m2iv"), "mimic"], ["m2iv", ("mimic", "m2iv")]):
            with handle.rows(rows):
                tokens = generate(model, inputs)
            for row, key in enumerate(rows):
                assert torch.equal(tokens[row], expected[key][row]), (rows, row)
            assert_graphs(1)


@pytest.mark.parametrize("make", [random_shift, random_adapter])
def test_attaching_to_a_model_that_was_compiled_before(make):
    """torch.compile does not look for hooks that come later: the plain graph would run on."""
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), make(model)
    plain = generate(model, inputs)
    assert_graphs(1)
    with mk.attach(model, adapter) as handle:
        expected = generate(model, inputs, compiled=False)
        assert not torch.equal(expected, plain)
        for _ in range(2):
            assert torch.equal(generate(model, inputs), expected)
            with handle.disabled():
                assert torch.equal(generate(model, inputs), plain)
    assert torch.equal(generate(model, inputs), plain)
    with mk.attach(model, make(model, seed=1)):
        other = generate(model, inputs)
        assert torch.equal(other, generate(model, inputs, compiled=False))
        assert not torch.equal(other, expected)
    assert_no_breaks()


def test_another_method_on_a_compiled_module():
    """The first adapter of its method is compiled once; the graph without it must not run on."""
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    adapters = {
        "stream": random_shift(model, mk.LIVEConfig(site="layer"), seed=1),
        "a": random_shift(model, seed=2),
        "mimic": random_adapter(model, seed=6),
    }
    with mk.attach(model, {"stream": adapters.pop("stream")}) as handle:
        names, seen = ["stream"], []
        for name, adapter in ((None, None), *adapters.items()):
            if name is not None:
                handle.add(name, adapter)
                names.append(name)
            with handle.rows([tuple(names)]):
                seen.append(generate(model, inputs))
                assert torch.equal(seen[-1], generate(model, inputs, compiled=False)), names
            assert_graphs(len(names))
        assert all(not torch.equal(x, y) for x, y in zip(seen, seen[1:], strict=False))
