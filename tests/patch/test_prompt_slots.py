"""STAVE's two vectors, against rows that are added to the first layer's input by hand."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

import mmicl_kernels as mk
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_inputs, tiny_model
from tests.patch.compiled_generation import assert_graphs, fresh_dynamo  # noqa: F401
from tests.patch.compiled_generation import generate as generate_compiled
from tests.patch.test_support_matrix import generated
from tests.support.published import logits, random_adapter, relative_error, text_config, whole_logits
from tests.support.residuals import random_shift

FAMILIES = (*TINY_MODELS, "gpt_oss", "qwen3_vl_moe", "mllama")
EPS = torch.finfo(torch.float32).eps


def random_stave(model, seed=0, readout=2):
    return random_shift(model, mk.STAVEConfig(readout=readout), seed=seed)


def rows_of(model, adapter, inputs, mask=None, strength=1.0):
    """What is added to each token, written out row by row."""
    vector, readout = next(iter(adapter.layers.values()))["vector"].detach(), adapter.config.readout
    own = inputs["attention_mask"].bool() if mask is None else inputs["attention_mask"].bool() & mask
    added = torch.zeros(*own.shape, vector.shape[1])
    for row, (ids, seen) in enumerate(zip(inputs["input_ids"], own, strict=True)):
        columns = seen.nonzero().flatten().tolist()
        if columns and ids[columns[0]] == text_config(model).bos_token_id:
            columns = columns[1:]
        slots = columns[-readout:], columns[:-readout]
        for r, slot in enumerate(slots):
            for column in slot:
                added[row, column] = strength * vector[r] / len(slot) ** 0.5
    return added


@contextmanager
def by_hand(model, added):
    """The first pass's rows are added; later passes, of generated tokens, get none."""
    layer, passes = find_anchors(model)[0].layer, []

    def add(module, args, kwargs):
        passes.append(None)
        if len(passes) > 1:
            return None
        if args:
            return (args[0] + added, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

    hook = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def with_bos(model, inputs):
    ids = inputs["input_ids"].clone()
    first = inputs["attention_mask"].int().argmax(-1)
    ids[0, first[0]] = text_config(model).bos_token_id
    return {**inputs, "input_ids": ids}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts(family, padding):
    model = tiny_model(family)
    inputs, adapter = tiny_inputs(model, batch=3, padding=padding), random_stave(model)
    plain = whole_logits(model, inputs)
    with by_hand(model, rows_of(model, adapter, inputs)):
        expected = whole_logits(model, inputs)
    with mk.attach(model, adapter) as handle:
        actual = whole_logits(model, inputs)
        with handle.strength(-0.5):
            weaker = whole_logits(model, inputs)
        with handle.strength(0):
            assert torch.equal(whole_logits(model, inputs), plain)
    own = inputs["attention_mask"].bool()
    assert relative_error(actual[own], expected[own]) <= 64 * EPS
    assert relative_error(plain[own], expected[own]) > 0.01
    with by_hand(model, rows_of(model, adapter, inputs, strength=-0.5)):
        assert relative_error(weaker[own], whole_logits(model, inputs)[own]) <= 64 * EPS
    assert torch.equal(whole_logits(model, inputs), plain)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation(options):
    """Nothing is added to generated tokens, nor to what begins a text."""
    model = tiny_model("llava-llama")
    inputs, adapter = with_bos(model, tiny_inputs(model, padding="left")), random_stave(model)
    with by_hand(model, rows_of(model, adapter, inputs)):
        expected = generated(model, inputs)
    with mk.attach(model, adapter):
        actual = generated(model, inputs, **options)
    assert torch.equal(actual[0], expected[0])
    assert relative_error(actual[1], expected[1]) <= 64 * EPS


def test_pieces_and_beams():
    """What is read in pieces has the counts of the whole prompt."""
    model = tiny_model("llava-llama")
    adapter, inputs = random_stave(model, readout=3), tiny_inputs(model, padding="left")
    text = {"input_ids": inputs["input_ids"].clamp(max=50), "attention_mask": inputs["attention_mask"]}
    with mk.attach(model, adapter):
        expected = generated(model, text)
        beams = generated(model, text, num_beams=2, num_return_sequences=2, output_logits=False)[0]
        for size in (5, 11):
            actual = generated(model, text, prefill_chunk_size=size)
            assert torch.equal(actual[0], expected[0])
            assert relative_error(actual[1], expected[1]) <= 64 * EPS
    with by_hand(model, rows_of(model, adapter, text).repeat_interleave(2, 0)):
        assert torch.equal(
            beams, generated(model, text, num_beams=2, num_return_sequences=2, output_logits=False)[0]
        )


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 5])
def test_a_mask_in_a_loop_of_ones_own(size, cache):
    """It says what the prompt is before that is read; what stands in the cache was read without it."""
    model = tiny_model("llava-llama")
    adapter, (ids, attended) = random_stave(model, readout=3), text_of(model)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 5:11] = True
    inputs = {"input_ids": ids, "attention_mask": attended}
    with by_hand(model, rows_of(model, adapter, inputs, mask[:, :12])):
        expected = whole_logits(model, inputs)

    def read(kv, first, last):
        return model(
            input_ids=ids[:, first:last],
            attention_mask=attended[:, :last],
            past_key_values=kv,
            use_cache=True,
        ).logits

    own = attended.bool()
    with mk.attach(model, adapter) as handle:
        for begin in (0, 3):
            kv = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=16)
            for _ in range(2):  # a cache that is used again has another prompt
                with handle.disabled():
                    first = [read(kv, 0, begin)] if begin else []
                with handle.tokens(mask):
                    pieces = [read(kv, x, min(x + size, 12)) for x in range(begin, 12, size)]
                actual = torch.cat([*first, *pieces], 1)
                assert relative_error(actual[own], expected[own]) <= 64 * EPS
                if begin or cache == "dynamic":
                    break
                kv.reset()


