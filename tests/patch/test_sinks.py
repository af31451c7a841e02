"""A model's own attention sinks, as GPT-OSS has them: in the softmax and in the lse before any adapter."""

import functools
from contextlib import ExitStack

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import mmicl_kernels as mk
from mmicl_kernels.patch.sites.hf_attention import attention_forward
from mmicl_kernels.testing.budgets import GATE_ROUNDINGS, assert_all_within_budget, gradients
from mmicl_kernels.testing.inputs import normal, shifted_attention_inputs
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.methods.test_hificl_adapter import hificl
from tests.patch.family_oracles import adapter_of, independent
from tests.patch.test_hf_attention import module
from tests.patch.test_support_matrix import (
    detach,
    forward,
    generate,
    generated,
    logit_budget,
    model_in_double,
    model_of,
    static_cache,
)
from tests.support.published import (
    additive_mask,
    attending,
    doubled,
    logits,
    published,
    relative_error,
    whole_logits,
    with_sinks,
)

B, H, G, T, D = 2, 4, 2, 7, 8
SCALE = D**-0.5
NAMES = ("out", "dq", "dk", "dv", "dsinks", "dweight", "dbias", "dshift")
# The first two queries of the last row see no key.
VISIBLE = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
VISIBLE[-1, :, :, :2] = False
impls = pytest.mark.parametrize("impl", ["reference", "composed"])


# The attention function ----------------------------------------------------------------------------------


def given(N, dtype):
    """Queries, keys and values, sinks as large as the sum of the scores, and N virtual keys of an adapter."""
    q, k, v, *keys = shifted_attention_inputs(B, H, G, T, T, D, virtual=(H, N), dtype=dtype)
    return q, k, v, 1 + normal(H, dtype=dtype, seed=5), *keys


def lows_and_exact(form, N):
    """What ``form`` gives in fp32, and of the same numbers in fp64."""
    inputs, dout = given(N, torch.float32), normal(B, T, H, D, dtype=torch.float32, seed=9)
    low, exact = (
        sum(gradients(form, [x.to(dtype) for x in inputs], (dout.to(dtype),)), ())
        for dtype in (torch.float32, torch.float64)
    )
    return inputs, dout, low, exact


def assert_same_gradients(actual, low, exact, lse):
    """Backward passes recompute ``exp(s - lse)``, which costs as many roundings as the lse is large."""
    assert_all_within_budget(NAMES, actual, [low], exact, GATE_ROUNDINGS + float(lse.abs().max()))


def by_hand(q, k, v, sinks, weight, bias, shift, *, prefix=False):
    """One softmax of all keys, the sink and the adapter's, in which MimIC's take nothing from the others."""
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    scores, v = with_sinks((q @ k.mT * SCALE).masked_fill(~VISIBLE, -torch.inf), v, sinks)
    shares = torch.cat([scores, q @ weight.mT + bias[:, None]], -1).softmax(-1)
    kept = shares[..., : T + 1] if prefix else scores.softmax(-1)
    out = kept @ v + shares[..., T + 1 :] @ shift
    return torch.where(VISIBLE.any(-1, keepdim=True), out, 0.0).transpose(1, 2)


