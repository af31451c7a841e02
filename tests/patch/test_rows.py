"""Several adapters in one batch: every row is what its adapter alone makes of it."""

from functools import partial

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_inputs, tiny_model
from tests.support.published import logits, multiply, random_adapter, whole_logits
from tests.support.residuals import biased, random_shift

# Rows differ from a batch of one adapter by the path taken (stacked parameters), not by the sums.
SAME = {"rtol": 32 * torch.finfo(torch.float32).eps, "atol": 32 * torch.finfo(torch.float32).eps}


@pytest.fixture
def model():
    return tiny_model("llava-llama")


@pytest.fixture(params=[random_adapter, random_shift], ids=["mimic", "m2iv"])
def make(request):
    """Adapters that act in attention, or in the stream."""
    return request.param


@pytest.fixture
def adapters(model, make):
    return {name: make(model, seed=seed) for seed, name in enumerate("abc")}


def expected_rows(model, adapters, inputs, names):
    """Each row from a whole batch with its adapter attached alone."""
    alone = {None: whole_logits(model, inputs)}
    for name in set(names) - {None}:
        with mk.attach(model, adapters[name]):
            alone[name] = whole_logits(model, inputs)
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
        actual = whole_logits(model, inputs)
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
    plain = whole_logits(model, inputs)
    with mk.attach(model, adapters) as handle:
        chosen = handle.rows("a")
        torch.testing.assert_close(whole_logits(model, inputs), a, **SAME)
        with handle.rows("b"):
            torch.testing.assert_close(whole_logits(model, inputs), b, **SAME)
        torch.testing.assert_close(whole_logits(model, inputs), a, **SAME)
        handle.strength(0)
        assert torch.equal(whole_logits(model, inputs), plain)
        with handle.strength(1):
            torch.testing.assert_close(whole_logits(model, inputs), a, **SAME)
        assert torch.equal(whole_logits(model, inputs), plain)
        chosen.close()
        handle.remove("b")  # refused while rows are open


def test_a_handle_says_what_is_attached(model):
    handle = mk.attach(model, {"one": random_adapter(model), "two": mk.create(model, mk.LIVEConfig())})
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
        torch.testing.assert_close(whole_logits(model, inputs), expected, **SAME)


REPEATED = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("options", REPEATED)
@pytest.mark.parametrize(
    "family, base, method",
    [
        ("llava-llama", "sdpa", "mimic"),
        ("llava-llama", "eager", "mimic"),
        *((family, "sdpa", "m2iv") for family in ("llava-llama", "idefics2", "qwen2_5_vl")),
    ],
)
def test_generate_repeats_rows(family, base, method, options, cache):
    model = tiny_model(family, attn_implementation=base)
    inputs = tiny_inputs(model, padding=None if method == "mimic" else "left")
    if method == "mimic":
        adapters = {"a": random_adapter(model), "b": random_adapter(model, seed=1)}
    else:
        adapters = {"a": random_shift(model), "b": random_shift(model, mk.LIVEConfig(), seed=4)}
    options = {"do_sample": False, "cache_implementation": cache, **options}

    def generate():
        torch.manual_seed(0)
        return model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, disable_compile=True, **options
        ).unflatten(0, (-1, options.get("num_return_sequences", 1)))

    expected = {None: generate()}
    for name, adapter in adapters.items():
        by_hand = isinstance(adapter, mk.M2IVAdapter)
        with biased(model, adapter) if by_hand else mk.attach(model, adapter):
            expected[name] = generate()
    for row in range(2):
        assert not torch.equal(expected["a"][row], expected["b"][row])
        assert not torch.equal(expected["a"][row], expected[None][row])
    with mk.attach(model, adapters) as handle:
        for names in (["a", "b"], ["b", "a"], [None, "a"]):
            with handle.rows(names):
                actual = generate()
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
        outer = whole_logits(model, inputs)
        with pytest.raises(ZeroDivisionError), handle.rows("b"):
            assert not torch.equal(whole_logits(model, inputs), outer)
            raise ZeroDivisionError
        assert torch.equal(whole_logits(model, inputs), outer)


def test_wrong_number_of_rows(model, adapters):
    inputs = tiny_inputs(model, batch=2)
    with mk.attach(model, adapters) as handle:
        for names in (["a", "b", None], ["a"] * 4):
            with pytest.raises(ValueError, match=f"named {len(names)} rows.*2"), handle.rows(names):
                logits(model, inputs)


