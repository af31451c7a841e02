"""Placeholders' ids behind a spliced prompt: said by the model, guessed by an assistant or a lookup."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.spliced_prompts import CHOSEN, ordinary_tokens
from tests.support.published import logits

NEW = 12
FAMILIES = ["llava-llama", "idefics2", "qwen2_5_vl"]


def fused(model, seed=3):
    rows = torch.randn(
        5, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(seed)
    )
    return FusedTokens(rows, torch.tensor([0, 3, 5]), None)


def said_by(model, tokens):
    """Two ids, no prompt's, of which the model says the first behind the spliced prompt."""
    prompt = tiny_inputs(model, batch=1)
    with mk.attach(model, mk.create(model, mk.AIMConfig())) as handle:
        said = generated(model, handle, prompt, tokens)[0, -NEW:].tolist()
    free = [token for token in dict.fromkeys(said) if token not in prompt["input_ids"]]
    others = [x for x in range(3, 50) if x not in prompt["input_ids"] and x not in said]
    return free[-1], others[0]


def generated(model, handle, prompt, tokens, **options):
    spliced = handle.splice(prompt, [[0, 1]], tokens=tokens)
    return model.generate(**spliced, max_new_tokens=NEW, do_sample=False, **options)


GUESSES = {
    "assistant": lambda name: {"assistant_model": tiny_model(name)},
    "lookup": lambda name: {"prompt_lookup_num_tokens": 3},
    "static cache": lambda name: {"cache_implementation": "static", "disable_compile": True},
    "no cache": lambda name: {"use_cache": False},
}


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_guesses_change_no_answer(name, guess):
    model = tiny_model(name)
    tokens, prompt = fused(model), tiny_inputs(model, batch=1)
    ids = said_by(model, tokens)
    with mk.attach(model, mk.create(model, mk.AIMConfig()), placeholder_ids=ids) as handle:
        plain = generated(model, handle, prompt, tokens)
        assert ids[0] in plain[0, -NEW:]
        options = GUESSES[guess](name)
        if name == "idefics2" and guess == "assistant":  # whose assistants are given no images
            pytest.skip("transformers gives assistants of Idefics2 no image")
        assert torch.equal(generated(model, handle, prompt, tokens, **options), plain)
        assert torch.equal(generated(model, handle, prompt, tokens), plain)


def test_a_chunk_of_tokens_behind_the_prompt():
    """As verification reads guesses: several at once, placeholders among them, are what each is alone."""
    model = tiny_model("llava-llama").requires_grad_(False)
    tokens, prompt = fused(model), tiny_inputs(model, batch=1)
    with mk.attach(model, mk.create(model, mk.AIMConfig())) as handle:
        spliced = handle.splice(prompt, [[0, 1]], tokens=tokens)
        one, other = handle._patches.splicer.hook.placeholder_ids
        behind = torch.tensor([[5, one, one, other]])
        cache = model(**spliced, use_cache=True).past_key_values
        at_once = model(input_ids=behind, past_key_values=cache).logits
        cache = model(**spliced, use_cache=True).past_key_values
        single = [model(input_ids=x[None, None], past_key_values=cache).logits for x in behind[0]]
    torch.testing.assert_close(at_once, torch.cat(single, 1))


REFUSED = "have a placeholder .* but are not those that the last splice"


def test_what_was_refused_still_is():
    model = tiny_model("llava-llama").requires_grad_(False)
    prompt, embedding = tiny_inputs(model, batch=1), model.get_input_embeddings()
    with mk.attach(model, mk.create(model, mk.AIMConfig())) as handle:
        stale = handle.splice(prompt, [[0, 1]], tokens=fused(model))
        spliced = handle.splice(prompt, [[0, 1]], tokens=fused(model, seed=4))
        with pytest.raises(RuntimeError, match=REFUSED):
            model(**stale)
        cache = model(**spliced, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match=REFUSED):  # no cache, behind which it would stand
            model(**stale)
        # A prompt that comes in two parts: the first is no whole one, the second begins within it.
        half = spliced["input_ids"].shape[1] // 2
        with pytest.raises(RuntimeError, match=REFUSED):
            embedding(spliced["input_ids"][:, :half])
        cache.crop(2 - cache.get_seq_length())
        with pytest.raises(RuntimeError, match=REFUSED):
            model.model(input_ids=spliced["input_ids"][:, 2:], past_key_values=cache)


def test_the_count_of_one_call_is_not_the_next_ones():
    """After tokens behind the cache the next prompt is spliced, however it is given."""
    model = tiny_model("llava-llama").requires_grad_(False)
    tokens, prompt = fused(model), tiny_inputs(model, batch=1)
    with mk.attach(model, mk.create(model, mk.AIMConfig())) as handle:
        spliced = handle.splice(prompt, [[0, 1]], tokens=tokens)
        expected = logits(model, spliced)
        cache = model(**spliced, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
        (begin,) = handle._patches.splicer.hook.prefix.starts.tolist()
        embedded = model.get_input_embeddings()(spliced["input_ids"])  # asked by itself
        assert torch.equal(embedded[0, begin : begin + 5], tokens.rows)
        assert torch.equal(logits(model, spliced), expected)


def test_the_same_splice_twice_is_the_same_prompt():
    model = tiny_model("llava-llama")
    prompt = tiny_inputs(model)
    tokens, others = ordinary_tokens(model), ordinary_tokens(model)
    with mk.attach(model, mk.create(model, mk.AIMConfig())) as handle:
        first = handle.splice(prompt, CHOSEN, tokens=tokens)
        expected = logits(model, first)
        second = handle.splice(prompt, CHOSEN, tokens=tokens)
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(logits(model, first), expected)
        for changed in (
            lambda: handle.splice(prompt, CHOSEN, tokens=others),
            lambda: handle.splice(prompt, CHOSEN[::-1], tokens=others),
            lambda: handle.splice(
                {**prompt, "input_ids": prompt["input_ids"].flip(0)}, CHOSEN[::-1], tokens=others
            ),
        ):
            before = second["input_ids"]
            second = changed()
            assert not torch.equal(before, second["input_ids"])
        handle.unsplice()
        assert not torch.equal(handle.splice(prompt, CHOSEN, tokens=tokens)["input_ids"], second["input_ids"])
