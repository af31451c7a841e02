"""What users do when they generate, on families beyond ``TINY_MODELS``.

Compiled static caches, samples, assistants, windows shorter than the text, and batches of several adapters;
each against the independent forms of ``family_oracles.py``.
"""

import functools
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import is_available, tiny_inputs, tiny_model
from tests.patch.compiled_generation import assert_graphs, assert_no_breaks, fresh_dynamo, one_graph  # noqa: F401
from tests.patch.empty_cells import REFUSED, UNPATCHED_FAILS, VERSION
from tests.patch.family_oracles import METHODS, adapter_of, attached, independent
from tests.patch.test_support_matrix import (
    base_of,
    generated,
    logit_budget,
    model_in_double,
    model_of,
    relative_error,
)
from tests.support.published import doubled, logits, random_adapter, whole_logits
from tests.support.residuals import random_shift

NEW_TOKENS = 6
WINDOW = 8
# Their layers' windows, all or some of them, are 8 tokens; Llama4's chunks are.
SLIDING = (
    "cohere2_vision",
    "gemma3",
    "gemma4",
    "gpt_oss",
    "llama4",
    "mistral",
    "paligemma2",
    "phi4_multimodal",
    "qwen2",
    "qwen2_vl",
)


def cases(names, methods=METHODS, quick=()):
    """Every method that applies to every family; slow but for those named quick."""
    found = [(name, method) for name in filter(is_available, names) for method in methods]
    found = [x for x in found if x not in REFUSED]
    slow = pytest.mark.slow
    return [pytest.param(*x, marks=() if x in quick else slow, id="-".join(x)) for x in found]


def assert_same(actual, expected, budget):
    assert torch.equal(actual[0], expected[0])
    assert relative_error(actual[1], expected[1]) <= budget


def skip_where_unpatched_fails(name, cell):
    if (name, cell) in UNPATCHED_FAILS:
        pytest.skip(f"fails unpatched: {UNPATCHED_FAILS[name, cell].reason}")


# Compiled, with a static cache ---------------------------------------------------------------------------


# Graphs of a decoding step. Where layers have windows, HuggingFace's mask of a cache that is not full has
# another shape than that of a full one.
GRAPHS = {
    "llava-llama": 1,
    "qwen3_vl": 1,
    "gemma3": 2,
    "gemma4": 2,
    "idefics2": 1,
    "qwen3_5": 1,
    "mllama": 1,
    "glm4v": 1,
    "gpt_oss": 2,
}
COMPILED = cases(GRAPHS, ("mimic",)) + cases(("llava-llama", "gemma3"), ("m2iv", "aim"))


def compiled(model, inputs):
    return generated(model, inputs, **one_graph())


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name, method", COMPILED)
def test_compiled(name, method):
    skip_where_unpatched_fails(name, "static cache")
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    inputs, budget = tiny_inputs(model, padding="left"), logit_budget(name, method)
    with independent(model, method, adapter) as prompts:
        expected = generated(model, prompts(inputs))
    with attached(model, method, adapter) as prompts:
        for _ in range(2):  # AIM's placeholders are others the second time
            assert_same(compiled(model, prompts(inputs)), expected, budget)
            assert_graphs(GRAPHS[name])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ("llava-llama", "gemma3", "qwen3_5", "gpt_oss"))
def test_switching_rows_of_a_compiled_model(name):
    skip_where_unpatched_fails(name, "static cache")
    model = model_of(name)
    inputs = tiny_inputs(model, padding="left")
    choices = [["mimic", "m2iv"], ["live", None], ["m2iv", ("mimic", "live")], ["mimic", "mimic"]]
    expected = [by_rows(model, rows, lambda: generated(model, inputs)[1]) for rows in choices]
    budgets = [rows_budget(name, tuple(rows)) for rows in choices]
    graphs = []
    with mk.attach(model, mixed_adapters(model)) as handle:
        for rows, steps, budget in zip(choices, expected, budgets, strict=True):
            with handle.rows(rows):
                assert relative_error(compiled(model, inputs)[1], steps) <= budget, rows
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [GRAPHS[name]] * len(graphs)
    assert_no_breaks()


