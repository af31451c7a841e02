"""On which tokens adapters act: loops that call the plain model, or the adapted one, token by token."""

import copy
import functools
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import mmicl_kernels as mk
from mmicl_kernels.models.tokens import visual_tokens
from mmicl_kernels.testing.tiny_models import IMAGE_ID, TEXT, VOCABULARY, tiny_inputs, tiny_model
from tests.patch.compiled_generation import assert_graphs, fresh_dynamo  # noqa: F401
from tests.patch.compiled_generation import generate as generate_compiled
from tests.patch.family_oracles import adapter_of, independent
from tests.patch.test_support_matrix import generated, logit_budget, model_of, relative_error
from tests.support.published import logits, random_adapter, whole_logits
from tests.support.residuals import Moved, decoder_layers, random_shift

FAMILIES = ("llava-llama", "idefics2", "qwen2_5_vl", "gemma3", "llava-qwen2", "gemma4", "gpt_oss")
METHODS = ("mimic", "m2iv", "live")
PLACES = {
    "all": lambda column, length: True,
    "prompt": lambda column, length: column < length,
    "generated": lambda column, length: column >= length,
    "last": lambda column, length: column == length - 1,
}
NEW_TOKENS = 4
SUPPRESSED = [TEXT["eos_token_id"], *range(IMAGE_ID - 2, VOCABULARY)]  # as ``generated`` does
QUICK = [("llava-llama", "mimic"), ("qwen2_5_vl", "m2iv"), ("gemma3", "mimic")]
CASES = [
    pytest.param(name, method, marks=[] if (name, method) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for method in METHODS
]


def text_inputs(model, batch=3):
    """Prompts of different lengths, padded on the left, without images."""
    inputs = tiny_inputs(model, batch=batch, padding="left")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].where(~visual_tokens(model, text["input_ids"]), 7)
    return text


def random_mask(rows, length=12):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 0.5


def prompts_of(inputs):
    """Each row's own tokens, ``[1, n]``."""
    own = inputs["attention_mask"].bool()
    return [ids[mask][None] for ids, mask in zip(inputs["input_ids"], own, strict=True)]


@torch.no_grad()
def by_token(model, method, adapter, prompt, is_chosen, following=None, pieces=None, **images):
    """New tokens and their logits, from calls of one token each.

    They are of the adapted model where ``is_chosen(column, length)``, else of the plain one. ``following``
    tokens instead of the likeliest; ``pieces`` of the prompt instead of its tokens, ``images`` beside the one
    that has their tokens.
    """
    if hasattr(model.base_model, "rope_deltas"):  # Qwen keeps those of the last batch
        model.base_model.rope_deltas = None
    cache, length, steps, tokens = None, prompt.shape[1], [], []
    pieces = [1] * length if pieces is None else pieces
    queue = [*prompt.split(pieces, 1)]
    column = 0
    while len(steps) < NEW_TOKENS:
        piece = queue.pop(0)
        adapted = independent(model, method, adapter) if is_chosen(column, length) else nullcontext()
        given = images if visual_tokens(model, piece).any() else {}
        with adapted:
            output = model(input_ids=piece, past_key_values=cache, use_cache=True, **given)
        cache, column = output.past_key_values, column + piece.shape[1]
        if not queue:
            steps.append(output.logits[:, -1])
            likely = steps[-1].clone()
            likely[:, SUPPRESSED] = -torch.inf
            token = likely.argmax(-1) if following is None else following[len(tokens)][None]
            tokens.append(token)
            queue = [token[:, None]]
    return torch.stack(tokens, 1), torch.stack(steps, 1)


