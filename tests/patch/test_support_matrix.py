"""The support matrix: every family, every method, everything a user does first.

A cell passes if what ``attach`` makes equals an independent plain computation (``family_oracles.py``), or it
is empty: the unpatched model fails at the same call, or the method cannot apply. Both are shown.
``make test-families`` runs all of it and writes ``mmicl_kernels/models/support.json``.
"""

import copy
import functools

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import (
    ALL_MODELS,
    IMAGE_ID,
    VOCABULARY,
    is_available,
    tiny_inputs,
    tiny_model,
)
from tests.patch.empty_cells import NEEDS_EAGER, REFUSED, UNPATCHED_FAILS
from tests.patch.family_oracles import METHODS, adapter_of, attached, independent
from tests.patch.snapshots import assert_same_objects, snapshot, used_model
from tests.support.published import doubled, in_double, logits, relative_error, text_config

NEW_TOKENS = 4
# Of each way in which families differ, one, in `make test`; the others in `make test-families`.
QUICK = ("gemma4", "glm4v", "gpt_oss", "llama4", "mllama", "paligemma2", "qwen3_5")
QUICK_CELLS = ("forward", "detach")


def base_of(name):
    return "eager" if name in NEEDS_EAGER else "sdpa"


@functools.lru_cache(maxsize=2)
def model_of(name, base=None):
    """Shared between the cells of a family: each detaches what it attaches."""
    return tiny_model(name, attn_implementation=base or base_of(name)).requires_grad_(False)


def with_base(name, base):
    """A model of its own, whose decoder makes the masks of ``base``, whether or not it could run."""
    model = tiny_model(name, attn_implementation=base_of(name)).requires_grad_(False)
    for config in (model.config, text_config(model)):  # generate() asks the first
        config._attn_implementation_internal = base
    return model


@functools.lru_cache(maxsize=2)
def model_in_double(name):
    return in_double(model_of(name))


def expected_and_actual(model, method, compute, inputs):
    """``compute(prompts)`` of the independent form and of the attached one."""
    adapter = adapter_of(model, method)
    results = []
    for form in (independent, attached):
        with form(model, method, adapter) as prompts:
            results.append(compute(prompts(inputs)))
    return results


@functools.cache
def logit_budget(name, method):
    """Two forms that are each at most twice as far from fp64 as the independent one is on a prompt."""
    model, double = model_of(name), model_in_double(name)
    inputs, results = tiny_inputs(model), []
    for of, given in ((model, inputs), (double, doubled(inputs))):
        with independent(of, method, adapter_of(of, method).to(of.dtype)) as prompts:
            results.append(logits(of, prompts(given)))
    return 4 * relative_error(*results)


def forward(name, method):
    for base in ["eager"] if name in NEEDS_EAGER else ["sdpa", "eager"]:
        model = model_of(name, base)
        inputs = tiny_inputs(model)
        expected, actual = expected_and_actual(model, method, functools.partial(last_logits, model), inputs)
        assert relative_error(actual, expected) <= logit_budget(name, method)
        # The method does far more than any rounding.
        assert relative_error(last_logits(model, inputs), expected) > 1000 * logit_budget(name, method)


@torch.no_grad()
def last_logits(model, inputs):
    return model(**inputs).logits[:, -4:]


def padding(name, method):
    model = model_of(name)
    for side in ("left", "right"):
        inputs = tiny_inputs(model, batch=3 if method != "aim" else 2, padding=side)
        expected, actual = expected_and_actual(model, method, lambda x: logits(model, x), inputs)
        assert relative_error(actual, expected) <= logit_budget(name, method), side


def generate(name, method, **options):
    model = model_of(name)
    (tokens, expected, _), (actual_tokens, actual, _) = expected_and_actual(
        model, method, functools.partial(generated, model, **options), tiny_inputs(model, padding="left")
    )
    assert torch.equal(actual_tokens, tokens)
    assert relative_error(actual, expected) <= logit_budget(name, method)


