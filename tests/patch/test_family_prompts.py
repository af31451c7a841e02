"""Ways in which fused tokens could go wrong in a family and nobody would see."""

import re

import pytest
import torch
from transformers import LogitsProcessor

from mmicl_kernels.models.tokens import visual_tokens
from mmicl_kernels.patch.sites.embedding import choose_placeholders
from mmicl_kernels.testing.tiny_models import ALL_MODELS, IMAGE_ID, tiny_inputs
from tests.patch.family_oracles import adapter_of, attached
from tests.patch.spliced_prompts import CHOSEN, PLACEHOLDERS, longer
from tests.patch.test_support_matrix import base_of
from tests.patch.trap_tools import EPS, M_ROPE, families, frozen, recorded, relative_error
from tests.support.published import whole_logits


def ids_within(config):
    """Every id under a name that says so, in a config as a dict and the dicts in it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ids_within(value)
        elif isinstance(key, str) and re.search(r"(token|patch)_(id|ids|index)$", key) and value is not None:
            yield from value if isinstance(value, list) else [value]


@families(quick=ALL_MODELS)
def test_placeholders_have_no_other_meaning(name):
    """Fused tokens in the places of an image's, or of what frames it, would make an image of them."""
    model = frozen(name, base_of(name))
    for _ in range(4):
        chosen = choose_placeholders(model)
        named = {*ids_within(model.config.to_dict()), *ids_within(model.generation_config.to_dict())}
        assert len(set(chosen)) == 2 and not named & set(chosen)
        model.generation_config.decoder_start_token_id = chosen[0]
        model.config.get_text_config().sep_token_id = chosen[1]


@families(quick=("molmo2", "ovis2", "phi4_multimodal"))
def test_tokens_of_images_are_no_text(name):
    """Phi4 names its image's id in the config of its tower, Molmo2 as a patch: it would be fused as text."""
    model = frozen(name, base_of(name))
    ids = tiny_inputs(model)["input_ids"]
    assert visual_tokens(model, ids)[ids == IMAGE_ID].all()
    # The last four are drawn from below the ids of images, and of what frames them.
    assert not visual_tokens(model, ids)[:, -4:].any()


class Says(LogitsProcessor):
    """The second token that is generated is ``token``."""

    def __init__(self, token, length):
        self.token, self.length = token, length + 1

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != self.length:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def generated(model, inputs, said, use_cache):
    """The new tokens, of which the second is ``said``, and the logits of every step."""
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        logits_processor=[Says(said, inputs["input_ids"].shape[1])],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -4:], torch.stack(output.logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llava-llama", "qwen2_5_vl"])
def test_a_model_may_say_a_placeholder(name, use_cache):
    """It is then a token like any other: a hook that looks for the id alone would overwrite it."""
    model = frozen(name)
    inputs, adapter = tiny_inputs(model, padding="left"), adapter_of(model, "aim")
    for said in PLACEHOLDERS:
        tokens, expected = generated(model, longer(inputs, CHOSEN), said, use_cache)
        with attached(model, "aim", adapter) as prompts:
            actual_tokens, actual = generated(model, prompts(inputs), said, use_cache)
        assert (tokens[:, 1] == said).all()
        assert torch.equal(actual_tokens, tokens) and torch.equal(actual, expected)


def test_a_prompt_with_a_placeholder_is_refused():
    """Its tokens would be taken for fused ones, or these for its tokens."""
    model = frozen("llava-llama")
    inputs, adapter = tiny_inputs(model), adapter_of(model, "aim")
    for said in PLACEHOLDERS:
        strange = {**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([8]), said)}
        with attached(model, "aim", adapter) as prompts:
            spliced = prompts(inputs)
            for length in (0, 12):  # shorter and longer than what was spliced
                ids = torch.nn.functional.pad(strange["input_ids"], (0, length), value=5)
                with pytest.raises(RuntimeError, match="input_ids have a placeholder"):
                    whole_logits(model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
            with pytest.raises(RuntimeError, match="input_ids have a placeholder"):
                model.generate(**strange, max_new_tokens=1)
            expected = longer(inputs, CHOSEN)
            shown = expected["attention_mask"].bool()
            actual = whole_logits(model, spliced)[shown]
        assert torch.equal(actual, whole_logits(model, expected)[shown])
        # Spliced itself it is known where its own token stands.
        expected = longer(strange, CHOSEN)
        with attached(model, "aim", adapter) as prompts:
            actual = whole_logits(model, prompts(strange))[shown]
        assert torch.equal(actual, whole_logits(model, expected)[shown])


@families(*M_ROPE, "minicpmv4_6", "gemma3", quick=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"))
def test_positions_of_spliced_prompts(name):
    """M-RoPE numbers images in three dimensions from the ids: embeddings by themselves would lose them."""
    model = frozen(name)
    inputs, decoder = tiny_inputs(model, padding="left"), model.model.language_model
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with recorded(decoder) as calls:
        whole_logits(model, longer(inputs, CHOSEN))
        model.generate(**longer(inputs, CHOSEN), **options)
        expected = [call.kwargs["position_ids"] for call in calls]
        calls.clear()
        with attached(model, "aim", adapter_of(model, "aim")) as prompts:
            whole_logits(model, prompts(inputs))
            model.generate(**prompts(inputs), **options)
        actual = [call.kwargs["position_ids"] for call in calls]
    assert len(actual) == len(expected) == 5
    for x, y in zip(actual, expected, strict=True):
        assert x is y is None or torch.equal(x, y)
    if name in M_ROPE:
        *_, height, width = expected[0]
        assert not torch.equal(height, width), "the image has no two dimensions, so the test shows nothing"


@families("gemma3", "paligemma", "gemma4-moe", "molmo2", quick=ALL_MODELS)
def test_token_types_grow_with_the_prefix(name):
    """Of another length or with another type the prefix would be masked as an image or a target is."""
    model = frozen(name)
    inputs, adapter = tiny_inputs(model), adapter_of(model, "aim")
    (key,) = [x for x in inputs if x.endswith("token_type_ids")]
    inputs[key][:, 8:11] = 1  # Gemma3's image has a single token, PaliGemma's prompt no target
    given = longer(inputs, CHOSEN)
    expected = whole_logits(model, given)
    with attached(model, "aim", adapter) as prompts:
        spliced = prompts(inputs)
        assert torch.equal(spliced[key], given[key]) and spliced[key].dtype == inputs[key].dtype
        shown = spliced["attention_mask"].bool()
        assert torch.equal(whole_logits(model, spliced)[shown], expected[shown])
        fused = torch.isin(spliced["input_ids"], torch.tensor(PLACEHOLDERS))
        for types in (spliced[key].masked_fill(fused, 1), inputs[key]):
            wrong = whole_logits(model, {**spliced, key: types})
            assert relative_error(wrong[shown], expected[shown]) > 1000 * EPS
