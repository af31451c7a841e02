"""Several adapters in one batch: every row is what its adapter alone makes of it."""

import copy

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_inputs, tiny_model
from tests.support.published import logits, random_adapter

# Rows differ from a batch of one adapter by the path taken (stacked parameters), not by the sums.
SAME = {"rtol": 32 * torch.finfo(torch.float32).eps, "atol": 32 * torch.finfo(torch.float32).eps}


@pytest.fixture
def model():
    return tiny_model("llava-llama")


@pytest.fixture
def adapters(model):
    return {name: random_adapter(model, seed=seed) for seed, name in enumerate("abc")}


@torch.no_grad()
def row_logits(model, inputs):
    return model(**inputs).logits


def expected_rows(model, adapters, inputs, names):
    """Each row from a whole batch with its adapter attached alone."""
    alone = {None: row_logits(model, inputs)}
    for name in set(names) - {None}:
        with mk.attach(model, adapters[name]):
            alone[name] = row_logits(model, inputs)
    return torch.stack([alone[name][row] for row, name in enumerate(names)])


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_rows_equal_single_adapters(family, normalizer):
    model = tiny_model(family)
    adapters = {name: random_adapter(model, seed=i, normalizer=normalizer) for i, name in enumerate("abc")}
    inputs = tiny_inputs(model, batch=4, length=14, padding="left")
    rows = ["b", None, "a", "b"]
    expected = expected_rows(model, adapters, inputs, rows)
    attended = inputs["attention_mask"].bool()
    with mk.attach(model, adapters) as handle, handle.rows(rows):
        actual = row_logits(model, inputs)
    torch.testing.assert_close(actual[attended], expected[attended], **SAME)
    for one in range(4):
        for other in range(one):
            assert not torch.equal(actual[one], actual[other])


def test_rows_and_strength_stay_until_others_or_the_end_of_a_block(model):
    """Both act from when they are called, and as context managers until their block ends."""
    torch.manual_seed(0)
    inputs = tiny_inputs(model)
    adapters = {name: mk.create(model, mk.M2IVConfig()) for name in "ab"}
    a, b = (expected_rows(model, adapters, inputs, [name] * len(inputs["input_ids"])) for name in "ab")
    plain = row_logits(model, inputs)
    with mk.attach(model, adapters) as handle:
        chosen = handle.rows("a")
        torch.testing.assert_close(row_logits(model, inputs), a, **SAME)
        with handle.rows("b"):
            torch.testing.assert_close(row_logits(model, inputs), b, **SAME)
        torch.testing.assert_close(row_logits(model, inputs), a, **SAME)
        handle.strength(0)
        assert torch.equal(row_logits(model, inputs), plain)
        with handle.strength(1):
            torch.testing.assert_close(row_logits(model, inputs), a, **SAME)
        assert torch.equal(row_logits(model, inputs), plain)
        chosen.close()
        handle.remove("b")  # refused while rows are open


def test_a_handle_says_what_is_attached(model, adapters):
    handle = mk.attach(model, {"one": adapters["a"], "two": mk.create(model, mk.LIVEConfig())})
    text = "Handle(LlavaForConditionalGeneration, {}: 'one' (mimic), 'two' (live))"
    assert repr(handle) == text.format("enabled")
    with handle.disabled():
        assert repr(handle) == text.format("disabled")
    handle.detach()
    assert repr(handle) == text.format("detached")


@pytest.mark.parametrize(
    "given, meant",
    [
        ("a", ["a", "a"]),
        (None, [None, None]),
        (["a"], ["a", "a"]),
        ([("b",), ()], ["b", None]),
        ([None, ("a",)], [None, "a"]),
        (("b",), ["b", "b"]),
        ((), [None, None]),
    ],
)
def test_what_rows_may_be_called_with(model, adapters, given, meant):
    inputs = tiny_inputs(model)
    expected = expected_rows(model, adapters, inputs, meant)
    with mk.attach(model, adapters) as handle, handle.rows(given):
        torch.testing.assert_close(row_logits(model, inputs), expected, **SAME)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_rows_repeat_in_generate(adapters, options, cache, base):
    model = tiny_model("llava-llama", attn_implementation=base)
    inputs = tiny_inputs(model)
    options = {"do_sample": False, "cache_implementation": None if cache == "dynamic" else cache, **options}

    def generate():
        torch.manual_seed(0)
        return model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, disable_compile=True, **options
        )

    per_row = options.get("num_return_sequences", 1)
    expected = {}
    for name in ("a", "b"):
        with mk.attach(model, adapters[name]):
            expected[name] = generate().unflatten(0, (-1, per_row))
    assert not torch.equal(expected["a"][0], expected["b"][0])
    with mk.attach(model, adapters) as handle:
        for names in (["a", "b"], ["b", "a"]):
            with handle.rows(names):
                actual = generate().unflatten(0, (-1, per_row))
            for row, name in enumerate(names):
                assert torch.equal(actual[row], expected[name][row]), (names, row)