def static_cache(name, method):
    """Against the independent form on a dynamic cache."""
    model, adapter = model_of(name), adapter_of(model_of(name), method)
    for side in (None, "left"):  # without padding the prefill has no mask
        inputs = tiny_inputs(model, padding=side)
        with independent(model, method, adapter) as prompts:
            tokens, expected, _ = generated(model, prompts(inputs))
        with attached(model, method, adapter) as prompts:
            actual_tokens, actual, _ = generated(model, prompts(inputs), **OPTIONS["static cache"])
        assert torch.equal(actual_tokens, tokens), side
        assert relative_error(actual, expected) <= logit_budget(name, method), side


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


def training(name, method):
    """Every gradient of the adapter, or of the embeddings that AIM's tokens stand for; checkpointed too."""
    model, double = model_of(name), model_in_double(name)
    exact = gradients(double, method, independent)
    expected = gradients(model, method, independent)
    budget = 4 * relative_error(expected, exact)
    assert float(exact.norm()) > 0
    assert relative_error(gradients(model, method, attached), expected) <= budget
    assert relative_error(gradients(model, method, attached, checkpointing=True), expected) <= budget


def gradients(model, method, form, *, checkpointing=False):
    model = copy.deepcopy(model)
    adapter = adapter_of(model, method).to(model.dtype)
    parameters = list(adapter.parameters())
    if method == "aim":
        parameters = [model.get_input_embeddings().weight.requires_grad_()]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with form(model, method, adapter) as prompts:
        given = prompts(tiny_inputs(model))
        output = model(**(doubled(given) if model.dtype == torch.float64 else given))
        output.logits.square().mean().backward()
    return torch.cat([x.grad.flatten() for x in parameters])


def detach(name, method):
    """The model is, object by object and bit for bit, what it was."""
    model = used_model(name, base_of(name))
    inputs = tiny_inputs(model, padding="left")
    plain, before = logits(model, inputs), snapshot(model)
    with attached(model, method, adapter_of(model, method)) as prompts:
        patched = last_logits(model, prompts(inputs))
    assert relative_error(patched, last_logits(model, inputs)) > 0
    assert_same_objects(snapshot(model), before)
    assert torch.equal(logits(model, inputs), plain)


# Of ``generate`` in those cells that an unpatched model may fail at.
OPTIONS = {"beams": {"num_beams": 2}, "static cache": {"cache_implementation": "static"}}
CELLS = {
    "forward": forward,
    "generate": generate,
    "beams": functools.partial(generate, **OPTIONS["beams"]),
    "static cache": static_cache,
    "padding": padding,
    "training": training,
    "detach": detach,
}


def cases():
    for name in filter(is_available, ALL_MODELS):
        for method in METHODS:
            for cell in CELLS:
                quick = name in QUICK and cell in QUICK_CELLS
                marks = [pytest.mark.xdist_group(name), *([] if quick else [pytest.mark.families])]
                yield pytest.param(name, method, cell, marks=marks, id=f"{name}-{method}-{cell}")


@pytest.mark.parametrize("name, method, cell", cases())
def test_cell(name, method, cell, record_property):
    record_property("cell", (name, type(model_of(name)).__name__, method, cell))
    empty = show_empty(name, method, cell)
    record_property("empty", empty)
    if not empty:
        CELLS[cell](name, method)


def show_empty(name, method, cell):
    """Why a cell is empty, "" if it is not; fails where what is said of it does not hold."""
    if (name, method) in REFUSED:
        with pytest.raises(mk.UnsupportedModelError, match=REFUSED[name, method]):
            adapter_of(model_of(name), method)
        return f"cannot apply: {REFUSED[name, method]}"
    failure = UNPATCHED_FAILS.get((name, cell))
    if failure is None:
        return ""
    for side in (None, "left"):
        call = functools.partial(generated, model_of(name), tiny_inputs(model_of(name), padding=side))
        if failure.error is None:
            assert relative_error(call(**OPTIONS[cell])[1], call()[1]) > 0.1
        else:
            with pytest.raises(failure.error, match=failure.message):
                call(**OPTIONS[cell])
    return f"fails unpatched: {failure.reason}"