def expected_of(model, method, adapter, inputs, is_chosen):
    rows = [by_token(model, method, adapter, prompt, is_chosen) for prompt in prompts_of(inputs)]
    return [torch.cat(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("name, method", CASES)
def test_a_loop_of_single_tokens(name, method):
    """Left padding, dynamic and static caches, prefill in pieces, and no cache at all."""
    model, budget = model_of(name), logit_budget(name, method)
    adapter, inputs = adapter_of(model, method), text_inputs(model)
    forms = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "pieces": {"prefill_chunk_size": 5},
        "a last piece of one token": {"prefill_chunk_size": 11},
        "no cache": {"use_cache": False},
    }
    if name == "qwen2_5_vl" and transformers.__version__ < "5.23":  # whose generate() cannot, plain or not
        forms = {form: x for form, x in forms.items() if "piece" not in form}
    plain = logits(model, inputs)
    found = {}
    with mk.attach(model, adapter) as handle:
        for tokens, is_chosen in PLACES.items():
            with handle.disabled():
                expected = expected_of(model, method, adapter, inputs, is_chosen)
            for form, options in forms.items():
                with handle.tokens(tokens):
                    actual = generated(model, inputs, new_tokens=NEW_TOKENS, **options)
                assert torch.equal(actual[0], expected[0]), (tokens, form)
                assert relative_error(actual[1], expected[1]) <= budget, (tokens, form)
            found[tokens] = expected[1]
    for one, other in [("all", "prompt"), ("prompt", "last"), ("prompt", "generated"), ("all", "generated")]:
        assert relative_error(found[one], found[other]) > 100 * budget
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("tokens", ["prompt", "generated", "last"])
@pytest.mark.parametrize("method", ["mimic", "m2iv"])
def test_beams(method, tokens):
    """The score of every beam is what the loop gives its tokens."""
    model = model_of("llava-llama")
    adapter, inputs = adapter_of(model, method), text_inputs(model)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 3}
    with mk.attach(model, adapter, tokens=tokens):
        output = model.generate(
            **inputs, **options, num_return_sequences=2, return_dict_in_generate=True, output_scores=True,
            pad_token_id=0, length_penalty=0.0,
        )  # fmt: skip
    beams = output.sequences[:, -NEW_TOKENS:].unflatten(0, (3, 2))
    scores = output.sequences_scores.unflatten(0, (3, 2))
    for row, prompt in enumerate(prompts_of(inputs)):
        assert not torch.equal(*beams[row])
        for beam, score in zip(beams[row], scores[row], strict=True):
            _, steps = by_token(model, method, adapter, prompt, PLACES[tokens], following=beam)
            expected = steps.log_softmax(-1)[0].gather(1, beam[:, None]).sum()
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["mimic", "live"])
@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2"])
def test_images_and_text(name, method):
    model, budget = model_of(name), logit_budget(name, method)
    adapter, inputs = adapter_of(model, method), tiny_inputs(model, batch=1)
    ids, images = inputs["input_ids"], {"pixel_values": inputs["pixel_values"]}
    image = visual_tokens(model, ids)[0]
    first, count = int(image.int().argmax()), int(image.sum())
    assert image[first : first + count].all() and first + count < len(image) - 1
    pieces = [*[1] * first, count, *[1] * (len(image) - first - count)]

    def loop(is_chosen):
        return by_token(model, method, adapter, ids, is_chosen, pieces=pieces, **images)

    results = {}
    for tokens, places in {"image": image, "text": ~image}.items():
        expected = loop(lambda column, length: tokens == "text" if column >= length else bool(places[column]))  # noqa: B023
        with mk.attach(model, adapter, tokens=tokens):
            actual = generated(model, inputs, new_tokens=NEW_TOKENS)
        with mk.attach(model, adapter, tokens=places[None]):
            masked = generated(model, inputs, new_tokens=1)
        assert torch.equal(actual[0], expected[0])
        assert relative_error(actual[1], expected[1]) <= budget
        assert torch.equal(masked[1], actual[1][:, :1])
        results[tokens] = actual[1]
    assert relative_error(results["text"], results["image"]) > 100 * budget


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_token_of_padded_prompts(padding):
    """Of a pass without a cache; and the same by a mask, which training can give."""
    model = model_of("llava-llama")
    inputs = tiny_inputs(model, batch=3, padding=padding)
    mask = inputs["attention_mask"].bool()
    last = torch.zeros_like(mask)
    for row, own in enumerate(mask):
        last[row, own.nonzero().max()] = True
    with mk.attach(model, random_shift(model)) as handle:
        with handle.tokens("last"):
            actual = logits(model, inputs)
        with handle.tokens(last):
            expected = logits(model, inputs)
        with handle.tokens(last.roll(1, 1)):
            assert not torch.equal(logits(model, inputs), expected)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["llava-llama", "qwen3_vl_moe"])
