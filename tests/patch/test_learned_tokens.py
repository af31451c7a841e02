"""Learned tokens before prompts: what the model makes of the same rows put there by hand; what is refused."""

import pytest
import torch
from torch.nn import functional as F

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.patch.spliced_prompts import CHOSEN, PLACEHOLDERS, ordinary_tokens
from tests.support.episode_inputs import episode, objective_of
from tests.support.example_images import png
from tests.support.published import in_double, logits, random_adapter
from tests.support.residuals import random_shift

# Some hundreds of fp64 roundings one after another; a wrong row is off by far more.
TOLERANCE = 1024 * torch.finfo(torch.float64).eps


def prompt_of(model, num_tokens=5, dtype=None):
    """Tokens as large as the model's own."""
    torch.manual_seed(1)
    weight = model.get_input_embeddings().weight.detach()
    adapter = mk.create(model, mk.PromptTuningConfig(num_tokens=num_tokens, std=float(weight.std())))
    return adapter.to(weight.dtype if dtype is None else dtype)


def merged(model, inputs):
    """The decoder's input embeddings, images and all."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].detach())

    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    logits(model, inputs)
    hook.remove()
    return seen[0]


def by_hand(model, inputs, tokens):
    """Logits of the prompts' own tokens ``[N, V]``, with rows put in front of each, behind its padding."""
    rows, masks = [], []
    for row, mask in zip(merged(model, inputs), inputs["attention_mask"], strict=True):
        first = int(mask.argmax())
        rows.append(torch.cat([row[:first], tokens, row[first:]]))
        masks.append(torch.cat([mask[:first], 2 * torch.ones_like(mask[: len(tokens)]), mask[first:]]))
    mask = torch.stack(masks)  # 2 where the rows are
    logits = model(inputs_embeds=torch.stack(rows), attention_mask=mask.clamp(max=1)).logits
    return logits[mask == 1]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_it_is_rows_put_in_front_by_hand(padding):
    """Logits and the tokens' gradients, on LLaVA, whose ``inputs_embeds`` are as good as ids."""
    model = in_double(tiny_model("llava-llama")).requires_grad_(False)
    inputs, adapter = tiny_inputs(model, padding=padding), prompt_of(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    own = inputs["attention_mask"].bool()
    weights = torch.randn(int(own.sum()), 1, dtype=torch.float64)

    tokens = adapter.tokens.detach().clone().requires_grad_()
    expected = by_hand(model, inputs, tokens)
    (expected.square() * weights).sum().backward()
    plain = logits(model, inputs)

    with mk.attach(model, adapter, placeholder_ids=PLACEHOLDERS) as handle:
        spliced = handle.splice(inputs)
        is_own = spliced["attention_mask"].bool() & (spliced["input_ids"] != PLACEHOLDERS[0])
        actual = model(**spliced).logits[is_own]
        (actual.square() * weights).sum().backward()
    assert relative(actual, expected) < TOLERANCE < 1e-3 < relative(plain, expected)
    assert relative(adapter.tokens.grad, tokens.grad) < TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_objective_is_the_answers_loss_after_them(padding):
    """Value and gradient, of the labelled tokens alone; nothing stays spliced."""
    model = in_double(tiny_model("llava-llama")).requires_grad_(False)
    batch, adapter = episode(model, padding=padding), prompt_of(model)
    tokens = adapter.tokens.detach().clone().requires_grad_()
    own = batch.student["attention_mask"].bool()
    labels = batch.labels[own]
    # A row's first token is never labelled, so that none is predicted by another row's last.
    expected = F.cross_entropy(by_hand(model, batch.student, tokens)[:-1], labels[1:])
    expected.backward()
    with mk.attach(model, adapter) as handle:
        losses = objective_of(handle)(batch)
        losses.total.backward()
        assert handle._patches.splicer.hook.prefix is None
    assert list(losses.parts) == ["ce"] and relative(losses.total, expected) < TOLERANCE
    assert relative(adapter.tokens.grad, tokens.grad) < TOLERANCE


def relative(actual, expected):
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_rounded_to_the_models_dtype(dtype):
    """A trained prompt is fp32 beside a model of half precision."""
    model = tiny_model("llava-llama").to(dtype)
    inputs, adapter = tiny_inputs(model), prompt_of(model, dtype=torch.float32)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    rounded = prompt_of(model, dtype=dtype)
    assert torch.equal(rounded.tokens, adapter.tokens.to(dtype))
    found = []
    for x in (adapter, rounded):
        with mk.attach(model, x) as handle:
            found.append(logits(model, handle.splice(inputs)))
    assert torch.equal(*found)


def test_prompts_with_images_and_without_in_one_batch():
    model, builder = tiny_model("llava-llama"), mk.PromptBuilder(tiny_processor("llava"))
    adapter = prompt_of(model)
    queries = [
        Demonstration((png("red", (9, 7)),), "what is it?", ""),
        Demonstration((), "say", ""),
        Demonstration((png("blue", (9, 7)), png("red", (9, 7))), "which?", ""),
    ]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with mk.attach(model, adapter) as handle:
        alone = []
        for query in queries:
            inputs = handle.splice(builder.prompt([query]))
            alone.append(model.generate(**inputs, **options)[0, -6:])
        for num_beams in (1, 3):
            inputs = handle.splice(builder.prompt(queries))
            made = model.generate(**inputs, **options, num_beams=num_beams)[:, -6:]
            if num_beams == 1:
                assert torch.equal(made, torch.stack(alone))
        unspliced = model.generate(**builder.prompt(queries), **options)[:, -6:]
    assert torch.equal(unspliced, model.generate(**builder.prompt(queries), **options)[:, -6:])
    assert not torch.equal(unspliced, torch.stack(alone))


def test_tokens_are_read_as_they_are_now():
    """What was spliced before an update has the tokens after it."""
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), prompt_of(model)
    with mk.attach(model, adapter) as handle:
        spliced = handle.splice(inputs)
        before = logits(model, spliced)
        with torch.no_grad():
            adapter.tokens.mul_(-2)
        after = logits(model, spliced)
        assert torch.equal(logits(model, handle.splice(inputs)), after)
    assert not torch.equal(before, after)


