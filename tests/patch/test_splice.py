"""Fused tokens in a prompt: exactly what the same rows do as embeddings of ordinary tokens."""

import pytest
import torch
from transformers import GenerationConfig

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.testing.tiny_models import TINY_MODELS, VOCABULARY, tiny_inputs, tiny_model
from tests.patch.empty_cells import UNPATCHED_FAILS
from tests.patch.snapshots import assert_same_objects, snapshot, used_model
from tests.patch.spliced_prompts import (
    CHOSEN,
    LEARNED,
    PLACEHOLDERS,
    learned_prompt,
    longer,
    ordinary_tokens,
)
from tests.support.published import logits, random_adapter


@pytest.fixture(params=TINY_MODELS)
def model(request):
    return used_model(request.param)


@pytest.fixture(params=["fused", "learned"])
def way(request):
    """Whose tokens are spliced: those of demonstrations, or the adapter's own."""
    return request.param


def attached(model, way="fused", **options):
    adapter = learned_prompt(model) if way == "learned" else mk.create(model, mk.AIMConfig())
    return mk.attach(model, adapter, placeholder_ids=PLACEHOLDERS, **options)


def chosen(way):
    return LEARNED if way == "learned" else CHOSEN


def spliced_by(handle, inputs, way):
    """``inputs`` after the tokens of ``chosen(way)``."""
    if way == "learned":
        return handle.splice(inputs)
    return handle.splice(inputs, CHOSEN, tokens=ordinary_tokens(handle.model))


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_forward_equals_ordinary_tokens(model, way, padding):
    inputs = tiny_inputs(model, padding=padding)
    expected = logits(model, longer(inputs, chosen(way)))
    with attached(model, way) as handle:
        spliced = spliced_by(handle, inputs, way)
        assert torch.equal(logits(model, spliced), expected)
        assert torch.equal(logits(model, spliced), expected)  # and again


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_ordinary_tokens(model, way, beams):
    if beams > 1 and (model.config.model_type, "beams") in UNPATCHED_FAILS:
        pytest.skip(f"fails unpatched: {UNPATCHED_FAILS[model.config.model_type, 'beams'].reason}")
    inputs = tiny_inputs(model, padding="left")
    counts = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "num_return_sequences": beams}
    options = GenerationConfig(**counts, pad_token_id=0, bos_token_id=1)
    expected = model.generate(**longer(inputs, chosen(way)), generation_config=options)
    with attached(model, way) as handle:
        spliced = spliced_by(handle, inputs, way)
        generated = model.generate(**spliced, generation_config=options)
    new = spliced["input_ids"].shape[1]
    assert torch.equal(generated[:, new:], expected[:, new:])