def text_of(model):
    inputs = tiny_inputs(model, padding="left")
    return inputs["input_ids"].clamp(max=50), inputs["attention_mask"]


@torch.no_grad()
def test_a_static_cache_in_a_loop_of_ones_own():
    """Its second piece is no prompt; after reset() it has another one, of other rows and length."""
    model = tiny_model("llava-llama")
    adapter, (ids, attended) = random_stave(model), text_of(model)
    kv = StaticCache(model.config, max_cache_len=16)
    for rows, length in ((2, 9), (2, 11), (1, 5)):
        inputs = {"input_ids": ids[:rows], "attention_mask": torch.ones_like(attended[:rows])}
        prompt = {name: x[:, :length] for name, x in inputs.items()}
        added = torch.cat([rows_of(model, adapter, prompt), torch.zeros(rows, 12 - length, 32)], 1)
        with by_hand(model, added):
            expected = whole_logits(model, inputs)
        kv.reset()
        kv = kv if rows == 2 else StaticCache(model.config, max_cache_len=16)
        with mk.attach(model, adapter):
            pieces = [
                model(input_ids=x, past_key_values=kv, use_cache=True).logits
                for x in inputs["input_ids"].split((length, 12 - length), 1)
            ]
        assert relative_error(torch.cat(pieces, 1), expected) <= 64 * EPS


def first_logits(model, ids, **options):
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(input_ids=ids, max_new_tokens=1, **options).logits[0]


def test_padding_without_a_mask():
    """``generate`` finds it by its id, and so must the counts; one that ends texts is no padding."""
    model = tiny_model("llava-llama")
    adapter, (ids, attended) = random_stave(model), text_of(model)
    ids = ids.masked_fill(ids == 0, 1).masked_fill(attended == 0, 0)
    config = copy.deepcopy(model.generation_config)
    config.pad_token_id = 0
    with mk.attach(model, adapter):
        expected = first_logits(model, ids, attention_mask=attended)
        assert torch.equal(first_logits(model, ids, pad_token_id=0), expected)
        assert torch.equal(first_logits(model, ids, generation_config=config), expected)
        everything = first_logits(model, ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(first_logits(model, ids, pad_token_id=0, eos_token_id=[0, 2]), everything)
    assert not torch.equal(everything, expected)


def test_the_model_as_its_own_assistant():
    model = tiny_model("llava-llama")
    ids, _ = text_of(model)
    inputs = {"input_ids": ids[:1]}
    with mk.attach(model, random_stave(model)):
        expected = generated(model, inputs)[0]
        assert torch.equal(generated(model, inputs, assistant_model=model)[0], expected)


def test_a_mask_that_does_not_fit_embeddings():
    model = tiny_model("llava-llama")
    embeddings = model.get_input_embeddings()(text_of(model)[0])
    with (
        mk.attach(model, random_stave(model), tokens=torch.ones(3, 12, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"tokens\(\) named 3 rows, expected a divisor of the batch 2"),
    ):
        model(inputs_embeds=embeddings, attention_mask=text_of(model)[1])


def test_double_precision():
    model = tiny_model("llava-llama").double()
    inputs, adapter = tiny_inputs(model, padding="left"), random_stave(model, readout=3).double()
    with by_hand(model, rows_of(model, adapter, inputs).double()):
        rounded = whole_logits(model, inputs)
    own = inputs["attention_mask"].bool()
    with mk.attach(model, adapter):
        actual = whole_logits(model, inputs)
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            with by_hand(model, rows_of(model, adapter, inputs)):
                expected = whole_logits(model, inputs)
        finally:
            torch.set_default_dtype(torch.float32)
    assert relative_error(actual[own], expected[own]) <= 64 * torch.finfo(torch.float64).eps
    assert relative_error(rounded[own], expected[own]) > 64 * torch.finfo(torch.float64).eps


def test_a_mask_says_which_tokens_count():
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model, padding="left"), random_stave(model)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 5:11] = True
    with by_hand(model, rows_of(model, adapter, inputs, mask)):
        expected = whole_logits(model, inputs)
    with mk.attach(model, adapter) as handle:
        with handle.tokens(mask):
            actual = whole_logits(model, inputs)
        with handle.tokens("last"):
            last = whole_logits(model, inputs)
        whole = rows_of(model, adapter, inputs)
    assert relative_error(actual, expected) <= 64 * EPS
    whole[:, :-1] = 0  # a name leaves the counts as they are
    with by_hand(model, whole):
        assert relative_error(last, whole_logits(model, inputs)) <= 64 * EPS