# Samples and assistants ----------------------------------------------------------------------------------


SAMPLED = ("gemma4", "glm4v", "llama4", "mllama", "paligemma2", "phi4_multimodal", "qwen3_5", "qwen3_vl")
SAMPLED_OPTIONS = {
    "samples": {"do_sample": True, "temperature": 0.1, "top_k": 0},
    "samples returned": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "beams of samples": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("options", SAMPLED_OPTIONS)
@pytest.mark.parametrize("name, method", cases(SAMPLED, quick=[("mllama", "m2iv")]))
def test_samples(name, method, options):
    """From the same seed the same tokens are drawn."""
    if "returned" in options or "beams" in options:  # both repeat the prompts
        skip_where_unpatched_fails(name, "beams")
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    inputs, options = tiny_inputs(model, padding="left"), SAMPLED_OPTIONS[options]
    with independent(model, method, adapter) as prompts:
        expected = generated(model, prompts(inputs), **options)
    with attached(model, method, adapter) as prompts:
        actual = generated(model, prompts(inputs), **options)
    assert len(actual[0]) == 2 * options.get("num_return_sequences", 1)
    assert_same(actual, expected, logit_budget(name, method))
    plain = generated(model, inputs, **options)
    assert relative_error(plain[1], expected[1]) > 1000 * logit_budget(name, method)


# Assisted generation is for one prompt. An assistant that is a text model takes no inputs but the text's.
ASSISTANTS = {
    "cohere2_vision": ("cohere2_vision", "llama"),
    "gemma3": ("gemma3",),
    "gemma4": ("gemma4",),
    "glm4v": ("glm4v",),
    "idefics2": ("idefics2", "llama"),
    "internvl": ("internvl", "qwen2"),
    "llama4": ("llama4",),
    "llava-llama": ("llava-llama", "mistral"),
    "molmo2": ("molmo2",),
    "phi4_multimodal": (),  # fails unpatched: it loses its images
    "qwen3_vl": ("qwen3_vl",),
}
if VERSION == "5.17":  # an assistant is given the images, and its windows are not cut back
    ASSISTANTS = {name: [name] * (name not in SLIDING and name in of) for name, of in ASSISTANTS.items()}
    del ASSISTANTS["phi4_multimodal"]  # fails unpatched: it takes one new token at a time
# Always so many candidates, whatever the assistant thinks of them.
CANDIDATES = {
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}


def greedy_alone(model, method, adapter):
    """What one prompt is answered by the independent form."""
    with independent(model, method, adapter) as prompts:
        return generated(model, prompts(tiny_inputs(model, batch=1)), new_tokens=10)


@pytest.mark.parametrize(
    "name, method", cases(ASSISTANTS, quick=[("llava-llama", "mimic"), ("qwen3_vl", "aim")])
)
def test_assisted(name, method):
    """Whoever proposes tokens, plain or patched, those of a patched model are its own."""
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    expected = greedy_alone(model, method, adapter)
    budget = logit_budget(name, method)
    plain = generated(model, tiny_inputs(model, batch=1), new_tokens=10)
    assert relative_error(plain[1], expected[1]) > 1000 * budget
    with attached(model, method, adapter) as prompts:
        inputs = prompts(tiny_inputs(model, batch=1))
        assert_same(generated(model, inputs, new_tokens=10, prompt_lookup_num_tokens=3), expected, budget)
        for assistant_name in ASSISTANTS[name]:
            assistant = tiny_model(assistant_name, seed=1, attn_implementation=base_of(assistant_name))
            assisted = {"assistant_model": assistant, "new_tokens": 10}
            assert_same(generated(model, inputs, **assisted), expected, budget)
            for of_assistant in (random_adapter(assistant, seed=1), random_shift(assistant, seed=1)):
                with mk.attach(assistant, of_assistant):
                    assert_same(generated(model, inputs, **assisted), expected, budget)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mimic", "m2iv", "live"])
@pytest.mark.parametrize("name", ["llava-llama", "gemma3", "qwen3_vl", "llama"])
def test_patched_assistant(name, method):
    """An assistant with the model's own weights and adapter proposes what the model would say."""
    if name not in ASSISTANTS.get(name, [name]):
        pytest.skip(f"transformers {VERSION} fails unpatched: an assistant's windows are not cut back")
    model, assistant = model_of(name), tiny_model(name)
    assistant.generation_config.update(**CANDIDATES)
    adapter = adapter_of(model, method)
    expected = greedy_alone(model, method, adapter)

    budget = logit_budget(name, method)

    def passes(form, of_assistant):
        """How many the model needs for 10 tokens."""
        calls = []
        hook = model.register_forward_hook(lambda *_: calls.append(None))
        with form(model, method, adapter), of_assistant(assistant, method, adapter):
            inputs = tiny_inputs(model, batch=1)
            actual = generated(model, inputs, new_tokens=10, assistant_model=assistant)
        hook.remove()
        assert_same(actual, expected, budget)
        return len(calls)

    def plain(*_):
        return nullcontext()

    both = passes(attached, attached)
    assert both == passes(independent, independent)
    # LIVE keeps the norm of what it moves, and may leave greedy tokens as they are.
    assert both < passes(attached, plain) or method == "live"


@pytest.mark.parametrize("name", ["minicpmv4_6", "qwen3_5"])
def test_no_assistant_where_states_cannot_be_taken_back(name):
    """transformers says so itself; patched, it says the same."""
    model = model_of(name)
    for patched in (False, True):
        with mk.attach(model, random_shift(model)) as handle:
            if not patched:
                handle.disable()
            with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
                generated(model, tiny_inputs(model, batch=1), prompt_lookup_num_tokens=3)


# Windows shorter than the text ---------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name, method", cases(SLIDING, quick=[("mistral", "mimic"), ("qwen2_vl", "m2iv")]))
def test_beyond_the_window(name, method, padding):
    """Cached, cut to the window, the keys give what all tokens at once give without any cache."""
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    inputs, budget = tiny_inputs(model, padding=padding), logit_budget(name, method)
    with independent(model, method, adapter) as prompts:
        expected = generated(model, prompts(inputs), new_tokens=WINDOW + 4)
        # In 5.17 PaliGemma takes for its prefix what it said itself, where it has no cache.
        plain_uncached = generated(model, prompts(inputs), new_tokens=WINDOW + 4, use_cache=False)
    with attached(model, method, adapter) as prompts:
        given = prompts(inputs)
        dynamic = generated(model, given, new_tokens=WINDOW + 4)
        assert_cut(dynamic[2].past_key_values, DynamicSlidingWindowLayer)
        assert_same(dynamic, expected, budget)
        assert relative_error(without_cache(model, given, dynamic[0]), expected[1]) <= budget
        uncached = generated(model, given, new_tokens=WINDOW + 4, use_cache=False)
        assert_same(uncached, plain_uncached, budget)
        if (name, "static cache") not in UNPATCHED_FAILS:
            given = prompts(inputs)
            static = generated(model, given, new_tokens=WINDOW + 4, cache_implementation="static")
            assert_cut(static[2].past_key_values, StaticSlidingWindowLayer)
            assert_same(static, expected, budget)


def assert_cut(cache, kind):
    """Some of the cache's layers hold a window, and no more."""
    cut = [layer for layer in cache.layers if isinstance(layer, kind)]
    assert cut
    assert all(layer.keys.shape[-2] <= WINDOW for layer in cut)


@torch.no_grad()
def without_cache(model, inputs, new):
    """The logits that ``new [B, N]`` were chosen from, of one forward pass over all tokens."""
    extra = new.shape[1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in whole:
            # What follows a PaliGemma's prompt is no prefix, which is attended in both directions.
            value = 1 if model.config.model_type == "paligemma" else value
            whole[name] = torch.nn.functional.pad(whole[name], (0, extra), value=value)
    if "image_grid_thw" not in whole:  # the others find positions of three dimensions themselves
        positions = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        whole["position_ids"] = positions + (model.config.model_type == "paligemma")  # it counts from 1
    return model(**whole, use_cache=False).logits[:, -extra - 1 : -1]


# Batches of several adapters -----------------------------------------------------------------------------


MIXED = ("blip2", "gemma4", "gpt_oss", "llama4", "mllama", "paligemma2", "qwen3_5")
ROWS = (
    ["mimic", None, ("m2iv", "live"), "live"],
    [("mimic", "m2iv"), "m2iv", ("mimic", "m2iv", "live"), "mimic"],
)


def mixed_adapters(model):
    return {method: adapter_of(model, method) for method in ("mimic", "m2iv", "live")}


@contextmanager
def entry_alone(model, entry):
    """Every row with the adapters of one entry of ``rows()``, by their independent forms."""
    with ExitStack() as stack:
        for method in methods_of(entry):
            stack.enter_context(independent(model, method, adapter_of(model, method).to(model.dtype)))
        yield


def methods_of(entry):
    return (entry,) if isinstance(entry, str) else entry or ()


@functools.cache
def rows_budget(name, rows):
    """As of ``logit_budget``, the largest of the entries'."""
    model, double = model_of(name), model_in_double(name)
    errors = []
    for entry in rows:
        with entry_alone(model, entry), entry_alone(double, entry):
            inputs = tiny_inputs(model)
            errors.append(relative_error(logits(model, inputs), logits(double, doubled(inputs))))
    return 4 * max(errors)


def by_rows(model, rows, compute):
    """``compute()``, a tensor by rows, of every row with its adapters alone."""
    results = []
    for row, entry in enumerate(rows):
        with entry_alone(model, entry):
            whole = compute()
        results.append(whole.unflatten(0, (len(rows), -1))[row])
    return torch.cat(results)


@pytest.mark.parametrize("rows", ROWS, ids=["some", "others"])
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x == "qwen3_5" else pytest.mark.slow) for x in MIXED]
)
def test_rows(name, rows):
    model = model_of(name)
    inputs = tiny_inputs(model, batch=4, length=14, padding="left")
    seen = inputs["attention_mask"].bool()
    expected = by_rows(model, rows, lambda: whole_logits(model, inputs))[seen]
    expected_steps = by_rows(model, rows, lambda: generated(model, inputs)[1])
    with mk.attach(model, mixed_adapters(model)) as handle, handle.rows(rows):
        actual = whole_logits(model, inputs)[seen]
        steps = generated(model, inputs)[1]
    budget = rows_budget(name, tuple(rows))
    assert relative_error(actual, expected) <= budget
    assert relative_error(steps, expected_steps) <= budget
    assert relative_error(whole_logits(model, inputs)[seen], expected) > 1000 * budget


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS, ids=["some", "others"])
@pytest.mark.parametrize("options", ["beams returned", "samples returned"])
@pytest.mark.parametrize("name", MIXED)
def test_rows_repeat_in_generate(name, options, rows):
    skip_where_unpatched_fails(name, "beams")  # both repeat the prompts
    model, options = model_of(name), SAMPLED_OPTIONS[options]
    inputs = tiny_inputs(model, batch=4, length=14, padding="left")
    expected = by_rows(model, rows, lambda: generated(model, inputs, **options)[0])
    with mk.attach(model, mixed_adapters(model)) as handle, handle.rows(rows):
        assert torch.equal(generated(model, inputs, **options)[0], expected)
    assert not torch.equal(generated(model, inputs, **options)[0], expected)