def test_dict_without_rows_raises(model, adapters):
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    with mk.attach(model, adapters) as handle:
        with pytest.raises(RuntimeError, match=r"'a', 'b', 'c'.*handle\.rows"):
            logits(model, inputs)
        with handle.rows("a"):
            logits(model, inputs)
        with pytest.raises(RuntimeError, match="rows"):
            logits(model, inputs)
        with handle.disabled():
            assert torch.equal(logits(model, inputs), plain)
    with (
        mk.attach(model, {"a": adapters["a"], "b": adapters["b"]}),
        pytest.raises(RuntimeError, match="rows"),
    ):
        logits(model, inputs)


def test_rows_are_restored(model, adapters):
    inputs = tiny_inputs(model)
    with mk.attach(model, adapters) as handle, handle.rows("a"):
        outer = row_logits(model, inputs)
        with pytest.raises(ZeroDivisionError), handle.rows("b"):
            assert not torch.equal(row_logits(model, inputs), outer)
            raise ZeroDivisionError
        assert torch.equal(row_logits(model, inputs), outer)


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["a", "d"], KeyError, "'d', expected one of \\['a', 'b', 'c'\\] or None"),
        ("d", KeyError, "'d'"),
        ([("a", "b"), None], ValueError, r"\('a', 'b'\), expected at most one"),
        ([], ValueError, "names is empty"),
        ([3, "a"], TypeError, "a row is 3"),
        (("a", "b"), ValueError, r"\('a', 'b'\), expected at most one"),
        (("a", None), TypeError, "a row names None, expected strings; a list has one entry per batch row"),
    ],
)
def test_refused_rows(model, adapters, names, error, message):
    inputs = tiny_inputs(model)
    with mk.attach(model, adapters) as handle:
        with pytest.raises(error, match=message), handle.rows(names):
            pytest.fail("the block was entered")
        assert handle.adapter_ids is None
        with pytest.raises(RuntimeError, match="rows"):
            logits(model, inputs)


def test_wrong_number_of_rows(model, adapters):
    inputs = tiny_inputs(model, batch=2)
    with mk.attach(model, adapters) as handle:
        for names in (["a", "b", None], ["a"] * 4):
            with pytest.raises(ValueError, match=f"named {len(names)} rows.*2"), handle.rows(names):
                logits(model, inputs)


def test_add_and_remove(model, adapters):
    inputs = tiny_inputs(model)
    a, b, c = adapters.values()
    with mk.attach(model, {"a": a, "b": b}, slots=3) as handle:
        with handle.rows("a"):
            first = row_logits(model, inputs)
        handle.add("c", c)
        assert list(handle.adapters) == ["a", "b", "c"]
        with pytest.raises(ValueError, match="all 3 slots are taken"):
            handle.add("d", random_adapter(model, seed=9))
        with pytest.raises(ValueError, match="name 'a' or its adapter"):
            handle.add("a", random_adapter(model, seed=9))
        with pytest.raises(ValueError, match="name 'e' or its adapter"):
            handle.add("e", a)

        handle.remove("b")
        with pytest.raises(KeyError, match="'b'"), handle.rows(["b", None]):
            pass
        with pytest.raises(KeyError, match="'b', expected one of \\['a', 'c'\\]"):
            handle.remove("b")
        handle.add("d", b)
        expected = expected_rows_after(handle, model, {"a": a, "c": c, "d": b}, inputs)
        with handle.rows(["d", "c"]):
            torch.testing.assert_close(row_logits(model, inputs), expected, **SAME)
        with handle.rows("a"):
            assert torch.equal(row_logits(model, inputs), first)
        for name in ("a", "c"):
            handle.remove(name)
        with pytest.raises(ValueError, match="'d' is the last adapter"):
            handle.remove("d")


def expected_rows_after(handle, model, adapters, inputs):
    other = tiny_model("llava-llama")
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    return expected_rows(other, adapters, inputs, ["d", "c"])