def test_add_and_remove(model, adapters, make):
    inputs = tiny_inputs(model)
    a, b, c = adapters.values()
    with mk.attach(model, {"a": a, "b": b}, slots=3) as handle:
        with handle.rows("a"):
            first = whole_logits(model, inputs)
        handle.add("c", c)
        assert list(handle.adapters) == ["a", "b", "c"]
        with pytest.raises(ValueError, match="all 3 slots are taken"):
            handle.add("d", make(model, seed=9))
        with pytest.raises(ValueError, match="name 'a' or its adapter"):
            handle.add("a", make(model, seed=9))
        with pytest.raises(ValueError, match="name 'e' or its adapter"):
            handle.add("e", a)

        handle.remove("b")
        with pytest.raises(KeyError, match="'b'"), handle.rows(["b", None]):
            pass
        with pytest.raises(KeyError, match="'b', expected one of \\['a', 'c'\\]"):
            handle.remove("b")
        handle.add("d", b)
        other = tiny_model("llava-llama")  # the same, without a handle
        expected = expected_rows(other, {"a": a, "c": c, "d": b}, inputs, ["d", "c"])
        with handle.rows(["d", "c"]):
            torch.testing.assert_close(whole_logits(model, inputs), expected, **SAME)
        with handle.rows("a"):
            assert torch.equal(whole_logits(model, inputs), first)
        for name in ("a", "c"):
            handle.remove(name)
        with pytest.raises(ValueError, match="'d' is the last adapter"):
            handle.remove("d")


def test_adding_to_a_single_adapter(model, adapters):
    inputs = tiny_inputs(model)
    with mk.attach(model, adapters["a"]) as handle:
        alone = whole_logits(model, inputs)
        assert handle.single is adapters["a"]
        handle.add("b", adapters["b"])
        assert handle.single is None
        with pytest.raises(RuntimeError, match="'default', 'b'"):
            whole_logits(model, inputs)
        with handle.rows(["default", None]):
            torch.testing.assert_close(whole_logits(model, inputs)[0], alone[0], **SAME)
        handle.remove("b")
        assert torch.equal(whole_logits(model, inputs), alone)


@pytest.mark.parametrize(
    "make, strength",
    [
        (random_adapter, 1.0),
        (random_shift, 0.5),
        (partial(random_shift, config=mk.LIVEConfig()), 0.5),
        (partial(random_shift, config=mk.LIVEConfig(site="layer")), 0.5),
    ],
    ids=["mimic", "m2iv", "live", "stream"],
)
def test_gradients_of_rows_are_those_of_the_adapters_alone(model, make, strength):
    inputs = tiny_inputs(model)
    model.requires_grad_(False)
    adapters = {name: make(model, seed=seed) for seed, name in enumerate("abc")}

    def loss(row):
        return model(**inputs).logits[row].square().sum()

    expected = {}
    for row, name in enumerate("ab"):
        with mk.attach(model, adapters[name], strength=strength):
            expected[name] = torch.autograd.grad(loss(row), list(adapters[name].parameters()))
    with mk.attach(model, adapters, strength=strength) as handle, handle.rows(["a", "b"]):
        (loss(0) + loss(1)).backward()
    for name in "ab":
        for parameter, grad in zip(adapters[name].parameters(), expected[name], strict=True):
            assert grad.norm() > 0
            # Gradients pass through three layers, each within a few roundings of its norm.
            assert (parameter.grad - grad).norm() <= 256 * torch.finfo(torch.float32).eps * grad.norm()
    assert all(not x.grad.any() for x in adapters["c"].parameters() if x.grad is not None)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_open_rows_read_the_parameters_as_they_are(model, adapters, mode, trained):
    inputs = tiny_inputs(model)
    adapters["a"].requires_grad_(trained)
    with mk.attach(model, adapters) as handle, handle.rows("a"):
        before = whole_logits(model, inputs)
        multiply(adapters["a"], 2.0)
        with mode():
            after = model(**inputs).logits
        assert not torch.equal(before, after)
        torch.testing.assert_close(model(**inputs).logits.detach(), after, **SAME)
        multiply(adapters["a"], 0.5)
        torch.testing.assert_close(model(**inputs).logits.detach(), before, **SAME)
        with mode():
            assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_evaluation_between_steps_sees_training(model, adapters, options):
    """Fused optimizers change parameters without counting that."""
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW(adapters["a"].parameters(), lr=0.1, **options)
    with mk.attach(model, adapters) as handle, handle.rows("a"):
        seen = [whole_logits(model, inputs)]
        for _ in range(2):
            model(**inputs).logits.square().sum().backward()
            optimizer.step()
            seen.append(whole_logits(model, inputs))
            torch.testing.assert_close(model(**inputs).logits.detach(), seen[-1], **SAME)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_parameters_made_in_inference_mode(model, make):
    inputs = tiny_inputs(model)
    with torch.inference_mode():
        adapter = make(model)
        with mk.attach(model, {"a": adapter}) as handle, handle.rows("a"):
            rows = model(**inputs).logits
        with mk.attach(model, adapter):
            torch.testing.assert_close(rows, model(**inputs).logits, **SAME)


def test_adapters_of_different_dtypes(model, make):
    """Stacked in the widest of them and fp32."""
    inputs = tiny_inputs(model)
    low, high = make(model).bfloat16(), make(model, seed=1)
    expected = expected_rows(model, {"low": low, "high": high}, inputs, ["low", "high"])
    with mk.attach(model, {"low": low, "high": high}) as handle, handle.rows(["low", "high"]):
        torch.testing.assert_close(whole_logits(model, inputs), expected, **SAME)


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