def test_rows():
    """Of several adapters, which have slots of their own, beside other methods."""
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model, batch=4)
    adapters = {
        "one": random_stave(model),
        "two": random_stave(model, seed=1),
        "three": random_stave(model, 2, 3),
    }
    added = {name: rows_of(model, adapter, inputs) for name, adapter in adapters.items()}
    others = {"mimic": random_adapter(model), "m2iv": random_shift(model)}
    rows = [("one", "mimic"), {"one": 0.5, "two": -1.0, "three": 2.0}, None, ("two", "m2iv")]
    total = torch.stack(
        [
            added["one"][0],
            0.5 * added["one"][1] - added["two"][1] + 2 * added["three"][1],
            torch.zeros_like(added["one"][2]),
            added["two"][3],
        ]
    )
    with (
        mk.attach(model, others) as handle,
        by_hand(model, total),
        handle.rows(["mimic", None, None, "m2iv"]),
    ):
        expected = whole_logits(model, inputs)
    with mk.attach(model, {**adapters, **others}) as handle, handle.rows(rows):
        assert relative_error(whole_logits(model, inputs), expected) <= 64 * EPS


def test_gradients():
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs, adapter = tiny_inputs(model, padding="left"), random_stave(model)
    parameter, own = next(adapter.parameters()), tiny_inputs(model, padding="left")["attention_mask"].bool()
    with mk.attach(model, adapter):
        model(**inputs).logits[own].square().sum().backward()
    actual, parameter.grad = parameter.grad, None
    weights = torch.zeros(2, 12, 2)
    for row, seen in enumerate(own):
        columns = seen.nonzero().flatten()
        weights[row, columns[-2:], 0] = 2**-0.5
        weights[row, columns[:-2], 1] = len(columns[:-2]) ** -0.5
    with by_hand(model, weights @ parameter):
        model(**inputs).logits[own].square().sum().backward()
    assert relative_error(actual, parameter.grad) <= 256 * EPS


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_generation():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    with mk.attach(model, random_stave(model)):
        expected = generate_compiled(model, inputs, compiled=False)
        assert torch.equal(generate_compiled(model, inputs), expected)
        assert_graphs(1)
    assert not torch.equal(generate_compiled(model, inputs, compiled=False), expected)


def test_what_is_left_and_reported():
    model = tiny_model("llava-llama")
    before, inputs = set(vars(model)), tiny_inputs(model)
    plain = logits(model, inputs)
    with mk.attach(model, random_stave(model)) as handle:
        assert not torch.equal(logits(model, inputs), plain)
        lines = str(handle.report()).splitlines()
        assert "input of default" in lines[0] and len(lines) == 2 and "untouched" in lines[1]
        with pytest.raises(ValueError, match="patched already"):
            mk.attach(model, random_stave(model))
        with pytest.raises(RuntimeError, match="a part of the Llava.* was called by itself"):
            model.base_model.language_model(inputs_embeds=torch.zeros(1, 3, 32))
    layer = find_anchors(model)[0].layer
    assert not layer._forward_pre_hooks and "forward" not in vars(layer) and set(vars(model)) == before