def test_gradients_reach_the_tokens_alone():
    model = tiny_model("llava-llama").requires_grad_(False)
    inputs, adapter = tiny_inputs(model), prompt_of(model)
    with mk.attach(model, adapter) as handle:
        model(**handle.splice(inputs)).logits.square().sum().backward()
    assert bool((adapter.tokens.grad.norm(dim=1) > 0).all())
    assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("other", [random_adapter, random_shift])
def test_beside_another_adapter(other):
    """Which acts on the learned tokens as on others."""
    model = tiny_model("llava-llama")
    inputs, adapter, beside = tiny_inputs(model), prompt_of(model), other(model)
    with mk.attach(model, {"prompt": adapter, "other": beside}) as handle:
        with handle.rows("other"):
            both = logits(model, handle.splice(inputs))
        with handle.rows(None):
            alone = logits(model, handle.splice(inputs))
        with pytest.raises(ValueError, match="acts through splice"), handle.rows("prompt"):
            pass
    with mk.attach(model, adapter) as handle:
        assert relative(alone, logits(model, handle.splice(inputs))) < 1e-5
    assert relative(both, alone) > 1e-3


def test_what_is_refused(tmp_path):
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), prompt_of(model)
    with mk.attach(model, adapter) as handle:
        with pytest.raises(ValueError, match="demonstrations was given, expected none: .* PromptT"):
            handle.splice(inputs, [[0], [0]])
        with pytest.raises(ValueError, match="tokens was given, expected none"):
            handle.splice(inputs, tokens=ordinary_tokens(model))
        with pytest.raises(ValueError, match="none of the adapters .* fuses demonstrations, expected AIM's"):
            handle.aggregate(inputs)
        for max_length in (12, 16):
            with pytest.raises(ValueError, match=f"max_length is {max_length}, expected room for 5 learned"):
                handle.splice(inputs, max_length=max_length)
        assert handle.splice(inputs, max_length=17)["input_ids"].shape[1] == 17
        for other in (prompt_of(model), mk.create(model, mk.AIMConfig())):
            with pytest.raises(ValueError, match="'b' has tokens before the prompt as 'default' has"):
                handle.add("b", other)
        with handle.disabled(), pytest.raises(RuntimeError, match="the handle is disabled"):
            handle.splice(inputs)
    fuser = mk.create(model, mk.AIMConfig())
    bank = mk.DemonstrationBank.create(tmp_path / "bank", fuser)
    with pytest.raises(ValueError, match="none of the adapters .* fuses demonstrations"):
        mk.attach(model, adapter, bank=bank)
    with pytest.raises(TypeError, match="adapter is a PromptTuningAdapter, expected one that fuses"):
        mk.DemonstrationBank.create(tmp_path / "other", adapter)
    with pytest.raises(ValueError, match="strength is 0.5"):
        mk.attach(model, adapter, strength=0.5)
    with mk.attach(model, fuser) as handle, pytest.raises(TypeError, match="demonstrations is None"):
        handle.splice(inputs, tokens=ordinary_tokens(model))
    with mk.attach(model, fuser, bank=bank) as handle:  # whose bank is that of another then
        handle.add("other", random_adapter(model))
        handle.remove("default")
        handle.add("prompt", adapter)
        assert handle.splice(inputs)["input_ids"].shape[1] == 17
        with pytest.raises(ValueError, match="demonstrations was given"):
            handle.splice(inputs, CHOSEN)


def test_another_device_is_refused():
    model = tiny_model("llava-llama")
    with pytest.raises(ValueError, match="adapter 'default' is on meta, expected cpu"):
        mk.attach(model, prompt_of(model).to("meta"))


def test_the_report_names_it():
    model = tiny_model("llava-llama")
    with mk.attach(model, {"prompt": prompt_of(model)}) as handle:
        report = handle.report()
    assert report.embedding == ("prompt",)
    assert str(report).startswith("embedding  tokens of prompt\n") and "untouched" in str(report)