def test_rows_and_tokens(name):
    """Each row as if it were alone, a mixture of experts too, whose MLP returns all tokens in one row."""
    model = model_of(name)
    inputs = tiny_inputs(model, batch=3)
    adapters = {"live": random_shift(model, mk.LIVEConfig(), seed=2), "m2iv": random_shift(model)}
    adapters["mimic"] = random_adapter(model)
    rows, mask = ["live", ("mimic", "m2iv"), None], random_mask(3)
    plain = whole_logits(model, inputs)
    with mk.attach(model, adapters) as handle:
        with handle.rows(rows), handle.tokens(mask):
            actual = whole_logits(model, inputs)
        for row in range(3):
            with handle.rows(rows[row]), handle.tokens(mask[row : row + 1]):
                torch.testing.assert_close(actual[row], whole_logits(model, inputs)[row])
            with handle.rows(rows[row]):
                assert (
                    row == 2
                    or (actual[row] - whole_logits(model, inputs)[row]).norm() > 0.01 * plain[row].norm()
                )
    torch.testing.assert_close(actual[2], plain[2])


@pytest.mark.parametrize("method", ["mimic", "hificl", "m2iv"])
def test_gradients(method):
    """Against the ops' references; of M2IV also against vectors that are zero elsewhere."""
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs, mask = tiny_inputs(model), random_mask(2)
    if method == "mimic":
        adapter = random_adapter(model)
    else:
        adapter = random_shift(model, {"hificl": mk.HiFICLConfig(), "m2iv": mk.M2IVConfig()}[method])
    found = []
    for impl in ("composed", "reference"):
        adapter.zero_grad()
        with mk.attach(model, adapter, impl=impl, tokens=mask):
            model(**inputs).logits.square().sum().backward()
        found.append([x.grad.clone() for x in adapter.parameters()])
    if method == "m2iv":
        adapter.zero_grad()
        for index, layer in decoder_layers(model).items():
            for module, shift in (
                (layer.self_attn, adapter.layers[index].attn),
                (layer, adapter.layers[index].mlp),
            ):
                module.forward = Moved(module.forward, mask[..., None] * shift.scale * shift.vector)
        model(**inputs).logits.square().sum().backward()
        found.append([x.grad for x in adapter.parameters()])
    for other in found[1:]:
        for actual, expected in zip(found[0], other, strict=True):
            assert expected.norm() > 0
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("method", ["mimic", "m2iv"])
def test_names_do_not_recompile(method):
    model = tiny_model("llava-llama")
    adapter, inputs = adapter_of(model, method), text_inputs(model)
    results = {}
    with mk.attach(model, adapter, tokens="all") as handle:
        for tokens in PLACES:
            with handle.tokens(tokens):
                results[tokens] = generate_compiled(model, inputs)
                assert_graphs(1)
        for tokens, actual in results.items():
            with handle.tokens(tokens):
                assert torch.equal(actual, generate_compiled(model, inputs, compiled=False))
    assert len({x.numpy().tobytes() for x in results.values()}) > 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_finds_its_prompt():
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs = text_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mk.attach(model, random_adapter(model), tokens="all") as handle:
        for tokens in (*PLACES, "text", "image"):
            with handle.tokens(tokens):
                torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_what_a_guess_is_generated():
    """A lookup's candidates are verified several at a time."""
    model = model_of("llava-llama")
    inputs = {name: x[:1].repeat(1, 2) for name, x in text_inputs(model).items()}
    with mk.attach(model, random_shift(model), tokens="generated"):
        plain = generated(model, inputs, new_tokens=8)[0]
        guessed = generated(model, inputs, new_tokens=8, prompt_lookup_num_tokens=3, output_logits=False)[0]
    assert torch.equal(plain, guessed)


