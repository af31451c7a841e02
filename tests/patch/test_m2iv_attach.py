"""M2IV and LIVE attached: rows, sums, other methods beside them, and nothing left behind."""

import re
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.patch.sites.residual import ENTRIES
from mmicl_kernels.testing.tiny_models import PRE_NORM_MODELS, TINY_MODELS, tiny_inputs, tiny_model
from tests.patch.snapshots import assert_same_objects, snapshot, used_model
from tests.support.published import cast, logits, published, random_adapter, relative_error, whole_logits
from tests.support.residuals import biased, decoder_layers, library, random_shift

EPS = torch.finfo(torch.float32).eps
# Another path to the same sums, a few roundings per layer apart, three or four layers deep.
SAME = {"rtol": 64 * EPS, "atol": 64 * EPS}


@pytest.fixture
def model():
    return tiny_model("llava-llama")


def row_of(inputs, row, batch):
    """The inputs of one row alone; images are split evenly."""
    parts = {name: x.unflatten(0, (batch, -1)) for name, x in inputs.items()}
    return {name: x[row] for name, x in parts.items()}


MIXED = [None, "a", ("b", "live"), "mimic", ("mimic", "a", "stream"), {"a": -0.5, "b": 2.0}, ("ffn", "live")]


@pytest.mark.parametrize("family", TINY_MODELS)
def test_rows_of_a_mixed_batch_equal_the_rows_alone(family):
    model = tiny_model(family)
    batch = len(MIXED)
    inputs = tiny_inputs(model, batch=batch, length=20, padding="left")
    with mk.attach(model, library(model)) as handle:
        with handle.rows(MIXED):
            together = whole_logits(model, inputs)
        for row, entry in enumerate(MIXED):
            attended = inputs["attention_mask"][row].bool()
            with handle.rows([entry]):
                alone = whole_logits(model, row_of(inputs, row, batch))[0]
            torch.testing.assert_close(together[row][attended], alone[attended], **SAME)
            with handle.rows(None):
                plain = whole_logits(model, row_of(inputs, row, batch))[0]
            moved = relative_error(alone[attended], plain[attended])
            assert (moved > 0.05) == (entry is not None), (entry, moved)


