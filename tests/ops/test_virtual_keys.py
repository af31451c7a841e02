"""What N virtual keys are the same as: keys and values before the others, sinks, and one key by itself."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from mmicl_kernels import _extension
from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.testing.budgets import assert_all_within_budget, gradients
from mmicl_kernels.testing.inputs import attention_shift_inputs, normal, shifted_attention_inputs

IMPLS = ("reference", "composed")
NAMES = ("out", "dq", "dk", "dv", "dweight", "dbias", "dshift")
impls = pytest.mark.parametrize("impl", IMPLS)


def given(P=4, N=5, dtype=torch.float64, **sizes):
    return shifted_attention_inputs(virtual=(P, N), dtype=dtype, **sizes)


def softmax_attention(scores, values):
    return torch.softmax(scores, -1) @ values


def causal(scores):
    T, S = scores.shape[-2:]
    return scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf)


def repeated(x, H):
    return x.repeat_interleave(H // x.shape[-3], dim=-3)


def concatenated(q, k, v, weight, bias, shift):
    """Attention over N keys and values more, which have no positions."""
    H = q.shape[1]
    k, v, weight, shift = (repeated(x, H) for x in (k, v, weight, shift))
    bias = bias.repeat_interleave(H // bias.shape[0], 0)
    scores = causal(q @ k.mT * q.shape[-1] ** -0.5)
    virtual = q @ weight.mT + bias[:, None]
    return softmax_attention(
        torch.cat((virtual, scores), -1), torch.cat((shift.expand(len(v), -1, -1, -1), v), -2)
    )


@impls
@pytest.mark.parametrize("P", (1, 2, 4))
def test_a_prefix_is_more_keys_and_values(P, impl):
    inputs = given(P)
    dout = normal(*inputs[0].shape, dtype=torch.float64, seed=9)
    expected = gradients(concatenated, inputs, (dout,))
    actual = gradients(lambda *x: shifted_attention(*x, causal=True, prefix=True, impl=impl), inputs, (dout,))
    assert_all_within_budget(NAMES, sum(actual, ()), [sum(expected, ())], sum(expected, ()), 64)


@impls
def test_a_prefix_is_a_merge_of_two_attentions(impl):
    q, k, v, weight, bias, shift = given()
    out, lse = shifted_attention(q, k, v, weight, torch.full_like(bias, -torch.inf), shift, return_lse=True)
    logits = q @ weight.mT + bias[:, None]
    virtual_lse, virtual = torch.logsumexp(logits, -1), softmax_attention(logits, shift)
    total = torch.logaddexp(lse, virtual_lse)
    merged = (lse - total).exp()[..., None] * out + (virtual_lse - total).exp()[..., None] * virtual
    actual = shifted_attention(q, k, v, weight, bias, shift, prefix=True, impl=impl)
    assert_all_within_budget(NAMES[:1], (actual,), [(merged,)], (merged,), 64)


class Sinks(torch.nn.Module):
    def __init__(self, sinks, groups):
        super().__init__()
        self.sinks, self.num_key_value_groups = sinks, groups


@impls
def test_a_sink_is_a_prefix_without_weight_and_value(impl):
    """Of gpt-oss, as transformers has it."""
    q, k, v, weight, sinks, shift = shifted_attention_inputs(dtype=torch.float64)
    mask = causal(torch.zeros(q.shape[2], k.shape[2], dtype=torch.float64))
    module = Sinks(sinks, q.shape[1] // k.shape[1])
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5)
    zeros = torch.zeros_like(weight)
    actual = shifted_attention(q, k, v, zeros, sinks, zeros, causal=True, prefix=True, impl=impl)
    expected = expected.transpose(1, 2)
    assert_all_within_budget(NAMES[:1], (actual,), [(expected,)], (expected,), 64)


@impls
def test_hificl_as_its_authors_wrote_it(impl):
    """``Z2 / (Z1 + Z2) SA(q, K, V) + sum_n exp(t_n) / (Z1 + Z2) V_n`` (arXiv 2603.12760), all keys in Z2."""
    q, k, v, K, _, V = given(N=8)
    scale = q.shape[-1] ** -0.5
    scores, t = q @ repeated(k, 4).mT * scale, q @ K.mT * scale
    z1, z2 = t.exp().sum(-1, keepdim=True), scores.exp().sum(-1, keepdim=True)
    own = softmax_attention(causal(scores), repeated(v, 4))
    expected = z2 / (z1 + z2) * own + t.exp() / (z1 + z2) @ V
    zeros = torch.zeros(K.shape[:-1], dtype=K.dtype)
    actual = shifted_attention(
        q, k, v, K * scale, zeros, V, causal=True, prefix=True, normalizer="all_keys", impl=impl
    )
    assert_all_within_budget(NAMES[:1], (actual,), [(expected,)], (expected,), 64)


@impls
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_one_key_in_either_form(dtype, impl):
    q, k, v, weight, bias, shift = shifted_attention_inputs(dtype=dtype)
    keys = weight[:, None], bias[:, None], shift[:, None]
    dout = normal(*q.shape, dtype=dtype, seed=9)
    one, several = (
        gradients(lambda *x: shifted_attention(*x, causal=True, impl=impl), (q, k, v, *parameters), (dout,))
        for parameters in ((weight, bias, shift), keys)
    )
    assert torch.equal(one[0][0], several[0][0])
    assert all(torch.equal(x.reshape(y.shape), y) for x, y in zip(one[1], several[1], strict=True))


@impls
@pytest.mark.parametrize("prefix", (False, True))
def test_keys_with_a_bias_of_minus_infinity_are_none(prefix, impl):
    """So that slots of fewer keys stand beside others."""
    inputs = given(N=3)
    weight, shift = (torch.cat((x, x.roll(1, -1)), 1) for x in (inputs[3], inputs[5]))
    bias = torch.cat((inputs[4], torch.full_like(inputs[4], -torch.inf)), 1)
    dout = normal(*inputs[0].shape, dtype=torch.float64, seed=9)

    def run(weight, bias, shift):
        call = gradients(
            lambda *x: shifted_attention(*x, prefix=prefix, causal=True, impl=impl),
            (*inputs[:3], weight, bias, shift),
            (dout,),
        )
        return sum(call, ())

    fewer, padded = run(*inputs[3:]), run(weight, bias, shift)
    cut = (*padded[:4], *(x[:, :3] for x in padded[4:]))
    assert_all_within_budget(NAMES, cut, [fewer], fewer, 64)
    assert not any(x[:, 3:].any() for x in padded[4:])
    none = shifted_attention(*inputs[:4], torch.full_like(inputs[4], -torch.inf), inputs[5], prefix=prefix)
    assert torch.equal(none, shifted_attention(*inputs[:3], *(0 * x for x in inputs[3:]), causal=False))


@impls
def test_an_adapter_of_each_query_is_that_of_its_row(impl):
    q, k, v, *parameters = given(B=3, T=9, adapters=2)
    prefix = torch.tensor([True, False])
    rows = torch.tensor([1, -1, 0])
    each = rows[:, None].expand(3, 9)
    dout = normal(*q.shape, dtype=torch.float64, seed=9)
    calls = [
        gradients(
            lambda *x, ids=ids: shifted_attention(*x, adapter_ids=ids, prefix=prefix, impl=impl),
            (q, k, v, *parameters),
            (dout,),
        )
        for ids in (rows, each)
    ]
    expected, actual = (sum(call, ()) for call in calls)
    assert_all_within_budget(NAMES, actual, [expected], expected, 64)


@impls
def test_queries_without_an_adapter_are_those_of_plain_attention(impl):
    q, k, v, *parameters = given(B=2, T=9, adapters=2)
    ids = torch.tensor([[0, -1] * 4 + [1], [-1] * 9])
    plain = shifted_attention(q, k, v, *parameters, adapter_ids=torch.full_like(ids, -1), impl=impl)
    some = shifted_attention(q, k, v, *parameters, adapter_ids=ids, impl=impl)
    same = (some == plain).all(-1).all(1)
    assert torch.equal(same, ids == -1)


def test_attention_shift_of_a_prefix_gives_the_kept_part_its_gradient():
    q, k, v, weight, bias, shift = given()
    out, lse = (x.detach() for x in shifted_attention(q, k, v, weight, bias - 1e4, shift, return_lse=True))
    dout = normal(*q.shape, dtype=torch.float64, seed=9)

    def formula(out, lse, q, weight, bias, shift):
        logits = torch.cat((q @ weight.mT + bias[:, None], lse[..., None]), -1)
        p = torch.softmax(logits, -1)
        return p[..., -1:] * out + p[..., :-1] @ shift

    inputs = out, lse, q, weight, bias, shift
    expected = sum(gradients(formula, inputs, (dout,)), ())
    actual = sum(gradients(lambda *x: attention_shift(*x, prefix=True), inputs, (dout,)), ())
    names = ("out", "dout", "dlse", "dq", "dweight", "dbias", "dshift")
    assert_all_within_budget(names, actual, [expected], expected, 64)


def gate_before(impl, q, weight, bias, lse):
    """``mu`` of the op that had one key and no other form, as its implementations wrote it."""
    if impl == "reference":
        logit = (q * weight[:, :, None]).sum(-1) + bias[:, :, None]
        return torch.nn.functional.logsigmoid(logit - lse).exp()
    return torch.sigmoid(torch.einsum("bhtd,bhd->bht", q, weight) + bias[:, :, None] - lse)


@impls
@pytest.mark.parametrize("ids", (None, (1, -1), (0, 1)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_one_key_is_the_op_that_had_one(dtype, ids, impl, monkeypatch):
    """Bit for bit, with the reference's gradients too."""
    monkeypatch.setattr(_extension, "load", lambda: False)
    out, lse, q, *parameters = attention_shift_inputs(dtype=dtype, adapters=None if ids is None else 2)
    lse[0, 0, 3] = -torch.inf
    dout = normal(*out.shape, dtype=dtype, seed=9)
    which = ids and torch.tensor(ids, dtype=torch.int32)

    def before(out, lse, q, weight, bias, shift):
        active = ~torch.isinf(lse)
        rows = [x[None] if ids is None else x[list(ids)] for x in (weight, bias, shift)]
        if ids is not None:
            active = active & (which >= 0)[:, None, None]
        mu = gate_before(impl, q.to(lse.dtype), *rows[:2], lse.masked_fill(~active, 0.0))
        shifted = out.to(lse.dtype) + mu[..., None] * rows[2][:, :, None]
        return torch.where(active[..., None], shifted.to(out.dtype), out)

    def now(*inputs):
        return attention_shift(*inputs, adapter_ids=which, impl=impl)

    inputs = (out, lse, q, *parameters)
    first, second = (gradients(f, inputs, (dout,)) for f in (before, now))
    assert torch.equal(first[0][0], second[0][0])
    if impl == "reference":
        assert all(torch.equal(x, y) for x, y in zip(first[1], second[1], strict=True))
