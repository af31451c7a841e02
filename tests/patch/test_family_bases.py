"""What a decoder's own attention implementation hands to a patched layer, on families beyond ``TINY_MODELS``.

Packed sequences, bases in bf16 and fp16, and masks of flash and flex attention, which no CPU computes: a
decoder is told that it has them, so it makes their masks, and the patched layers need no kernel of theirs.
"""

import copy
import functools
from itertools import product

import pytest
import torch
from transformers import DynamicCache

import mmicl_kernels as mk
from mmicl_kernels.testing.budgets import assert_within_budget
from mmicl_kernels.testing.tiny_models import is_available, tiny_inputs
from tests.patch.empty_cells import REFUSED
from tests.patch.family_oracles import METHODS, adapter_of, attached, independent
from tests.patch.test_support_matrix import generated, logit_budget, model_of, relative_error, with_base
from tests.support.published import cast, doubled, in_double, logits, published, random_adapter, text_config

FLASH = "flash_attention_2"


def some_slow(values, but=()):
    return [pytest.param(x, marks=() if x in but else pytest.mark.slow) for x in values]


# Packed sequences ----------------------------------------------------------------------------------------


# Longer and shorter than the window of 8 that all but Llama's have.
LENGTHS = (11, 1, 5, 13)
PACKED = ("llama", "llava-llama", "mistral", "qwen2", "qwen3")
# Beside GPT-OSS's sinks the official gate is refused.
PACKED_ON_FLASH = (*product(PACKED, ["visible", "all_keys"]), ("gpt_oss", "visible"))


@functools.cache
def sequences():
    """Token ids ``[1, T]`` each, without an image."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 50, (1, length), generator=generator) for length in LENGTHS]


@torch.no_grad()
def alone(model):
    return torch.cat([model(input_ids=ids, use_cache=False).logits for ids in sequences()], 1)


@torch.no_grad()
def packed(model, **options):
    ids = torch.cat(sequences(), 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["mimic", *some_slow(["m2iv", "live"])])
@pytest.mark.parametrize("name", PACKED)
def test_packed(name, method, base):
    """Positions that start again part the sequences of one row."""
    model = model_of(name, base)
    adapter, budget = adapter_of(model, method), logit_budget(name, method)
    with independent(model, method, adapter):
        expected = alone(model)
    with attached(model, method, adapter):
        actual = packed(model)
        assert relative_error(actual, expected) <= budget
        assert relative_error(alone(model), expected) <= budget
    assert relative_error(packed(model), expected) > 1000 * budget
    with mk.attach(model, {"a": adapter, "b": adapter_of(model, method)}) as handle, handle.rows("a"):
        assert relative_error(packed(model), expected) <= budget


@pytest.mark.parametrize("told_by", ["positions", "lengths"])
@pytest.mark.parametrize("name, normalizer", PACKED_ON_FLASH)
def test_packed_on_flash(name, normalizer, told_by):
    """There is no mask, and flash reads positions, or lengths that a collator counted."""
    adapter = random_adapter(model_of(name), normalizer=normalizer)
    with published(model_of(name), adapter):
        expected = alone(model_of(name))
    options = {}
    if told_by == "lengths":
        starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        options = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
        options |= dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    model = with_base(name, FLASH)
    for adapters, rows in ((adapter, "default"), ({"a": adapter}, "a")):
        with mk.attach(model, adapters) as handle, handle.rows(rows):
            assert relative_error(packed(model, **options), expected) <= logit_budget(name, "mimic")


def test_packed_with_all_keys_counts_the_other_sequences():
    """As the official gate counts all there is in a row: sdpa's and eager's rows are not what flash's are."""
    model = model_of("llama")
    adapter = random_adapter(model, normalizer="all_keys")
    with published(model, adapter):
        expected, separate = packed(model), alone(model)
    assert relative_error(expected, separate) > 0.01
    with mk.attach(model, adapter):
        assert relative_error(packed(model), expected) <= logit_budget("llama", "mimic")


def test_gpt_oss_is_packed_on_flash_alone():
    """It tells nobody who makes masks its positions: on eager its sequences are one, patched or not."""
    model = model_of("gpt_oss")
    adapter, budget = adapter_of(model, "mimic"), logit_budget("gpt_oss", "mimic")
    assert relative_error(packed(model), alone(model)) > 1000 * budget
    with published(model, adapter):
        expected = packed(model)
    with mk.attach(model, adapter):
        assert relative_error(packed(model), expected) <= budget


# Bases of low precision ----------------------------------------------------------------------------------


LOW = (
    "blip2",
    "cohere2_vision",
    "gemma3",
    "gemma4",
    "glm4v",
    "gpt_oss",
    "internvl",
    "lfm2_vl",
    "llama4",
    "mistral",
    "mllama",
    "molmo2",
    "paligemma2",
    "phi4_multimodal",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
)
QUICK_LOW = (("gemma4", "live"), ("phi4_multimodal", "mimic"), ("qwen3_vl", "m2iv"))


def low_cases():
    for name in filter(is_available, LOW):
        for method in METHODS:
            if (name, method) not in REFUSED:
                marks = () if (name, method) in QUICK_LOW else pytest.mark.slow
                yield pytest.param(name, method, marks=marks, id=f"{name}-{method}")