def test_generate_without_a_cache_and_with_a_static_one(model, way):
    inputs = tiny_inputs(model, padding="left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**longer(inputs, chosen(way)), **options)
    with attached(model, way) as handle:
        spliced = spliced_by(handle, inputs, way)
        for cache in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            if cache.get("cache_implementation") and model.config.model_type == "idefics":
                continue  # it has no static cache, spliced or not
            generated = model.generate(**spliced, **options, **cache)
            assert torch.equal(generated[:, -5:], expected[:, -5:]), cache


def test_first_token_of_a_text_stays_the_first(model, way):
    inputs = tiny_inputs(model, padding="left")
    first = inputs["attention_mask"].argmax(1)
    inputs["input_ids"][0, first[0]] = model.config.get_text_config().bos_token_id
    expected = logits(model, longer(inputs, chosen(way), begins=(1,)))
    with attached(model, way) as handle:
        spliced = spliced_by(handle, inputs, way)
        assert torch.equal(logits(model, spliced), expected)


@pytest.mark.parametrize("config", [mk.MimICConfig(), mk.M2IVConfig()], ids=["mimic", "m2iv"])
def test_beside_another_adapter(model, config):
    torch.manual_seed(0)
    other = mk.create(model, config)
    inputs = tiny_inputs(model, padding="left")
    with mk.attach(model, other):
        expected = logits(model, longer(inputs, CHOSEN))
    both = {"aim": mk.create(model, mk.AIMConfig()), "other": other}
    with mk.attach(model, both, placeholder_ids=PLACEHOLDERS) as handle, handle.rows("other"):
        spliced = handle.splice(inputs, CHOSEN, tokens=ordinary_tokens(model))
        torch.testing.assert_close(logits(model, spliced), expected)
        with pytest.raises(ValueError, match="acts through splice"), handle.rows("aim"):
            pass


def test_truncation_keeps_the_last_whole_ones(model):
    inputs = tiny_inputs(model)
    expected = logits(model, longer(inputs, [[3], [0, 0]]))
    with attached(model) as handle:
        tokens = ordinary_tokens(model)
        spliced = handle.splice(inputs, [[0, 3], [3, 0, 0]], tokens=tokens, max_length=12 + 9)
        assert torch.equal(logits(model, spliced), expected)
        with pytest.raises(ValueError, match=r"prompt 0 has 12 tokens, expected at most max_length=11"):
            handle.splice(inputs, CHOSEN, tokens=tokens, max_length=11)


def test_what_is_not_spliced_stays_plain():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    longer_ones = [tiny_inputs(model, length=length) for length in (21, 40)]
    plain, alone = logits(model, inputs), [logits(model, x) for x in longer_ones]
    with attached(model) as handle:
        tokens = ordinary_tokens(model)
        spliced = handle.splice(inputs, [[0], [0]], tokens=tokens)
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(logits(model, handle.splice(inputs, [[], []], tokens=tokens)), plain)
        with pytest.raises(RuntimeError, match="have a placeholder"):  # the splice before the last
            logits(model, spliced)
        spliced = handle.splice(inputs, [[0, 0, 0], [0, 3, 1]], tokens=tokens)
        assert spliced["input_ids"].shape == (2, 22)
        for x, expected in zip(longer_ones, alone, strict=True):
            assert torch.equal(logits(model, x), expected)
        for damaged in (spliced["input_ids"][:, :-1], spliced["input_ids"].roll(1, 0)):
            with pytest.raises(RuntimeError, match="have a placeholder"):
                model(input_ids=damaged)
        # A model may say the placeholder's id; in a step of decoding it is a token like any other.
        said = torch.full((2, 1), PLACEHOLDERS[0])
        with handle.disabled():
            expected = model(input_ids=said).logits
        assert torch.equal(model(input_ids=said).logits, expected)
        handle.disable()
        with pytest.raises(RuntimeError, match="disabled"):
            handle.splice(inputs, CHOSEN, tokens=tokens)
        assert len(model.get_input_embeddings()._forward_hooks) == 0


def test_int8_tokens():
    model = tiny_model("llava-llama")
    inputs, tokens = tiny_inputs(model), ordinary_tokens(model)
    scale = tokens.rows.abs().amax(1) / 127
    rounded = (tokens.rows / scale[:, None]).round()
    with attached(model) as handle:
        wide = FusedTokens(rounded * scale[:, None], tokens.offsets, None)
        expected = logits(model, handle.splice(inputs, CHOSEN, tokens=wide))
        narrow = FusedTokens(rounded.to(torch.int8), tokens.offsets, scale)
        assert torch.equal(logits(model, handle.splice(inputs, CHOSEN, tokens=narrow)), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_tokens(model, checkpointing):
    """Those of embeddings that the prompt's own tokens have."""
    inputs = tiny_inputs(model, padding="left")
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    seen = []

    def keep(module, args, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = embedding.register_forward_hook(keep)
    prompts = longer(inputs, CHOSEN)
    visible = prompts["attention_mask"].bool()
    model(**prompts).logits[visible].square().sum().backward()
    hook.remove()
    tokens = ordinary_tokens(model)
    tokens.rows.requires_grad_()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with attached(model) as handle:
        spliced = handle.splice(inputs, CHOSEN, tokens=tokens)
        model(**spliced).logits[visible].square().sum().backward()
        places = spliced["input_ids"] == PLACEHOLDERS[0]
    expected = torch.zeros_like(tokens.rows)
    rows = [n for of in CHOSEN for d in of for n in range(*tokens.offsets[d : d + 2].tolist())]
    expected.index_add_(0, torch.tensor(rows), seen[0].grad[places])
    torch.testing.assert_close(tokens.rows.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_detach_restores_everything(model, way):
    inputs = tiny_inputs(model)
    before, plain = snapshot(model), logits(model, inputs)
    handle = attached(model, way)
    spliced_by(handle, inputs, way)
    with pytest.raises(ValueError, match="patched already"):
        attached(model, way)
    handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert_same_objects(snapshot(model), before)
    with pytest.raises(RuntimeError, match="detached"):
        spliced_by(handle, inputs, way)


@pytest.mark.parametrize(
    ("change", "demonstrations", "error", "message"),
    [
        ({}, [[0]], ValueError, "has 1 lists, expected 2"),
        ({}, [[0], [5]], ValueError, "id 5, expected 0 to 4"),
        ({}, [[0], [-1]], ValueError, "id -1, expected 0 to 4"),
        ({}, [[0], [True]], TypeError, "True, expected an id"),
        ({}, [0, 1], TypeError, "expected a list of ids for each prompt"),
        ({"position_ids": torch.zeros(2, 12)}, CHOSEN, ValueError, "position_ids was given"),
        ({"inputs_embeds": torch.zeros(2, 12, 32)}, CHOSEN, ValueError, "inputs_embeds was given"),
        ({"segments": torch.zeros(2, 12, dtype=torch.long)}, CHOSEN, ValueError, "segments has shape"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, CHOSEN, ValueError, r"attention_mask is a tensor"),
        ({"labels": torch.zeros(2, 11)}, CHOSEN, ValueError, r"labels has shape \[2, 11\]"),
        ({"loss_mask": torch.zeros(2, 12)}, CHOSEN, ValueError, "loss_mask has shape"),
        ({"attention_mask": torch.zeros(2, 12)}, CHOSEN, ValueError, "hides every token"),
        ({"input_ids": None}, CHOSEN, ValueError, "input_ids is a NoneType"),
    ],
)
def test_bad_input_is_named(change, demonstrations, error, message):
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    with attached(model) as handle:
        with pytest.raises(error, match=message):
            handle.splice({**inputs, **change}, demonstrations, tokens=ordinary_tokens(model))
        with pytest.raises(ValueError, match="no bank is attached"):
            handle.splice(inputs, [[], []])
        with pytest.raises(TypeError, match="tokens is a Tensor"):
            handle.splice(inputs, [[], []], tokens=torch.zeros(2, 32))
        with pytest.raises(TypeError, match="max_length is '20'"):
            handle.splice(inputs, [[], []], tokens=ordinary_tokens(model), max_length="20")


def test_bad_attachments_are_named():
    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.AIMConfig())
    for wrong in ((VOCABULARY, 1), (-1, 1), (1, 1), 1):
        with pytest.raises(TypeError if wrong == 1 else ValueError, match="placeholder_ids is"):
            mk.attach(model, adapter, placeholder_ids=wrong)
    with pytest.raises(ValueError, match="has tokens before the prompt as 'a' has, expected one of them"):
        mk.attach(model, {"a": adapter, "b": mk.create(model, mk.AIMConfig())})
    with (
        mk.attach(model, random_adapter(model)) as handle,
        pytest.raises(ValueError, match="none of the adapters .* fuses"),
    ):
        handle.splice(tiny_inputs(model), CHOSEN, tokens=ordinary_tokens(model))
    with pytest.raises(ValueError, match="strength is 0.5"):
        mk.attach(model, adapter, strength=0.5)


def test_default_placeholder_has_no_other_meaning():
    """Ids beside those that the configuration names may be marks of images, as Idefics2's are."""
    model = tiny_model("llava-llama")
    model.config.image_token_index = VOCABULARY - 1
    model.generation_config.decoder_start_token_id = VOCABULARY - 3
    with mk.attach(model, mk.create(model, mk.AIMConfig())) as handle:
        spliced = handle.splice(tiny_inputs(model), [[2], []], tokens=ordinary_tokens(model))
        again = handle.splice(tiny_inputs(model), [[2], []], tokens=ordinary_tokens(model))
    assert spliced["input_ids"][0, 0] == VOCABULARY - 5
    assert again["input_ids"][0, 0] == VOCABULARY - 6
    assert spliced["attention_mask"].tolist() == [[1] * 13, [0] + [1] * 12]


def test_labels_grow():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    with attached(model) as handle:
        inputs["labels"] = inputs["input_ids"]
        spliced = handle.splice(inputs, CHOSEN, tokens=ordinary_tokens(model))
    fused = spliced["input_ids"] == PLACEHOLDERS[0]
    own = (spliced["attention_mask"] == 1) & ~fused
    assert torch.equal(spliced["labels"][own], spliced["input_ids"][own])
    assert (spliced["labels"][~own] == -100).all()


def test_a_splice_before_the_last_is_refused_though_its_prompts_are_the_same():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    with attached(model) as handle:
        first, second = (
            handle.splice(inputs, chosen, tokens=ordinary_tokens(model)) for chosen in ([[0], [0]],) * 2
        )
        logits(model, second)
        with pytest.raises(RuntimeError, match="have a placeholder"):
            logits(model, first)
        handle.unsplice()
        logits(model, first)  # prompts with a strange token


def test_one_row_of_another_prompt_is_refused():
    model = tiny_model("llava-llama")
    with attached(model) as handle:
        spliced = handle.splice(tiny_inputs(model), CHOSEN, tokens=ordinary_tokens(model))
        spliced["input_ids"] = spliced["input_ids"].clone()
        spliced["input_ids"][1, -1] += 1
        with pytest.raises(RuntimeError, match="have a placeholder"):
            logits(model, spliced)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_before(backend):
    """torch.compile does not look for hooks: what was compiled plain must see ours all the same."""
    torch._dynamo.reset()
    model = tiny_model("llava-llama")
    inputs, tokens = tiny_inputs(model), ordinary_tokens(model)
    prompts = longer(inputs, CHOSEN)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(**prompts).logits
        handle = attached(model)
        adapter = handle.single
        torch.testing.assert_close(compiled(**handle.splice(inputs, CHOSEN, tokens=tokens)).logits, expected)
        handle.add("m2iv", mk.create(model, mk.M2IVConfig()))
        handle.remove("default")
        handle.add("aim", adapter)
        handle.remove("m2iv")
        spliced = handle.splice(inputs, CHOSEN, tokens=tokens)
        torch.testing.assert_close(compiled(**spliced).logits, expected)
        handle.detach()
        torch.testing.assert_close(compiled(**prompts).logits, expected)
    torch._dynamo.reset()


def test_a_hidden_token_stays_where_it_is():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, 8] = 0
    expected = model(**inputs).logits
    with attached(model) as handle:
        spliced = handle.splice(inputs, [[], []], tokens=ordinary_tokens(model))
        assert torch.equal(model(**spliced).logits, expected)
        inputs["attention_mask"][0, 0], inputs["attention_mask"][1, -1] = 0, 0
        with pytest.raises(ValueError, match="padding on both sides"):
            handle.splice(inputs, CHOSEN, tokens=ordinary_tokens(model))


def test_another_embedding_is_refused():
    model = tiny_model("llava-llama")
    tokens = ordinary_tokens(model)
    with attached(model) as handle:
        model.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 32))
        with pytest.raises(RuntimeError, match="another input embedding"):
            handle.splice(tiny_inputs(model), CHOSEN, tokens=tokens)


def test_spliced_in_inference_mode():
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs, tokens = tiny_inputs(model), ordinary_tokens(model)
    tokens.rows.requires_grad_()
    with attached(model) as handle:
        with torch.inference_mode():
            spliced = handle.splice(inputs, CHOSEN, tokens=tokens)
            model(**spliced)
        model(**spliced).logits.sum().backward()
    assert tokens.rows.grad.abs().sum() > 0


def test_ids_outside_of_the_vocabulary():
    """Some models write another id for their images before they look it up."""
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    expected = logits(model, longer(inputs, CHOSEN))
    image = inputs["input_ids"] == model.config.image_token_index
    with attached(model) as handle:
        given = {**inputs, "input_ids": inputs["input_ids"].masked_fill(image, VOCABULARY + 7)}
        spliced = handle.splice(given, CHOSEN, tokens=ordinary_tokens(model))
        replaced = spliced["input_ids"] == VOCABULARY + 7
        assert replaced.any()
        spliced["input_ids"] = spliced["input_ids"].masked_fill(replaced, model.config.image_token_index)
        assert torch.equal(logits(model, spliced), expected)
