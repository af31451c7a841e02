"""What users do when they generate, on families beyond ``TINY_MODELS``.

Compiled static caches, samples, assistants, windows shorter than the text, and batches of several adapters;
each against the independent forms of ``family_oracles.py``.
"""

import pytest
import torch
from compiled_generation import assert_graphs, assert_no_breaks, fresh_dynamo  # noqa: F401
from empty_cells import REFUSED, UNPATCHED_FAILS
from family_oracles import METHODS, adapter_of, attached, independent
from published import random_adapter
from residuals import random_shift
from test_support_matrix import base_of, logit_budget, model_of, relative_error
from torch._dynamo.utils import counters
from transformers import CompileConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import IMAGE_ID, VOCABULARY, tiny_inputs, tiny_model

NEW_TOKENS = 6


def cases(names, methods=METHODS, quick=()):
    """Every method that applies to every family; slow but for those named quick."""
    for name in names:
        for method in methods:
            if (name, method) not in REFUSED:
                marks = [] if (name, method) in quick else [pytest.mark.slow]
                yield pytest.param(name, method, marks=marks, id=f"{name}-{method}")


def generated(model, inputs, *, new_tokens=NEW_TOKENS, **options):
    """New tokens, and the logits that each was chosen from; not of assisted generation's."""
    torch.manual_seed(0)
    options = {"do_sample": False, "output_logits": True, **options}
    if "compile_config" not in options:
        options["disable_compile"] = True
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        suppress_tokens=list(range(IMAGE_ID - 2, VOCABULARY)),
        **options,
    )
    steps = torch.stack(output.logits, 1) if options["output_logits"] else None
    return output.sequences[:, -new_tokens:], steps, output


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
}


def compiled(model, inputs):
    config = CompileConfig(fullgraph=True, backend="aot_eager")
    config._compile_all_devices = True  # transformers compiles on accelerators only, otherwise
    return generated(model, inputs, cache_implementation="static", compile_config=config)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "name, method", cases(GRAPHS, ("mimic", "m2iv", "aim"), quick=[("idefics2", "mimic")])
)
def test_compiled(name, method):
    skip_where_unpatched_fails(name, "static cache")
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    inputs = tiny_inputs(model, padding="left")
    with independent(model, method, adapter) as prompts:
        expected = generated(model, prompts(inputs))
    with attached(model, method, adapter) as prompts:
        for _ in range(2):  # AIM's placeholders are others the second time
            assert_same(compiled(model, prompts(inputs)), expected, logit_budget(name, method))
            assert_graphs(GRAPHS[name])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", GRAPHS)
def test_switching_rows_of_a_compiled_model(name):
    skip_where_unpatched_fails(name, "static cache")
    model = model_of(name)
    inputs = tiny_inputs(model, padding="left")
    adapters = mixed_adapters(model)
    entries = ["mimic", "m2iv", "live", None, ("mimic", "live")]
    expected = {entry: independent_of(model, adapters, entry, inputs) for entry in entries}
    graphs = []
    with mk.attach(model, adapters) as handle:
        for rows in (["mimic", "m2iv"], ["live", None], ["m2iv", ("mimic", "live")], ["mimic", "mimic"]):
            with handle.rows(rows):
                tokens, steps, _ = compiled(model, inputs)
            for row, entry in enumerate(rows):
                assert torch.equal(tokens[row], expected[entry][0][row]), (rows, row)
                assert relative_error(steps[row], expected[entry][1][row]) <= mixed_budget(name)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [GRAPHS[name]] * len(graphs)
    assert_no_breaks()


# Samples and assistants ----------------------------------------------------------------------------------


SAMPLED = ("gemma4", "glm4v", "llama4", "mllama", "paligemma2", "phi4_multimodal", "qwen3_5", "qwen3_vl")
SAMPLED_OPTIONS = {
    "samples": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "samples returned": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "beams of samples": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("options", SAMPLED_OPTIONS)
@pytest.mark.parametrize("name, method", cases(SAMPLED, quick=[("qwen3_vl", "mimic"), ("mllama", "m2iv")]))
def test_samples(name, method, options):
    """From the same seed the same tokens are drawn."""
    if "beams" in options:
        skip_where_unpatched_fails(name, "beams")
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    inputs, options = tiny_inputs(model, padding="left"), SAMPLED_OPTIONS[options]
    with independent(model, method, adapter) as prompts:
        expected = generated(model, prompts(inputs), **options)
    with attached(model, method, adapter) as prompts:
        actual = generated(model, prompts(inputs), **options)
    assert len(actual[0]) == 2 * options.get("num_return_sequences", 1)
    assert_same(actual, expected, logit_budget(name, method))
    assert not torch.equal(generated(model, inputs, **options)[0], expected[0])


# Assisted generation is for one prompt. An assistant that is a text model takes no inputs but the text's.
ASSISTED = {
    "cohere2_vision": ("cohere2_vision", "llama"),
    "gemma3": ("gemma3",),
    "gemma4": ("gemma4",),
    "glm4v": ("glm4v",),
    "idefics2": ("idefics2", "llama"),
    "internvl": ("internvl", "qwen2"),
    "llama4": ("llama4",),
    "llava-llama": ("llava-llama", "llama", "mistral"),
    "molmo2": (),
    "phi4_multimodal": (),
    "qwen3_vl": ("qwen3_vl",),
}
# transformers says so itself, of the decoders whose states cannot be taken back.
STATEFUL = ("minicpmv4_6", "qwen3_5")


@pytest.mark.parametrize("name, method", cases(ASSISTED, quick=[("llava-llama", "mimic"), ("gemma3", "aim")]))
def test_assisted(name, method):
    """Whoever proposes the tokens, plain or patched, a patched model's greedy tokens are its own."""
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    inputs = first_row(tiny_inputs(model))
    with independent(model, method, adapter) as prompts:
        expected = generated(model, first_row(prompts(tiny_inputs(model))), new_tokens=10)[0]
    with attached(model, method, adapter) as prompts:
        inputs = prompts(tiny_inputs(model))
        raise NotImplementedError(inputs, expected)
