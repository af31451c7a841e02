"""Numbers near the ends of their types, and ints that are not Python's."""

import sys

import numpy as np
import pytest
import torch

from mmicl_kernels.ops import (
    alignment_loss,
    attention_shift,
    prefix_splice,
    prefix_splice_,
    residual_shift,
    residual_shift_rms_norm,
    row_projection,
    shifted_attention,
)
from mmicl_kernels.testing.inputs import attention_shift_inputs, normal, shifted_attention_inputs
from tests.ops.triton_process import INTERPRETED

# In the interpreter, which takes minutes.
pytestmark = [pytest.mark.slow] if INTERPRETED else []

FP32, INT64, INT32 = torch.float32, torch.iinfo(torch.int64), torch.iinfo(torch.int32)
T, S = 4, 6


@pytest.fixture
def inputs():
    return shifted_attention_inputs(B=2, H=2, G=1, T=T, S=S, D=8)


def results(inputs, impl, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = shifted_attention(*leaves, **options, return_lse=True, impl=impl)
    return *outputs, *torch.autograd.grad(outputs[0].sum(), leaves)


def assert_same(first, second):
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("start", (-(2**29), -2, 0, 3, 2**29, "rows"))
def test_wide_windows_are_none(start, causal, inputs, impl):
    """From the first int of which no position is so far from a key."""
    start = torch.tensor([-2, INT64.min]) if start == "rows" else start
    options = {"q_start": start, "causal": causal}
    wanted = results(inputs, impl, **options)
    for window in (2**30, 2**31 - 1, 2**31, 2**62, 2**63 - 1, sys.maxsize, 2**63, 2**64, 10**30):
        assert_same(results(inputs, impl, **options, window=window), wanted)


@pytest.mark.parametrize("start", (INT64.min, INT64.min + 3, -(2**40), INT32.min))
@pytest.mark.parametrize("window", (None, 1, 2, 2**30 - 1))
def test_positions_far_left(start, window, inputs, impl):
    """Causal hides every key; without, a window hides none."""
    far = torch.tensor([start, start])
    out, lse, *grads = results(inputs, impl, causal=True, window=window, q_start=far)
    assert not out.any() and (lse == -torch.inf).all() and not any(x.any() for x in grads)
    free = results(inputs, impl, window=window, q_start=far)
    assert_same(free, results(inputs, impl))


@pytest.mark.parametrize("start", (INT64.max, INT64.max - 3, 2**40, INT32.max))
def test_positions_far_right(start, inputs, impl):
    """Causal hides no key; a window that does not reach back hides all."""
    far = torch.tensor([start, start])
    assert_same(results(inputs, impl, causal=True, q_start=far), results(inputs, impl))
    for window in (1, 5, 2**29 - T - S):
        out, *_ = results(inputs, impl, causal=True, window=window, q_start=far)
        assert not out.any()


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"window": 0}, "window is 0"),
        ({"window": -(2**63)}, "window is -9223372036854775808"),
        ({"window": True}, "window is True"),
        ({"window": 2.0}, "window is 2.0"),
        ({"q_start": 2**29 + 1}, "q_start is 536870913"),
        ({"q_start": -(2**63)}, "q_start is -9223372036854775808"),
        ({"q_start": 2**80}, f"q_start is {2**80}"),
        ({"kv_end": torch.tensor([S, INT64.max])}, "kv_end has values from 6 to 9223372036854775807"),
        ({"kv_start": torch.tensor([INT64.min, 0])}, "kv_start has values from -9223372036854775808"),
        ({"kv_end": torch.tensor([S, 2**32])}, "kv_end has values from 6 to 4294967296"),
    ),
)
def test_bounds_out_of_range(options, message, inputs, impl):
    with pytest.raises(ValueError, match=message):
        shifted_attention(*inputs, **options, impl=impl)


@pytest.mark.parametrize("name", ("q_start", "window"))
def test_bools_and_floats_are_no_positions(name, inputs, impl):
    for value in (True, np.bool_(True), 1.0, np.float32(1), torch.tensor(True)):
        with pytest.raises((TypeError, ValueError), match=name):
            shifted_attention(*inputs, **{name: value}, impl=impl)


@pytest.mark.parametrize("kind", (np.int8, np.int32, np.int64, np.uint64))
def test_numpy_ints_are_ints(kind, inputs, impl):
    options = {"causal": True, "q_start": 2, "window": 3}
    numpy = {**options, "q_start": kind(2), "window": kind(3), "scale": np.float32(0.25)}
    assert_same(results(inputs, impl, **numpy), results(inputs, impl, **options, scale=0.25))
    packed = [x[:1] if x.dim() == 4 else x for x in inputs]
    cu = {f"cu_seqlens_{x}": torch.tensor([0, 1, n], dtype=torch.int32) for x, n in (("q", T), ("k", S))}
    assert_same(
        results(packed, impl, **cu, max_seqlen_q=kind(T), max_seqlen_k=kind(S)),
        results(packed, impl, **cu, max_seqlen_q=T, max_seqlen_k=S),
    )
    hidden, weight = normal(2, 3, 8, dtype=FP32), normal(4, 8, dtype=FP32)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    rows = row_projection(hidden, mask, weight, num_rows=kind(4), impl=impl)
    assert torch.equal(rows, row_projection(hidden, mask, weight, num_rows=4, impl=impl))
    splice = spliced(impl, length=kind(9), max_length=kind(8))
    assert torch.equal(splice.embeddings, spliced(impl, length=9, max_length=8).embeddings)