def test_adding_to_a_single_adapter(model, adapters):
    inputs = tiny_inputs(model)
    with mk.attach(model, adapters["a"]) as handle:
        alone = row_logits(model, inputs)
        assert handle.single is adapters["a"]
        handle.add("b", adapters["b"])
        assert handle.single is None
        with pytest.raises(RuntimeError, match="'default', 'b'"):
            row_logits(model, inputs)
        with handle.rows(["default", None]):
            torch.testing.assert_close(row_logits(model, inputs)[0], alone[0], **SAME)
        handle.remove("b")
        assert torch.equal(row_logits(model, inputs), alone)


def test_gradients_reach_every_adapter_in_use(model, adapters):
    """As many as each gets alone from its own row."""
    inputs = tiny_inputs(model)
    model.requires_grad_(False)

    def row_loss(row):
        return model(**inputs).logits[row].square().sum()

    expected = {}
    for row, name in enumerate("ab"):
        with mk.attach(model, adapters[name]):
            expected[name] = torch.autograd.grad(row_loss(row), list(adapters[name].parameters()))
    with mk.attach(model, adapters) as handle, handle.rows(["a", "b"]):
        (row_loss(0) + row_loss(1)).backward()
    for name in "ab":
        for parameter, grad in zip(adapters[name].parameters(), expected[name], strict=True):
            assert grad.norm() > 0
            # Gradients pass through three layers, each within a few roundings of its norm.
            assert (parameter.grad - grad).norm() <= 256 * torch.finfo(torch.float32).eps * grad.norm()
    assert all(not x.grad.any() for x in adapters["c"].parameters() if x.grad is not None)


def negate(adapter):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.neg_()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_open_rows_read_the_parameters_as_they_are(model, adapters, mode, trained):
    inputs = tiny_inputs(model)
    adapters["a"].requires_grad_(trained)
    with mk.attach(model, adapters) as handle, handle.rows("a"):
        before = row_logits(model, inputs)
        negate(adapters["a"])
        with mode():
            after = model(**inputs).logits
        assert not torch.equal(before, after)
        torch.testing.assert_close(model(**inputs).logits.detach(), after, **SAME)
        negate(adapters["a"])
        torch.testing.assert_close(model(**inputs).logits.detach(), before, **SAME)
        with mode():
            assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_evaluation_between_steps_sees_training(model, adapters, options):
    """Fused optimizers change parameters without counting that."""
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW(adapters["a"].parameters(), lr=0.1, **options)
    with mk.attach(model, adapters) as handle, handle.rows("a"):
        seen = [row_logits(model, inputs)]
        for _ in range(2):
            model(**inputs).logits.square().sum().backward()
            optimizer.step()
            seen.append(row_logits(model, inputs))
            torch.testing.assert_close(model(**inputs).logits.detach(), seen[-1], **SAME)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_parameters_made_in_inference_mode(model):
    inputs = tiny_inputs(model)
    with torch.inference_mode():
        adapter = random_adapter(model)
        with mk.attach(model, {"a": adapter}) as handle, handle.rows("a"):
            rows = model(**inputs).logits
        with mk.attach(model, adapter):
            torch.testing.assert_close(rows, model(**inputs).logits, **SAME)


def test_adapters_of_different_dtypes(model):
    """Stacked in the widest of them and fp32."""
    inputs = tiny_inputs(model)
    low, high = random_adapter(model).bfloat16(), random_adapter(model, seed=1)
    expected = expected_rows(model, {"low": low, "high": high}, inputs, ["low", "high"])
    with mk.attach(model, {"low": low, "high": high}) as handle, handle.rows(["low", "high"]):
        torch.testing.assert_close(row_logits(model, inputs), expected, **SAME)


def test_rows_entered_in_inference_mode_first(model, adapters):
    inputs = tiny_inputs(model)
    with mk.attach(model, adapters) as handle:
        names = [next(iter(adapters)), None]
        with torch.inference_mode(), handle.rows(names):
            first = model(**inputs).logits
        with torch.no_grad(), handle.rows(names):
            assert torch.equal(model(**inputs).logits, first)


def test_remove_waits_for_open_rows(model, adapters):
    with mk.attach(model, adapters) as handle:
        name = next(iter(adapters))
        with handle.rows([name, None]), pytest.raises(ValueError, match="expected no open rows"):
            handle.remove(name)
        assert name in handle.adapters


def test_detaching_a_copy_leaves_the_original_attached(model, adapters):
    handle = mk.attach(model, adapters)
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match="deepcopy of a patched model"):
        mk.attach(copied, adapters)
    mk.detach(copied)
    with pytest.raises(ValueError, match="patched already"):
        mk.attach(model, adapters)
    handle.detach()
    mk.attach(model, adapters).detach()
