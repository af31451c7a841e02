"""The registered operators under opcheck and torch.compile."""

import functools

import pytest
import torch

from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.ops.shifted_attention.options import Options
from mmicl_kernels.testing.inputs import (
    attention_shift_inputs,
    ints,
    output_gradients,
    shifted_attention_inputs,
)

OPS = torch.ops.mmicl


# Which branch of the operators each takes.
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "q_start": 0},
    "blocks": {"softcap": 2.0, "causal": True},
    "mask": {"mask": torch.ones(2, 1, 13, 17, dtype=torch.bool)},
    "bias": {"mask": torch.zeros(13, 17)[None, None]},
    "bounds": {"kv_start": ints(0, 3), "kv_end": ints(17, 9), "window": 4},
    "ids": {"adapter_ids": ints(1, -1)},
    "all_keys": {"all_keys": True, "causal": True},
    "packed": {
        "cu_seqlens_q": ints(0, 5, 13), "cu_seqlens_k": ints(0, 9, 17),
        "max_seqlen_q": 8, "max_seqlen_k": 9,
    },
}  # fmt: skip


def op_arguments(name, dtype, impl, training=True):
    sizes = {"B": 1 if name == "packed" else 2, "T": 13, "S": 17}
    inputs = shifted_attention_inputs(
        adapters=2 if name == "ids" else None, dtype=dtype, layout="heads_last", **sizes
    )
    return inputs, Options(scale=0.25, training=training, impl=impl, **OPTIONS[name])


# Tracing the backward operators under autograd is left to the compile tests: it is the slow part.
BACKWARD_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(
    ("name", "dtype", "impl"),
    [
        *((name, torch.float32, "composed") for name in OPTIONS),
        ("plain", torch.bfloat16, "composed"),
        ("blocks", torch.bfloat16, "composed"),
        ("causal", torch.float32, "auto"),
    ],
)
def test_opcheck_shifted_attention(name, dtype, impl):
    inputs, options = op_arguments(name, dtype, impl)
    for training in (False, True):
        arguments = (*inputs, *options._replace(training=training))
        torch.library.opcheck(OPS.shifted_attention_fwd, arguments)
    out, lse, gate_lse, lse_low, a = OPS.shifted_attention_fwd(*inputs, *options)
    for dlse, need_dqkv in ((None, True), (torch.ones_like(lse), True), (None, False)):
        saved = (torch.ones_like(out), dlse, a, lse, gate_lse, lse_low, need_dqkv)
        torch.library.opcheck(
            OPS.shifted_attention_bwd, (*saved, *inputs, *options), test_utils=BACKWARD_CHECKS
        )


def results(fn, inputs, douts):
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, leaves, douts[: len(outputs)])


def same_when_compiled(fn, calls, **compile_options):
    """``calls``: inputs and gradients of the outputs, of the first call and of those after it."""
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, **compile_options)
    for inputs, douts in calls:
        for eager, other in zip(*(results(f, inputs, douts) for f in (fn, compiled)), strict=True):
            assert eager.dtype == other.dtype and eager.stride() == other.stride()
            torch.testing.assert_close(other, eager)


def shifted_call(T, adapters=None, seed=0):
    inputs = shifted_attention_inputs(T=T, S=T, adapters=adapters, seed=seed)
    return inputs, output_gradients(*inputs[0].shape, dtype=torch.float32, seed=seed)


COMPILED = {
    "causal": {"causal": True},
    "lse": {"causal": True, "return_lse": True},
    "ids": {"adapter_ids": ints(1, -1), "return_lse": True},
    "bounds": {"kv_start": ints(0, 3), "kv_end": ints(30, 9), "window": 4, "q_start": ints(0, 2)},
    "softcap": {"softcap": 2.0, "q_start": 3, "causal": True},
    "all_keys": {"causal": True, "normalizer": "all_keys"},
}


@pytest.mark.parametrize(
    ("name", "impl"), [*((name, "composed") for name in COMPILED), ("causal", "auto"), ("lse", "auto")]
)
def test_compile_shifted_attention(name, impl):
    """First and second call, then another length: forward, backward and lse, without a graph break."""
    adapters = 2 if name == "ids" else None
    fn = functools.partial(shifted_attention, **COMPILED[name], impl=impl)
    lengths = ((127, 0), (127, 1), (193, 2))
    calls = [shifted_call(T, adapters, seed) for T, seed in lengths]
    same_when_compiled(fn, calls, backend="aot_eager", dynamic=True)


def test_compile_with_a_mask():
    def fn(*x):
        length = x[0].shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril(3)
        return shifted_attention(*x, mask=mask, impl="composed")

    same_when_compiled(fn, [shifted_call(127), shifted_call(193)], backend="aot_eager", dynamic=True)


def test_compile_packed():
    inputs = shifted_attention_inputs(B=1, T=20, S=30)
    douts = output_gradients(*inputs[0].shape, dtype=torch.float32)
    fn = functools.partial(
        shifted_attention, cu_seqlens_q=ints(0, 3, 20), cu_seqlens_k=ints(0, 13, 30),
        max_seqlen_q=17, max_seqlen_k=17, causal=True, impl="composed",
    )  # fmt: skip
    same_when_compiled(fn, [(inputs, douts)] * 2, backend="aot_eager")


def test_compile_attention_shift(composed):
    calls = []
    for T in (127, 127, 193):
        inputs = attention_shift_inputs(T=T)
        calls.append((inputs, (torch.ones_like(inputs[0]),)))
    fn = functools.partial(attention_shift, impl=composed)
    same_when_compiled(fn, calls, backend="aot_eager", dynamic=True)


def test_inductor():
    """The default backend, with work before and after the op."""

    def fn(q, k, v, *parameters):
        return shifted_attention(2 * q, k, v, *parameters, causal=True, impl="composed").tanh()

    same_when_compiled(fn, [shifted_call(127)] * 2)