def test_longest_lengths(inputs, impl):
    """No sequence is longer than all rows together, whatever the caller says."""
    packed = [x[:1] if x.dim() == 4 else x for x in inputs]
    cu = {f"cu_seqlens_{x}": torch.tensor([0, 1, n], dtype=torch.int32) for x, n in (("q", T), ("k", S))}
    wanted = results(packed, impl, **cu, max_seqlen_q=T, max_seqlen_k=S)
    for longest in (2**31, 2**40, sys.maxsize, 2**63, 2**100):
        assert_same(results(packed, impl, **cu, max_seqlen_q=longest, max_seqlen_k=longest), wanted)
    with pytest.raises(ValueError, match="max_seqlen_q is True"):
        shifted_attention(*packed, **cu, max_seqlen_q=True, max_seqlen_k=S, impl=impl)


@pytest.mark.parametrize("middle", ((INT32.max,), (INT32.min,), (2**30 + 2**29, -(2**30) - 2**29)))
def test_cu_seqlens_that_wrap(middle, inputs, impl):
    """Each step of the last adds less than 2^31, modulo 2^32."""
    packed = [x[:1] if x.dim() == 4 else x for x in inputs]
    cu = torch.tensor([0, *middle, T], dtype=torch.int32)
    keys = torch.linspace(0, S, len(cu)).int()
    with pytest.raises(ValueError, match="cu_seqlens_q is .* expected a rise from 0 to 4"):
        shifted_attention(
            *packed, cu_seqlens_q=cu, cu_seqlens_k=keys, max_seqlen_q=2**31, max_seqlen_k=S, impl=impl
        )


@pytest.mark.parametrize("bad", (2, -2, INT32.max, INT32.min, 2**32, 2**32 + 1, INT64.max, INT64.min))
def test_adapter_ids_out_of_range(bad, inputs, impl):
    """Cast to 32 bits 2^32 + 1 would be adapter 1."""
    ids = torch.tensor([0, bad])
    stack = [torch.stack((x, x)) for x in inputs[3:]]
    shift = attention_shift_inputs(B=2, H=2, T=T, D=8, adapters=2)
    x, vector, weight = normal(2, 3, 8, dtype=FP32), normal(2, 8, dtype=FP32), normal(8, dtype=FP32)
    calls = (
        lambda: shifted_attention(*inputs[:3], *stack, adapter_ids=ids, impl=impl),
        lambda: attention_shift(*shift, adapter_ids=ids, impl=impl),
        lambda: residual_shift(x, vector, adapter_ids=ids, impl=impl),
        lambda: residual_shift(x, vector, adapter_ids=ids[:, None, None].expand(2, 3, 1), impl=impl),
        lambda: residual_shift_rms_norm(x, x, vector, 1.0, weight, eps=1e-5, adapter_ids=ids, impl=impl),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"adapter_ids has values .*{bad}"):
            call()
    rows = torch.tensor([0, bad if bad != 2 else 6])
    with pytest.raises(ValueError, match="rows has values"):
        row_projection(x, rows, vector, impl=impl)
    with pytest.raises(ValueError, match="rows has values"):
        alignment_loss([x], [vector], rows, impl=impl)


BANK = normal(5, 8, dtype=FP32, seed=1)
DEMOS = {
    "offsets": torch.tensor([0, 2, 5]),
    "demo_ids": torch.tensor([1, 0]),
    "cu_demos": torch.tensor([0, 1, 2]),
}


def spliced(impl, **options):
    return prefix_splice(BANK, **DEMOS, prompt=normal(2, 3, 8, dtype=FP32, seed=2), **options, impl=impl)


@pytest.mark.parametrize("longest", (2**31, 2**62, sys.maxsize, 2**63, 2**100))
def test_no_limit_of_a_packed_request(longest, impl):
    options = {"length": 12, "layout": "packed"}
    wanted = spliced(impl, **options, max_length=12)
    for x, y in zip(spliced(impl, **options, max_length=longest)[:4], wanted[:4], strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="max_length is"):
        spliced(impl, length=9, max_length=longest)


@pytest.mark.parametrize("far", (INT64.max, INT64.max - 1, 2**62, 2**40, INT32.max, -(2**40), INT64.min))
def test_starts_out_of_sight(far, impl):
    """Nothing is written there, and nothing of it reaches the bank's gradient."""
    x = normal(2, 6, 8, dtype=FP32, seed=3)
    bank = BANK.clone().requires_grad_()
    starts = torch.tensor([far, 1])
    out = prefix_splice_(x.clone(), bank, **DEMOS, starts=starts, impl=impl)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1, 1:3], BANK[:2]) and torch.equal(out[1, 3:], x[1, 3:])
    (grad,) = torch.autograd.grad(out.sum(), bank)
    assert torch.equal(grad, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])[:, None].expand(5, 8))


@pytest.mark.parametrize("bad", (INT64.max, INT64.min, 2**32))
def test_bounds_of_a_splice(bad, impl):
    prompt = normal(2, 3, 8, dtype=FP32, seed=2)
    for name, changed in (
        ("offsets", torch.tensor([0, 2, bad])),
        ("demo_ids", torch.tensor([1, bad])),
        ("cu_demos", torch.tensor([0, 1, bad])),
        ("prompt_end", torch.tensor([3, bad])),
    ):
        arguments = {**DEMOS, name: changed}
        with pytest.raises(ValueError, match=name):
            prefix_splice(BANK, prompt=prompt, **arguments, length=9, impl=impl)