@functools.lru_cache(maxsize=2)
def low_and_double(name, dtype):
    model = copy.deepcopy(model_of(name)).to(dtype)
    return model, in_double(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, method", list(low_cases()))
def test_low_precision(name, method, dtype):
    """The adapter stays in fp32 beside a model in bf16 or fp16."""
    model, double = low_and_double(name, dtype)
    inputs = cast(tiny_inputs(model, padding="left"), dtype)
    adapter = adapter_of(model, method)
    with torch.no_grad():
        for parameter_name, parameter in adapter.named_parameters():
            if parameter_name.endswith("vector"):
                parameter.mul_(0.1)  # of longer ones nothing but the direction would matter
    assert {x.dtype for x in adapter.parameters()} == {torch.float32}
    with independent(model, method, adapter) as prompts:
        low = logits(model, prompts(inputs))
    with independent(double, method, copy.deepcopy(adapter).double()) as prompts:
        exact = logits(double, doubled(prompts(inputs)))
    with attached(model, method, adapter) as prompts:
        actual = logits(model, prompts(inputs))
    assert actual.dtype == dtype
    assert_within_budget(f"logits of {name}", actual, low, exact)


# Masks of flash and flex ---------------------------------------------------------------------------------


FLASH_FAMILIES = ("cohere2_vision", "gemma3", "gemma4", "gpt_oss", "mistral")
FLASH_FAMILIES += ("phi4_multimodal", "qwen2_vl", "qwen3_vl")
FLEX_FAMILIES = ("gemma3", "gpt_oss", "llama4", "qwen3_vl")


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(
    "base, name, options",
    [
        *(pytest.param(FLASH, *x, marks=() if x[0] in ("gemma4", "gpt_oss", "mistral") else pytest.mark.slow)
          for x in product(FLASH_FAMILIES, ({}, {"cache_implementation": "static"}))),
        # transformers compiles flex's mask, a minute each time its shape class changes
        *(pytest.param("flex_attention", name, {}, marks=pytest.mark.slow) for name in FLEX_FAMILIES),
    ],
)  # fmt: skip
def test_masks(base, name, padding, options):
    """Flash's is of the padding alone, windows are an argument, and a static cache is longer than both.

    A BlockMask of flex has all that a mask can say: windows, chunks, prefixes and images in both directions.
    """
    adapter = random_adapter(model_of(name))
    inputs = tiny_inputs(model_of(name), padding=padding)
    with published(model_of(name), adapter):
        expected = logits(model_of(name), inputs)
        tokens, steps, _ = generated(model_of(name), inputs)
    model, budget = with_base(name, base), logit_budget(name, "mimic")
    with mk.attach(model, adapter):
        assert relative_error(logits(model, inputs), expected) <= budget
        actual = generated(model, inputs, **options)
    assert torch.equal(actual[0], tokens)
    assert relative_error(actual[1], steps) <= budget


def test_flash_forgets_that_images_are_attended_in_both_directions():
    """Its masks cannot say so: as in an unpatched Gemma3, the tokens of an image see those before alone."""
    adapter = random_adapter(model_of("gemma3"))
    inputs = tiny_inputs(model_of("gemma3"))
    inputs["token_type_ids"][:, 2:7] = 1  # as if an image had five tokens
    model = model_of("gemma3")
    with published(model, adapter):
        both = logits(model, inputs)
        causal = logits(model, {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])})
    budget = logit_budget("gemma3", "mimic")
    assert relative_error(causal, both) > 1000 * budget
    with mk.attach(model, adapter):
        assert relative_error(logits(model, inputs), both) <= budget
    model = with_base("gemma3", FLASH)
    with mk.attach(model, adapter):
        assert relative_error(logits(model, inputs), causal) <= budget


@pytest.mark.parametrize("padding", [None, "left"])
def test_flash_prefix_is_attended_in_both_directions(padding):
    """A PaliGemma on flash is not causal at all, and its windows reach as far ahead as back."""
    model = model_of("paligemma2")
    adapter = random_adapter(model)
    inputs = tiny_inputs(model, length=14, padding=padding)
    position = torch.arange(14)
    own = inputs["attention_mask"].bool()[:, None, None]
    near = (position[:, None] - position).abs() < text_config(model).sliding_window
    masks = {"full_attention": own.expand(-1, 1, 14, -1), "sliding_attention": own & near}
    masks = {
        name: torch.zeros(x.shape).masked_fill(~x, torch.finfo(torch.float32).min)
        for name, x in masks.items()
    }
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, options: (args, {**options, "attention_mask": masks}), with_kwargs=True
    )
    with published(model, adapter):
        expected = logits(model, inputs)
    hook.remove()
    flash = with_base("paligemma2", FLASH)
    with mk.attach(flash, adapter):
        assert relative_error(logits(flash, inputs), expected) <= logit_budget("paligemma2", "mimic")


@pytest.mark.parametrize("pieces", [(7, 5), (9, 3)])
@pytest.mark.parametrize(
    "name, normalizer",
    [*product(["llava-llama", "mistral", "qwen3"], ["visible"]), ("llava-llama", "all_keys")],
)
def test_flash_prefill_in_pieces(name, normalizer, pieces):
    """Causal from the bottom right, beyond the window too, with the window's keys alone in the cache."""
    ids = torch.randint(3, 50, (1, sum(pieces)), generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def second(model):
        cache = DynamicCache(config=text_config(model))
        model(input_ids=ids[:, : pieces[0]], past_key_values=cache)
        return model(input_ids=ids[:, pieces[0] :], past_key_values=cache).logits

    adapter = random_adapter(model_of(name), normalizer=normalizer)
    with published(model_of(name), adapter), torch.no_grad():
        if normalizer == "visible":
            expected = model_of(name)(input_ids=ids).logits[:, pieces[0] :]
        else:  # which counts the keys that there are
            expected = second(model_of(name))
    model = with_base(name, FLASH)
    with mk.attach(model, adapter):
        assert relative_error(second(model), expected) <= logit_budget(name, "mimic")