def test_nothing_remains():
    model = tiny_model("llava-llama")
    before, inputs = set(vars(model)), tiny_inputs(model)
    handle = mk.attach(model, random_shift(model), tokens="prompt")
    unused = pickle.loads(pickle.dumps(model))  # transformers' hooks cannot be pickled once it ran
    expected, tokens = logits(model, inputs), generated(model, inputs)[0]
    for other in (copy.deepcopy(model), unused):
        assert torch.equal(logits(other, inputs), expected)
        assert torch.equal(generated(other, inputs)[0], tokens)
        assert other.generate._model is other
    handle.tokens("generated").close()
    assert torch.equal(logits(model, inputs), expected)
    handle.disable()
    assert set(vars(model)) == before and not model.base_model._forward_pre_hooks
    handle.enable()
    assert torch.equal(logits(model, inputs), expected)
    handle.detach()
    assert set(vars(model)) == before and not model.base_model._forward_pre_hooks


def test_strength_zero_is_plain():
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), random_shift(model)
    plain = logits(model, inputs)
    with torch.no_grad():
        next(iter(adapter.layers.values())).attn.vector.fill_(torch.nan)
    with mk.attach(model, adapter, strength=0, tokens="prompt"):
        assert torch.equal(logits(model, inputs), plain)
    with mk.attach(model, adapter, tokens="generated"):
        assert torch.equal(logits(model, inputs), plain)


BAD = [
    ("prompts", ValueError, "tokens is 'prompts', expected one of"),
    (3, TypeError, "tokens is 3, expected a name or a bool tensor"),
    (torch.ones(2, 12), ValueError, r"tokens is torch.float32 \[2, 12\]"),
    (torch.ones(12, dtype=torch.bool), ValueError, r"tokens is torch.bool \[12\]"),
    (torch.ones(2, 12, dtype=torch.bool, device="meta"), ValueError, "on meta"),
    (torch.ones(2, 12, dtype=torch.bool).to_sparse(), ValueError, "torch.sparse_coo"),
]


@pytest.mark.parametrize("tokens, error, message", BAD)
def test_other_tokens_are_refused(tokens, error, message):
    model = tiny_model("llava-llama")
    adapter, inputs = random_shift(model), tiny_inputs(model)
    plain = logits(model, inputs)
    with pytest.raises(error, match=message):
        mk.attach(model, adapter, tokens=tokens)
    assert torch.equal(logits(model, inputs), plain)
    with mk.attach(model, adapter, tokens="last") as handle:
        expected = logits(model, inputs)
        with pytest.raises(error, match=message):
            handle.tokens(tokens)
        assert torch.equal(logits(model, inputs), expected)