@pytest.mark.parametrize("name", ["a", "live", "stream", "ffn"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_row_equals_its_adapter_attached_alone(family, name):
    model = tiny_model(family)
    inputs, adapters = tiny_inputs(model, batch=3, length=14, padding="left"), library(model)
    attended = inputs["attention_mask"].bool()[1]
    plain = whole_logits(model, inputs)
    with mk.attach(model, adapters[name]):
        alone = whole_logits(model, inputs)[1][attended]
    with mk.attach(model, adapters) as handle, handle.rows([None, name, "b"]):
        rows = whole_logits(model, inputs)
    torch.testing.assert_close(rows[1][attended], alone, **SAME)
    torch.testing.assert_close(rows[0], plain[0], **SAME)


def test_no_mimic_nearby_means_rows_without_adapters_are_plain_bit_for_bit(model):
    inputs = tiny_inputs(model, batch=3, padding="left")
    plain = logits(model, inputs)
    adapters = {name: x for name, x in library(model).items() if name in ("a", "live", "stream")}
    with mk.attach(model, adapters) as handle:
        for names in (None, [None, (), {}], {"a": 0.0, "live": 0, "stream": -0.0}):
            with handle.rows(names):
                assert torch.equal(logits(model, inputs), plain)


def test_a_row_sums_its_m2iv_adapters_with_their_strengths(model):
    """As one adapter that has the sum."""
    inputs, adapters = tiny_inputs(model), library(model)
    total = random_shift(model, seed=9)
    with torch.no_grad():
        for index, of in total.layers.items():
            for branch in ("attn", "mlp"):
                a, b = (getattr(adapters[name].layers[index], branch) for name in "ab")
                shift = getattr(of, branch)
                shift.scale.fill_(1.0)
                shift.vector.copy_(0.25 * a.scale * a.vector - 2.0 * b.scale * b.vector)
    with biased(model, total):
        expected = whole_logits(model, inputs)
    with mk.attach(model, adapters) as handle, handle.rows({"a": 0.25, "b": -2}):
        torch.testing.assert_close(whole_logits(model, inputs), expected, **SAME)


def test_live_adapters_are_summed_before_the_norm_is_restored(model):
    inputs = tiny_inputs(model)
    one, other = (random_shift(model, mk.LIVEConfig(), seed=seed) for seed in (1, 2))
    total = random_shift(model, mk.LIVEConfig())
    with torch.no_grad():
        for index, of in total.layers.items():
            of.scale.fill_(1.0)
            x, y = (adapter.layers[index] for adapter in (one, other))
            of.vector.copy_(x.scale * x.vector + 0.5 * y.scale * y.vector)
    with mk.attach(model, total):
        expected = whole_logits(model, inputs)
    with mk.attach(model, {"one": one, "other": other}) as handle, handle.rows({"one": 1, "other": 0.5}):
        torch.testing.assert_close(whole_logits(model, inputs), expected, **SAME)


def test_more_adapters_in_a_row_than_expected(model):
    inputs, count = tiny_inputs(model), ENTRIES + 2
    adapters = {str(i): random_shift(model, seed=i) for i in range(count)}
    with mk.attach(model, adapters) as handle:
        with handle.rows([tuple(adapters), None]):
            many = whole_logits(model, inputs)
        with handle.rows([tuple(reversed(adapters)), "0"]):
            torch.testing.assert_close(whole_logits(model, inputs)[0], many[0], **SAME)
        with handle.rows([tuple(adapters)[:-1], None]):
            assert not torch.equal(many[0], whole_logits(model, inputs)[0])


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("family", PRE_NORM_MODELS)
def test_m2iv_beside_mimic(family, normalizer):
    """Against the official formula with M2IV's vectors as biases: no code of ours."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, padding="left")
    mimic, m2iv = random_adapter(model, normalizer=normalizer), random_shift(model)
    with published(model, mimic):
        without = logits(model, inputs)
        with biased(model, m2iv):
            expected = logits(model, inputs)
    with mk.attach(model, {"mimic": mimic, "m2iv": m2iv}) as handle, handle.rows([("mimic", "m2iv")]):
        actual = logits(model, inputs)
    assert relative_error(expected, without) > 0.05
    assert relative_error(actual, expected) <= 256 * EPS


def test_one_tuple_is_the_sum_in_all_rows(model):
    inputs = tiny_inputs(model)
    with mk.attach(model, library(model)) as handle:
        with handle.rows([("a", "live")] * 2):
            expected = whole_logits(model, inputs)
        for names, same in ((("a", "live"), True), (["a", "live"], False)):
            with handle.rows(names):
                assert torch.equal(whole_logits(model, inputs), expected) == same


@pytest.mark.parametrize("name", ["a", "live", "stream", "ffn", "all"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_detach_restores_everything(family, name):
    model = used_model(family)
    inputs = tiny_inputs(model, padding="left")
    before, plain = snapshot(model), logits(model, inputs)
    adapters = library(model)
    handle = mk.attach(model, adapters if name == "all" else adapters[name])
    with handle.rows("a") if name == "all" else ExitStack():
        assert not torch.equal(logits(model, inputs), plain)
        with handle.disabled():
            assert_same_objects(snapshot(model), before)
            assert torch.equal(logits(model, inputs), plain)
    handle.detach()
    assert_same_objects(snapshot(model), before)
    assert torch.equal(logits(model, inputs), plain)
    handle.detach()


def test_hooks_of_others_stay_and_see_what_is_shifted(model):
    inputs, adapter = tiny_inputs(model), random_shift(model)
    layer = decoder_layers(model)["1"]
    seen = []
    first = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    second = layer.self_attn.register_forward_hook(lambda module, args, output: None)
    ours = {module: dict(module._forward_hooks) for module in (layer, layer.self_attn)}
    plain = logits(model, inputs)
    with mk.attach(model, adapter):
        third = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        shifted = logits(model, inputs)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    assert list(layer.self_attn._forward_hooks.items()) == list(ours[layer.self_attn].items())
    assert list(layer._forward_hooks) == [*ours[layer], third.id]
    third.remove()
    assert torch.equal(logits(model, inputs), plain)
    with mk.attach(model, adapter):
        assert torch.equal(logits(model, inputs), shifted)
    for hook in (first, second):
        hook.remove()


def test_a_forward_of_somebody_elses_stays(model):
    """accelerate, for one, gives modules a forward of their own."""
    inputs, adapter = tiny_inputs(model), random_shift(model)
    with mk.attach(model, adapter):
        expected = logits(model, inputs)
    layer, calls = decoder_layers(model)["0"], []
    forward = layer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    layer.forward = counting
    with mk.attach(model, adapter):
        assert torch.equal(logits(model, inputs), expected)
    assert vars(layer)["forward"] is counting and len(calls) == 1
    del layer.forward
    with mk.attach(model, adapter):
        layer.forward = counting
    assert vars(layer)["forward"] is counting


def test_adapters_of_all_methods_come_and_go(model):
    inputs, adapters = tiny_inputs(model), library(model)
    with mk.attach(model, adapters) as handle, handle.rows([("mimic", "a"), ("b", "live", "stream")]):
        expected = whole_logits(model, inputs)
    before = snapshot(model)
    handle = mk.attach(model, {"b": adapters["b"]})
    with handle.rows("b"):
        only_b = whole_logits(model, inputs)
        for name in ("stream", "mimic", "a", "live"):  # another order of installation
            handle.add(name, adapters[name])
        torch.testing.assert_close(whole_logits(model, inputs), only_b, **SAME)
    with handle.rows([("mimic", "a"), ("live", "stream", "b")]):
        torch.testing.assert_close(whole_logits(model, inputs), expected, **SAME)
    for name in ("mimic", "a", "stream", "live"):
        handle.remove(name)
    with handle.rows("b"):
        assert torch.equal(whole_logits(model, inputs), only_b)
    handle.detach()
    assert_same_objects(snapshot(model), before)


def test_another_method_takes_the_single_ones_place(model):
    inputs, adapters = tiny_inputs(model), library(model)
    with mk.attach(model, adapters["a"]):
        expected = logits(model, inputs)
    with mk.attach(model, adapters["mimic"]) as handle:
        handle.add("a", adapters["a"])
        with pytest.raises(RuntimeError, match="'default', 'a'"):
            logits(model, inputs)
        handle.remove("default")
        assert handle.single is adapters["a"]
        assert torch.equal(logits(model, inputs), expected)
        handle.disable()
        handle.add("live", adapters["live"])
        plain = logits(model, inputs)
        handle.remove("live")
        handle.enable()
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), plain)


def test_gradient_checkpointing_changes_no_gradient(model):
    inputs = tiny_inputs(model)
    model.requires_grad_(False)
    adapter = random_shift(model)

    def gradients():
        with mk.attach(model, adapter):
            loss = model(**inputs, use_cache=False).logits.square().sum()
            return torch.autograd.grad(loss, list(adapter.parameters()))

    expected = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for actual, grad in zip(gradients(), expected, strict=True):
        assert (actual - grad).norm() <= 256 * EPS * grad.norm()


def test_checkpointing_computes_again_what_was_computed(model):
    """It reads the handle once more, in the backward pass."""
    inputs = tiny_inputs(model)
    model.requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = {name: random_adapter(model, seed=seed) for seed, name in enumerate("ab")}

    def loss():
        return model(**inputs, use_cache=False).logits.square().sum()

    with mk.attach(model, random_shift(model)) as handle:
        with handle.strength(0.5):
            within, outside = loss(), loss()
            with torch.no_grad(), handle.strength(2.0):
                loss()
            within.backward()
        with pytest.raises(RuntimeError, match=r"are \(1\.0, None\), expected \(0\.5, None\).*backward\(\)"):
            outside.backward()
        loss().backward()
    with mk.attach(model, adapters) as handle:
        with handle.rows("a"):
            within, outside = loss(), loss()
            within.backward()
        with handle.rows("b"), pytest.raises(RuntimeError, match="'b': 1.0.*expected .*'a': 1.0"):
            outside.backward()


def test_without_checkpointing_backward_may_come_later(model):
    inputs, adapter = tiny_inputs(model), random_shift(model)
    model.requires_grad_(False)
    with mk.attach(model, adapter) as handle:
        with handle.strength(0.5):
            loss = model(**inputs).logits.square().sum()
            expected = torch.autograd.grad(loss, list(adapter.parameters()), retain_graph=True)
        for x, y in zip(torch.autograd.grad(loss, list(adapter.parameters())), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_vectors_in_a_low_precision_model(dtype):
    model = tiny_model("llava-llama").to(dtype)
    inputs = cast(tiny_inputs(model), dtype)
    adapter = random_shift(model)
    assert {x.dtype for x in adapter.parameters()} == {torch.float32}
    with mk.attach(model, adapter):
        alone = whole_logits(model, inputs)
    with mk.attach(model, {"a": adapter, "low": random_shift(model, seed=1).to(dtype)}) as handle:
        with handle.rows(["a", None]):
            rows = whole_logits(model, inputs)
        with handle.rows("low"):
            whole_logits(model, inputs)
    assert alone.dtype == dtype
    assert torch.equal(rows[0], alone[0])


def test_an_error_while_patching_leaves_nothing_behind(model, monkeypatch):
    logits(model, tiny_inputs(model))
    adapters = library(model)
    before, calls = snapshot(model), []
    register = nn.Module.register_forward_hook

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no more")
        return register(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(MemoryError):
        mk.attach(model, adapters)
    assert len(calls) == 5
    assert_same_objects(snapshot(model), before)
    mk.attach(model, adapters).detach()


@pytest.mark.parametrize(
    "names, error, message",
    [
        (
            ["a", "d"],
            KeyError,
            r"'d', expected one of \['a', 'b', 'ffn', 'live', 'mimic', 'stream'\] or None",
        ),
        ({"d": 1.0}, KeyError, "'d'"),
        ("d", KeyError, "'d'"),
        (
            [("a", "mimic", "ffn"), None],
            ValueError,
            r"\('mimic', 'ffn'\), expected at most one that shifts attention",
        ),
        (("mimic", "ffn"), ValueError, r"\('mimic', 'ffn'\), expected at most one"),
        ([("a", "b", "a")], ValueError, r"\('a', 'b', 'a'\), expected every name once"),
        ({"a": float("inf")}, ValueError, "strength of 'a' is inf, expected a finite number"),
        ([{"a": -1e39}], ValueError, r"strength of 'a' is -1e\+39, expected a finite number in fp32"),
        ([{"a": None}], TypeError, "strength of 'a' is None, expected a number"),
        ({"mimic": 0.5}, ValueError, r"strength is 0\.5, expected 1: 'mimic' is a MimICAdapter"),
        (
            [["a", "b"]],
            TypeError,
            re.escape("a row is ['a', 'b'], expected a name, a tuple of names, a dict"),
        ),
        ([], ValueError, "names is empty"),
        ([3, "a"], TypeError, "a row is 3"),
        (("a", None), TypeError, "a row names None, expected strings; a list has one entry per batch row"),
    ],
)
def test_refused_rows(model, names, error, message):
    with mk.attach(model, library(model)) as handle:
        with pytest.raises(error, match=message), handle.rows(names):
            pytest.fail("the block was entered")
        assert handle.adapter_ids is None
        with pytest.raises(RuntimeError, match="rows"):
            logits(model, tiny_inputs(model))
