"""Tensors without values, and one tensor in several places of a call: what a compiler hands to the ops."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
from mmicl_kernels.testing.inputs import ints, normal, token_ids

FP32 = torch.float32


CU, LONG_CU, ROWS, MASK = ints(0, 2, 5), ints(0, 1, 2).long(), ints(2, 5), torch.ones(5, dtype=torch.bool)
OFFSETS, IDS, TOKEN_IDS = ints(0, 2, 8), ints(1, 0), token_ids(2, 5, 2, adapters=2)
PACKED = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 3, "max_seqlen_k": 3}


def splice(p, bank, impl):
    return prefix_splice(
        bank, OFFSETS, IDS, LONG_CU, p, prompt_start=IDS * 0, prompt_end=IDS, length=20, impl=impl
    )[:4]


def packed_splice(p, bank, impl):
    arguments = {"length": 20, "layout": "packed", "cu_prompt": LONG_CU, "labels": LONG_CU[None, :2]}
    return prefix_splice(bank, OFFSETS, IDS, LONG_CU, p[:1, :2], **arguments, impl=impl)


def place(x, bank, impl):
    return prefix_splice_(x * 2, bank, OFFSETS, IDS, LONG_CU, LONG_CU[:2], impl=impl)


def rows(x, w, impl, **options):
    return row_projection(x, ints(1, 2, -1), w, w[0], norm_weight=w[1], norm_bias=w[1], impl=impl, **options)


def aligned(x, w, impl):
    """A layer twice, its targets too, and rows."""
    y = w.detach()[:4]
    return alignment_loss((x, x, x * 2), (y, y, y * 3), ints(1, 2, -1, 1), impl=impl)


# Sizes of fresh leaves, and a call in which some are given twice, integers too.
Q, W, H, X, V = (2, 4, 5, 8), (4, 8), (4,), (2, 5, 8), (8,)
STACK = (3, 4, 8)
CALLS = {
    "q, k, v": ((Q, W, H, W), lambda x, w, b, s, impl: shifted_attention(x, x, x, w, b, s, impl=impl)),
    "k, v": ((Q, Q, W, H, W), lambda q, k, w, b, s, impl: shifted_attention(q, k, k, w, b, s, impl=impl)),
    "weight, shift": (
        (Q, Q, W, H), lambda q, k, w, b, impl: shifted_attention(
            q, k, k, w, b, w, causal=True, return_lse=True, impl=impl)),
    "all_keys": (
        (Q, W, H), lambda x, w, b, impl: shifted_attention(
            x, x, x, w, b, w, causal=True, normalizer="all_keys", window=2, impl=impl)),
    "bounds": (
        (Q, Q, W, H), lambda q, k, w, b, impl: shifted_attention(
            q, k, q, w, b, w, kv_start=ROWS - 2, kv_end=ROWS, q_start=ROWS, causal=True, impl=impl)),
    "cu_seqlens": (
        ((1, *Q[1:]), W, H), lambda x, w, b, impl: shifted_attention(x, x, x, w, b, w, **PACKED, impl=impl)),
    "ids": (
        (Q, STACK, (3, 4)), lambda x, w, b, impl: shifted_attention(
            x, x, x, w, b, w, adapter_ids=IDS, kv_end=ROWS, mask=MASK, impl=impl)),
    "attention_shift": (
        (Q, Q[:3], STACK, (3, 4)),
        lambda x, lse, w, b, impl: attention_shift(x, lse, x, w, b, w, adapter_ids=IDS, impl=impl)),
    "x, residual": (
        (X, V), lambda x, v, impl: residual_shift_rms_norm(x, x, v, 0.5, v, eps=1e-5, impl=impl)),
    "residual_shift": (
        (X, (2, 8)), lambda x, v, impl: residual_shift(
            x, v, v[:, 0], adapter_ids=IDS, strengths=v[:, 0], preserve_norm=True, impl=impl)),
    "strengths of tokens": (
        (X, (2, 8)), lambda x, v, impl: residual_shift(
            x, v, v[:, 0], adapter_ids=TOKEN_IDS, strengths=x[..., :2], preserve_norm=True, impl=impl)),
    "vectors of rows": (
        (X, (2, 8)), lambda x, v, impl: residual_shift_rms_norm(x, x, v, v[:, 0], v[0], eps=1e-5, impl=impl)),
    "scale, strengths": (
        (X, (2, 8), (2,)), lambda x, v, s, impl: residual_shift(
            x, v, s, adapter_ids=IDS, strengths=s, impl=impl)),
    "norm's weight and bias": ((X, (8, 8)), rows),
    "layers": ((X, (8, 8)), aligned),
    "weight thrice": (
        (X, (8, 8), V), lambda x, w, b, impl: row_projection(
            x, ints(1, 2), w, b, norm_weight=b, norm_bias=b, impl=impl)),
    "splice": (((2, 4, 8), (8, 8)), splice),
    "packed splice": (((2, 4, 8), (8, 8)), packed_splice),
    "place": (((2, 9, 8), (8, 8)), place),
}  # fmt: skip
READ_ON_THE_HOST = ("cu_seqlens", "splice", "packed splice", "place")  # by the reference


def leaves_of(sizes):
    return [normal(*size, dtype=FP32, seed=i).requires_grad_() for i, size in enumerate(sizes)]


def tensors(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def with_grads(call, leaves):
    outputs = tensors(call(*leaves))
    loss = sum(y.square().sum() for y in outputs if y.requires_grad)
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", CALLS)
def test_compiled(name):
    """In one graph; a gradient is the sum over the places."""
    sizes, call = CALLS[name]
    leaves = leaves_of(sizes)
    torch.compiler.reset()

    def once(*x):
        return call(*x, impl="composed")

    compiled = torch.compile(once, fullgraph=True, backend="aot_eager")
    expected, actual = with_grads(once, leaves), with_grads(compiled, leaves)
    for x, y in zip(expected, actual, strict=True):
        torch.testing.assert_close(y, x)


@pytest.mark.parametrize("name", CALLS)
def test_fake(name, impl):
    """Nothing is read: ids, bounds and lengths have no values, in a FakeTensorMode or out of it."""
    if impl == "reference" and name in READ_ON_THE_HOST:
        pytest.skip("it is read on the host")
    sizes, call = CALLS[name]
    expected = with_grads(lambda *x: call(*x, impl=impl), leaves_of(sizes))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(x) for x in leaves_of(sizes)]
    with mode:
        actual = with_grads(lambda *x: call(*x, impl=impl), fake)
    for x, y in zip(expected, actual, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("inside", (True, False), ids=("inside", "outside"))
def test_fake_integers(inside, impl):
    """All integers are fake, too; tensors that the reference makes are so inside of the mode alone."""
    if impl == "reference" and not inside:
        pytest.skip("it makes tensors")
    mode = FakeTensorMode()
    (q,), (weight, bias) = (
        [mode.from_tensor(normal(*size, dtype=FP32)) for size in sizes] for sizes in ((Q,), (STACK, (3, 4)))
    )
    start, end, ids, cu = (mode.from_tensor(x) for x in (ROWS - 2, ROWS, IDS, CU))
    x, vector = mode.from_tensor(normal(*X, dtype=FP32)), mode.from_tensor(normal(3, 8, dtype=FP32))

    def run():
        parameters, options = (weight, bias, weight), {"adapter_ids": ids, "impl": impl}
        yield shifted_attention(q, q, q, *parameters, kv_start=start, kv_end=end, q_start=start, **options)
        yield attention_shift(q, q[..., 0], q, *parameters, **options)
        yield residual_shift(x, vector, **options)
        tokens = {**options, "adapter_ids": ids[:, None, None].expand(2, 5, 1)}
        yield residual_shift(x, vector, strengths=x[..., :1], preserve_norm=True, **tokens)
        yield residual_shift_rms_norm(x, x, vector, 1.0, vector[0], eps=1e-5, **options)[0]
        yield row_projection(x, ids, vector, impl=impl)
        yield alignment_loss((x, x), (vector[:2], vector[1:]), ids, impl=impl)[None]
        if impl != "reference":
            lengths = {**PACKED, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
            yield shifted_attention(q[:1], q[:1], q[:1], *parameters, **lengths, **options)
            yield prefix_splice(x[0], cu, ids, start.new_empty(3), x, length=9, prompt_end=end, impl=impl)[0]

    if inside:
        with mode:
            outputs = list(run())
    else:
        outputs = list(run())
    assert [y.shape[-1] for y in outputs] == ([8] * 5 + [3, 1] + [8] * 2)[: len(outputs)]