def test_passes_that_do_not_fit_are_refused():
    model = tiny_model("llava-llama").requires_grad_(False)
    adapter, inputs = random_shift(model), tiny_inputs(model)
    embeddings = torch.randn(2, 12, adapter.backbone.hidden_size)
    with mk.attach(model, adapter, tokens=torch.ones(2, 11, dtype=torch.bool)) as handle:
        with pytest.raises(
            ValueError, match=r"tokens\(\) is a mask \[2, 11\], expected .* at least 12 columns"
        ):
            model(**inputs)
        with pytest.raises(ValueError, match=r"tokens\(\) is a mask \[2, 11\]"):
            model.generate(**inputs, max_new_tokens=2)
        handle.tokens(torch.ones(3, 12, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"tokens\(\) named 3 rows, expected a divisor of the batch 2"):
            model(**inputs)
        handle.tokens("image")
        with pytest.raises(ValueError, match="'image' and the model was given inputs_embeds"):
            model(inputs_embeds=embeddings)
        handle.tokens("prompt")
        logits(model, inputs)
        with pytest.raises(RuntimeError, match="a part of the LlavaForConditionalGeneration was called"):
            model.base_model.language_model(inputs_embeds=embeddings)
        model(inputs_embeds=embeddings)


@pytest.mark.parametrize("between", ["nothing", "another prompt", "no gradients", "the block's end"])
@pytest.mark.parametrize("method", ["mimic", "m2iv"])
def test_checkpointing_repeats_the_last_pass(method, between):
    """Its tokens are known; those of a pass before it are not, which is an error and not another gradient."""
    model = tiny_model("llava-llama").requires_grad_(False).train()
    adapter, found = adapter_of(model, method), []
    prompts = [tiny_inputs(model, padding=padding) for padding in ("left", "right")]
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with mk.attach(model, adapter, tokens="last") as handle:
            for inputs in prompts:  # as steps of training
                adapter.zero_grad()
                model(**inputs, use_cache=False).logits.square().sum().backward()
            found.append([x.grad.clone() for x in adapter.parameters()])
            loss = model(**prompts[0], use_cache=False).logits.square().sum()
            if between == "another prompt":
                loss = loss + model(**prompts[1], use_cache=False).logits.square().sum()
            elif between == "no gradients":
                logits(model, prompts[1])
            elif between == "the block's end":
                handle.tokens(None)
            fails = checkpointed and between != "nothing"
            with pytest.raises(RuntimeError, match="another forward pass chose") if fails else nullcontext():
                loss.backward()
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
        assert expected.norm() > 0


def test_a_checkpoint_around_the_model():
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs, adapter, found = tiny_inputs(model), random_shift(model), []

    def loss_of(**given):
        return model(**given, use_cache=False).logits.square().sum()

    for form in (loss_of, functools.partial(checkpoint, loss_of, use_reentrant=False)):
        adapter.zero_grad()
        with mk.attach(model, adapter, tokens="last"):
            form(**inputs).backward()
        found.append([x.grad.clone() for x in adapter.parameters()])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


# Which prompt a pass belongs to ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["prompt", "generated", "last"])
def test_generation_goes_on_after_a_cache(tokens):
    """With the whole sequence, or the new tokens alone: an earlier turn is of the prompt."""
    model = model_of("llava-llama")
    adapter, inputs = random_shift(model), text_inputs(model, batch=1)
    results = []
    for given in (slice(None), slice(8, None)):
        cache = DynamicCache(config=model.config)
        with mk.attach(model, adapter, tokens=tokens) as handle:
            with torch.no_grad(), handle.disabled():
                model(input_ids=inputs["input_ids"][:, :8], past_key_values=cache, use_cache=True)
            turn = {**inputs, "input_ids": inputs["input_ids"][:, given], "past_key_values": cache}
            results.append(generated(model, turn)[:2])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def recorded(handle, act):
    """What was chosen in every pass of ``act()``."""
    found = []
    hook = handle.anchors[0].layer.register_forward_pre_hook(
        lambda *_: found.append(handle._state.selection.current.chosen.tolist())
    )
    try:
        act()
    finally:
        hook.remove()
    return found


@torch.no_grad()
def test_each_cache_has_its_prompt():
    """Two conversations in turn; and a prompt of guidance's within generate()."""
    model = model_of("llava-llama")
    ids = text_inputs(model, batch=1)["input_ids"]

    def in_turn():
        caches = [model(input_ids=ids[:, :n], use_cache=True).past_key_values for n in (4, 9)]
        for cache in (*caches, *caches):
            model(input_ids=ids[:, :1], past_key_values=cache)

    def guided():
        model.generate(
            input_ids=ids, guidance_scale=2.0, negative_prompt_ids=ids[:, :3], max_new_tokens=3,
            min_new_tokens=3, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    with mk.attach(model, random_shift(model), tokens="generated") as handle:
        assert recorded(handle, in_turn) == [[[False] * 4], [[False] * 9], *[[[True]]] * 4]
        assert recorded(handle, guided)[:4] == [[[False] * 12], [[False] * 3], [[True]], [[True]]]
        with handle.tokens("last"):
            assert recorded(handle, guided)[1] == [[False, False, True]]
        with handle.disabled():
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="read without tokens"):
            model(input_ids=ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_arguments_by_position():
    model = model_of("llava-llama")
    inputs = text_inputs(model)
    mask = inputs["attention_mask"].flip(-1)
    with mk.attach(model, random_shift(model), tokens="last"):
        expected = model.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        actual = model.model(inputs["input_ids"], None, mask).last_hidden_state
    assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("config, tokens", [(mk.M2IVConfig(), "all"), (mk.STAVEConfig(readout=2), None)])
def test_rows_of_a_cache_are_dropped(config, tokens):
    model = model_of("llava-llama")
    ids = text_inputs(model)["input_ids"]
    with mk.attach(model, random_shift(model, config), tokens=tokens):
        found = []
        for keep in (slice(None), [0, 2]):
            cache = model(input_ids=ids, use_cache=True).past_key_values
            if keep == [0, 2]:
                cache.batch_select_indices(torch.tensor(keep))
            found.append(model(input_ids=ids[keep, :1], past_key_values=cache).logits)
    torch.testing.assert_close(found[0][[0, 2]], found[1])


def test_blip2_generates():
    """Its ``generate`` is that of the language model, which has no ids."""
    model = model_of("blip2")
    inputs, adapter = tiny_inputs(model), random_shift(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with mk.attach(model, adapter) as handle:
        expected = model.generate(**inputs, **options)
        with handle.tokens("all"):
            assert torch.equal(model.generate(**inputs, **options), expected)
        with handle.tokens("generated"):
            found = recorded(handle, lambda: model.generate(**inputs, **options))
    T = inputs["input_ids"].shape[1]
    assert found == [[[False] * T] * 2, *[[[True]] * 2] * 3]


# What users do beside ------------------------------------------------------------------------------------


def test_a_mask_is_copied():
    model, mask = tiny_model("llava-llama"), random_mask(2)
    inputs = tiny_inputs(model)
    with mk.attach(model, random_shift(model), tokens=mask):
        expected = logits(model, inputs)
        mask.fill_(False)
        assert torch.equal(logits(model, inputs), expected)


def test_after_an_error_of_the_model():
    model = tiny_model("llava-llama")
    with mk.attach(model, random_shift(model), tokens="prompt"):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        with pytest.raises(RuntimeError, match="was called by itself"):
            model.base_model.language_model(inputs_embeds=torch.zeros(1, 1, 32))


def test_a_generate_of_the_users_own():
    model = tiny_model("llava-llama")
    calls, inputs = [], text_inputs(model)

    def generate(*args, **kwargs):
        calls.append(None)
        return type(model).generate(model, *args, **kwargs)

    model.generate = generate
    with mk.attach(model, random_shift(model), tokens="generated"):
        expected = generated(model, inputs)[1]
        assert torch.equal(generated(model, inputs, use_cache=False)[1].argmax(-1), expected.argmax(-1))
        assert inspect.signature(model.generate) == inspect.signature(type(model).generate)
    assert len(calls) == 2 and model.generate is generate


def test_models_without_images():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="names no ids of images"):
        mk.attach(model, random_shift(model), tokens="image")
    assert mk.handle_of(model) is None