def largest_lse(q, k, sinks, *_):
    k = k.repeat_interleave(H // G, 1)
    return torch.cat([q @ k.mT * SCALE, sinks[:, None, None].expand(B, H, T, 1)], -1).logsumexp(-1)


@impls
@pytest.mark.parametrize("N, prefix", [(1, False), (3, False), (1, True), (3, True)])
def test_an_adapter_beside_sinks(N, prefix, impl):
    """Values and every gradient, the sinks' too; a query that sees no key has none, and 0 for its output."""
    inputs, dout, low, exact = lows_and_exact(functools.partial(by_hand, prefix=prefix), N)
    assert not exact[0][-1, :2].any() and all(x.isfinite().all() for x in exact)

    def attention(q, k, v, sinks, *keys):
        if N == 1:  # MimIC's form
            keys = [x.squeeze(1) for x in keys]
        patched = module(keys, "sdpa", impl=impl, prefix=prefix)
        return attention_forward(patched, q, k, v, VISIBLE, scaling=SCALE, s_aux=sinks)[0]

    actual = sum(gradients(attention, inputs, (dout,)), ())
    assert_same_gradients(actual, low, exact, largest_lse(*inputs[:2], inputs[3]))
    # The adapter's gate has the sink in its lse: one that forgot it would be elsewhere.
    # Without the sink it would be elsewhere.
    none = by_hand(*inputs[:3], torch.full((H,), -torch.inf), *inputs[4:], prefix=prefix)
    assert relative_error(none.where(exact[0] != 0, 0), exact[0]) > 0.1


@impls
def test_without_a_shift_it_is_transformers_own(impl):
    """GPT-OSS's eager attention, whose mask adds the lowest number there is."""
    masks = {
        dtype: torch.zeros(VISIBLE.shape, dtype=dtype).masked_fill(~VISIBLE, torch.finfo(dtype).min)
        for dtype in (torch.float32, torch.float64)
    }

    def own(q, k, v, sinks, *_):
        attention = torch.nn.Module()
        attention.sinks, attention.num_key_value_groups = sinks, H // G
        return eager_attention_forward(attention, q, k, v, masks[q.dtype], scaling=SCALE)[0]

    def patched(q, k, v, sinks, weight, bias, shift):
        still = module((weight.detach(), bias.detach(), torch.zeros_like(shift)), "eager", impl=impl)
        return attention_forward(still, q, k, v, masks[q.dtype], scaling=SCALE, s_aux=sinks)[0]

    inputs, dout, low, exact = lows_and_exact(own, 1)
    actual = sum(gradients(patched, inputs, (dout,)), ())
    assert_same_gradients(actual, low, exact, largest_lse(*inputs[:2], inputs[3]))


@impls
@pytest.mark.parametrize("prefix", [False, True])
def test_sinks_of_minus_infinity_are_none(prefix, impl):
    q, k, v, sinks, *keys = given(2, torch.float64)
    dout = normal(B, T, H, D, dtype=torch.float64, seed=9)

    def attention(*inputs, s_aux=None):
        patched = module(inputs[3:6], "sdpa", impl=impl, prefix=prefix)
        return attention_forward(patched, *inputs[:3], VISIBLE, s_aux=s_aux)[0]

    outs, grads = gradients(
        lambda *x: attention(*x, s_aux=x[6]), (q, k, v, *keys, torch.full_like(sinks, -torch.inf)), (dout,)
    )
    expected = gradients(attention, (q, k, v, *keys), (dout,))
    assert not grads[-1].any()
    lse = (q @ k.repeat_interleave(H // G, 1).mT * SCALE).logsumexp(-1)
    names = [name for name in NAMES if name != "dsinks"]
    roundings = GATE_ROUNDINGS + float(lse.abs().max())
    actual = (*outs, *grads[:-1])
    assert_all_within_budget(names, actual, [sum(expected, ())], sum(expected, ()), roundings)


def test_under_autocast_queries_are_rounded_once():
    q, k, v, sinks, *keys = given(1, torch.float32)
    patched = module(keys, "sdpa", impl="composed")
    low = [x.bfloat16() for x in (q, k, v)]
    expected, _ = attention_forward(patched, *low, None, s_aux=sinks)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = attention_forward(patched, q, k, v, None, s_aux=sinks)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


# GPT-OSS -------------------------------------------------------------------------------------------------


def small():
    return model_of("gpt_oss")


def budget_of(form):
    """Two forms that are each at most twice as far from fp64 as the plain one, ``form(model)``, is."""
    results = []
    for model in (small(), model_in_double("gpt_oss")):
        inputs = tiny_inputs(model)
        with form(model):
            results.append(logits(model, doubled(inputs) if model is not small() else inputs))
    return 4 * relative_error(*results)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_shift_of_zero_changes_nothing(padding):
    model = small()
    adapter = adapter_of(model, "mimic")
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.shift.zero_()
    inputs = tiny_inputs(model, padding=padding)
    plain, (tokens, steps, _) = logits(model, inputs), generated(model, inputs)
    budget = budget_of(lambda model: torch.no_grad())
    with mk.attach(model, adapter):
        assert relative_error(logits(model, inputs), plain) <= budget
        for cache in ({}, {"cache_implementation": "static"}):
            actual_tokens, actual, _ = generated(model, inputs, **cache)
            assert torch.equal(actual_tokens, tokens) and relative_error(actual, steps) <= budget


def concatenated(module, query, key, value, attention_mask, scaling, s_aux, **_):
    """HiFICL as more keys and values, beside the sink and the model's own."""
    own = module.config.published_layer
    K, V = own["key_a"] @ own["key_b"], own["value_a"] @ own["value_b"]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scaling
    scores, value = with_sinks(scores + additive_mask(attention_mask, scores), value, s_aux)
    scores = torch.cat([scores, query @ K.mT * K.shape[-1] ** -0.5], -1)
    out = scores.softmax(-1) @ torch.cat([value, V.expand(len(value), -1, -1, -1)], -2)
    return out.transpose(1, 2).contiguous(), None


def written_out(model, adapter):
    return attending(model, concatenated, adapter.layers)


def hificl_budget():
    return budget_of(lambda model: written_out(model, hificl(model, num_keys=3).to(model.dtype)))


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_hificl(padding):
    model, budget = small(), hificl_budget()
    adapter, inputs = hificl(model, num_keys=3), tiny_inputs(model, padding=padding)
    with written_out(model, adapter):
        expected, (tokens, steps, _) = logits(model, inputs), generated(model, inputs)
    assert relative_error(logits(model, inputs), expected) > 1000 * budget
    with mk.attach(model, adapter):
        assert relative_error(logits(model, inputs), expected) <= budget
        for cache in ({}, {"cache_implementation": "static"}):
            actual_tokens, actual, _ = generated(model, inputs, **cache)
            assert torch.equal(actual_tokens, tokens) and relative_error(actual, steps) <= budget


@pytest.mark.parametrize("cell", [forward, generate, static_cache, detach])
def test_prompt_tuning(cell):
    cell("gpt_oss", "prompt_tuning")


def test_rows_of_several_adapters():
    """Shifts, prefixes of several keys, vectors and none, in one batch; the sinks are everyone's."""
    model, inputs = small(), tiny_inputs(small(), batch=4, padding="left")
    adapters = {"mimic": adapter_of(model, "mimic"), "hificl": hificl(model, num_keys=3)}
    adapters["m2iv"] = adapter_of(model, "m2iv")
    rows = ["hificl", None, ("mimic", "m2iv"), "mimic"]
    seen = inputs["attention_mask"].bool()

    alone, plain = [], whole_logits(model, inputs)
    for names in rows:
        with ExitStack() as stack:
            for name in (names,) if isinstance(names, str) else names or ():
                form = written_out if name == "hificl" else functools.partial(independent, method=name)
                stack.enter_context(form(model, adapter=adapters[name]))
            alone.append(whole_logits(model, inputs))
    budget = max(hificl_budget(), *(logit_budget("gpt_oss", x) for x in ("mimic", "m2iv")))
    with mk.attach(model, adapters) as handle, handle.rows(rows):
        actual = whole_logits(model, inputs)
    for row, expected in enumerate(alone):
        assert relative_error(actual[row][seen[row]], expected[row][seen[row]]) <= budget
        assert row == 1 or relative_error(expected[row], plain[row]) > 1000 * budget


def test_sinks_are_trained_beside_an_adapter():
    """Of all that requires grad in the model: its sinks, through the softmax and through the gate."""
    results = []
    for form, of in ((published, model_in_double), (published, model_of), (mk.attach, model_of)):
        model = of("gpt_oss")
        adapter = adapter_of(model, "mimic").to(model.dtype)
        sinks = [layer.self_attn.sinks.requires_grad_() for layer in model.model.layers]
        with form(model, adapter):
            model(**tiny_inputs(model)).logits.square().mean().backward()
        results.append(torch.cat([x.grad for x in sinks]))
        for x in sinks:
            x.grad = None
            x.requires_grad_(False)
    exact, expected, actual = results
    assert exact.norm() > 0
    assert relative_error(actual, expected) <= 4 * relative_error(expected, exact)


def test_the_official_gate_is_refused():
    model = tiny_model("gpt_oss")
    adapter = mk.create(model, mk.MimICConfig(normalizer="all_keys"))
    with mk.attach(model, adapter), pytest.raises(NotImplementedError, match="s_aux and normalizer"):
        model(**tiny_inputs(model))
