"""Shifts up to ten thousand times as large as the values, gates from nearly shut to nearly open.

The gradient that reaches q and k through the gate vanishes as mu goes to 1, while out grows with the shift:
whatever is rounded at the size of out in between is lost to it.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.ops.shifted_attention._triton import launch
from mmicl_kernels.testing.budgets import (
    GATE_ROUNDINGS,
    assert_within_budget,
    eager_attention_shift,
    eager_shifted_attention,
    gradients,
    unit_roundoff,
)
from mmicl_kernels.testing.inputs import ints, normal
from tests.ops.triton_process import INTERPRETED, slow_if_interpreted

# The interpreter rounds bf16 towards zero.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("dq", "dk", "dv", "dweight", "dbias", "dshift")


@dataclass(frozen=True)
class Case:
    """Sizes, options, the size of q, and the loss: a random dout, the sum, or the sum of one channel."""

    T: int = 33
    S: int = 33
    G: int = 2
    options: tuple = (("causal", True),)
    q_size: float = 1.0
    loss: str = "random"

    def call(self, ratio, bias, dtype):
        options = dict(self.options)
        B = 1 if "cu_seqlens_q" in options else 2
        q = (normal(B, 4, self.T, 32, dtype=torch.float32, seed=1) * self.q_size).to(dtype)
        k, v = (normal(B, self.G, self.S, 32, dtype=dtype, seed=i) for i in (2, 3))
        weight, shift = (normal(4, 32, dtype=torch.float32, seed=i) for i in (4, 5))
        dout = normal(*q.shape, dtype=dtype, seed=6)
        if self.loss != "random":
            dout = torch.ones_like(dout)
        if self.loss == "channel":
            dout[..., 1:] = 0
        return [q, k, v, 0.1 * weight, torch.full((4,), bias), ratio * shift], dout, options


CASES = {
    "causal": Case(),
    "all": Case(options=(), G=4),
    "gqa": Case(G=1),
    "window": Case(options=(("causal", True), ("window", 3))),
    "few_keys": Case(S=3, options=()),
    "left_padding": Case(options=(("causal", True), ("kv_start", ints(0, 20)))),
    "mask": Case(options=(("mask", normal(2, 1, 33, 33, dtype=torch.float32) > -0.4),)),
    "softcap": Case(options=(("causal", True), ("softcap", 5.0))),
    "all_keys": Case(options=(("causal", True), ("normalizer", "all_keys"))),
    "packed": Case(
        options=(
            ("causal", True), ("cu_seqlens_q", ints(0, 13, 33)), ("cu_seqlens_k", ints(0, 13, 33)),
            ("max_seqlen_q", 20), ("max_seqlen_k", 20),
        )
    ),
    "decode": Case(T=1, S=100, options=()),
    "sum": Case(loss="sum"),
    "channel": Case(loss="channel"),
}  # fmt: skip
# Against lse of about 4: mu is 0.02, 0.5, 0.99 and 0.9999.
BIASES = (0.0, 4.0, 9.0, 14.0)


def run(fn, inputs, dout):
    return gradients(lambda *x: (fn(*x),), inputs, [dout])[1]


def compare(case, ratio, bias, dtype, impl, bound=None):
    """Gradients within their budget; with ``bound`` those of q, k and v, and dq and dk may err by it too."""
    inputs, dout, options = case.call(ratio, bias, dtype)
    actual = run(lambda *x: shifted_attention(*x, **options, impl=impl), inputs, dout)
    (_, lse), low = gradients(lambda *x: eager_shifted_attention(*x, **options), inputs, [dout, None])
    lse = float(lse.where(torch.isfinite(lse), 0.0).abs().max())
    wide = [x.double() for x in inputs]
    exact = run(lambda *x: shifted_attention(*x, **options, impl="reference"), wide, dout.double())
    for i, name in enumerate(NAMES if bound is None else NAMES[:3]):
        if not torch.isfinite(low[i]).all():
            continue  # fp16 overflows in the eager form: no budget
        grad = actual[i]
        if bound is not None and i < 2:
            wanted, allowed = exact[i], bound(i, *inputs[:3], dout)
            grad = wanted + (grad - wanted).sign() * ((grad - wanted).abs() - allowed).clamp(min=0)
            grad = grad.to(actual[i].dtype)
        roundings = GATE_ROUNDINGS + bias + lse  # what exp of each loses
        assert_within_budget(f"{name}, |shift| = {ratio}, bias {bias}", grad, low[i], exact[i], roundings)


RATIOS = (1, 1e4) if INTERPRETED else (1, 100, 1e4)
QUICK = ("few_keys",)  # in the interpreter


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if INTERPRETED and (dtype != DTYPES[0] or name not in QUICK) else [],
        )
        for name in CASES
        for dtype in DTYPES
    ],
)  # fmt: skip
def test_gradients(name, dtype, impl):
    for ratio in (1, 1e4) if INTERPRETED else (1, 10, 100, 1000, 1e4):
        for bias in BIASES[-1:] if INTERPRETED else BIASES:
            compare(CASES[name], ratio, bias, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize("parts", (1, 3))
def test_decode_split(parts, dtype, impl, monkeypatch):
    """The attention output that the backward needs comes from the combine of a split, too."""
    monkeypatch.setattr(launch, "splits", lambda *_: parts)
    for ratio in (1, 1e4):
        compare(CASES["decode"], ratio, 14.0, dtype, impl)


def of_delta(u):
    """Bounds of dq and dk where delta is off by ``u sum |dout v|``, |v| the largest: P sums to 1 over keys.

    For as many key heads as query heads.
    """

    def bound(i, q, k, v, dout):
        q, k, v, dout = (x.double().abs() for x in (q, k, v, dout))
        delta = q.shape[-1] ** -0.5 * u * (dout * v.amax(2, keepdim=True)).sum(-1, keepdim=True)
        return delta * k.amax(2, keepdim=True) if i == 0 else (delta * q).sum(2, keepdim=True)

    return bound


@slow_if_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_visible_key(dtype, impl):
    """The softmax's gradient is 0 and dg all that is left: delta and ``dout . v`` cancel but for dg.

    Each is a sum of D products in the accumulation dtype, which the eager form does not lose: it keeps dg
    apart. Rounding to q's dtype has a part in it only where dout has a single column, so that no other can
    carry what rounding took from delta.
    """
    window = (("causal", True), ("window", 1))
    for T, options, loss in (
        (33, window, "random"),
        (33, window, "sum"),
        (33, window, "channel"),
        (5, (), "random"),
    ):
        case = Case(T=T, S=T if options else 1, G=4, options=options, loss=loss)
        for ratio in RATIOS:
            for bias in (14.0,) if INTERPRETED else (0.0, 9.0, 14.0):
                u = unit_roundoff(torch.promote_types(dtype, torch.float32))
                bound = of_delta(2 * 32 * u + (unit_roundoff(dtype) if loss == "channel" else 0))
                compare(case, ratio, bias, dtype, impl, bound)


@slow_if_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_softmax(dtype, impl):
    """Where one key has nearly all of the softmax, ds is what is left of ``dout . v - dout . a``.

    The eager form takes it from fp32 probabilities; here, as in every FlashAttention, a was rounded to q's
    dtype: an error of ``u sum |dout a|`` in delta, and ``|a|`` is at most the largest ``|v|``.
    """
    for size in (6.0, 40.0):
        case = Case(options=(), G=4, q_size=size)
        for ratio in RATIOS:
            for bias in (9.0,) if INTERPRETED else (0.0, 9.0):
                u = unit_roundoff(dtype)
                bound = of_delta(u)
                compare(case, ratio, bias, dtype, impl, bound)


@pytest.mark.parametrize("size", (1e-6, 3e5))
def test_a_gradient_of_lse_that_fp16_lacks(size, impl):
    """``ds = P dlse``, which fp16 has where P is small, or not at all."""
    inputs, dout, _ = Case(T=5, S=100, G=4, options=()).call(1, 4.0, torch.float16)
    dlse = size * normal(2, 4, 5, dtype=torch.float32, seed=7)

    def run(fn, inputs, *douts):
        return gradients(fn, inputs, douts)[1]

    def call(*x, impl=impl):
        return shifted_attention(*x, return_lse=True, impl=impl)

    zero = torch.zeros_like(dout)
    actual, low = run(call, inputs, zero, dlse), run(eager_shifted_attention, inputs, zero, dlse)
    wide = [x.double() for x in inputs]
    exact = run(lambda *x: call(*x, impl="reference"), wide, zero.double(), dlse.double())
    for i, name in enumerate(NAMES[:2]):
        assert torch.isfinite(low[i]).all()
        assert_within_budget(name, actual[i], low[i], exact[i], 2 * GATE_ROUNDINGS)


@slow_if_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_shift(dtype, impl):
    """Its lse has a gradient of its own, which vanishes in the same way."""
    out, q = (normal(2, 4, 33, 32, dtype=dtype, seed=i) for i in (1, 2))
    lse = normal(2, 4, 33, dtype=torch.float32, seed=3)
    weight, shift = (normal(4, 32, dtype=torch.float32, seed=i) for i in (4, 5))
    dout = normal(2, 4, 33, 32, dtype=dtype, seed=6)
    for ratio in (1, 100, 1e4):
        for bias in (0.0, 9.0, 14.0, 40.0):
            inputs = [out, lse, q, 0.1 * weight, torch.full((4,), bias), ratio * shift]
            actual = run(lambda *x: attention_shift(*x, impl=impl), inputs, dout)
            low = run(eager_attention_shift, inputs, dout)
            wide = [x.double() for x in inputs]
            exact = run(lambda *x: attention_shift(*x, impl="reference"), wide, dout.double())
            for name, a, b, c in zip(
                ("dout", "dlse", *NAMES[:1], *NAMES[3:]), actual, low, exact, strict=True
            ):
                if torch.isfinite(b).all():
                    assert_within_budget(f"{name}, {ratio}, {bias}", a, b, c, GATE_ROUNDINGS + bias + 8)


@pytest.mark.parametrize("bias", (20.0, 40.0, 80.0))
def test_the_reference_keeps_what_is_left_of_one(bias, impl):
    """``1 - mu`` is e^-bias: in fp64 a difference of 1 and mu would lose it from 37 on."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    out, q = torch.zeros(1, 1, 1, 4, dtype=dtype), torch.zeros(1, 1, 1, 4, dtype=dtype)
    lse = torch.zeros(1, 1, 1, dtype=dtype, requires_grad=True)
    weight, shift = torch.zeros(1, 4, dtype=dtype), torch.ones(1, 4, dtype=dtype)
    gate = torch.full((1,), bias, dtype=dtype)
    shifted = attention_shift(out, lse, q, weight, gate, shift, impl=impl)
    (dlse,) = torch.autograd.grad(shifted.sum(), lse)
    exact = -4 * math.exp(-bias) / (1 + math.exp(-bias)) ** 2
    assert abs(dlse.item() / exact - 1) < (bias + 8) * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", ({}, {"normalizer": "all_keys"}, {"softcap": 3.0}), ids=str)
def test_bytes_kept_for_the_backward(options, operator):
    """Beside the inputs what FlashAttention keeps: one tensor like out, one number per row for each lse."""
    inputs = [x.requires_grad_() for x in CASES["causal"].call(10, 9.0, DTYPES[0])[0]]
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = shifted_attention(*inputs, causal=True, **options, impl=operator)
    for x in inputs:
        kept.pop(x.data_ptr(), None)
    rows = out.numel() // out.shape[-1]
    assert sum(kept.values()) == out.numel() * out.element_size() + 4 * rows * (1 + ("normalizer" in options))
    assert out.data_ptr() not in kept
