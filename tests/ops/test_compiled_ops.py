"""The registered operators under opcheck and torch.compile, and their CUDA branches as fake tensors."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.ops.attention_shift._composed import accumulation_dtype
from mmicl_kernels.ops.shifted_attention import _stock
from mmicl_kernels.ops.shifted_attention._composed import Options
from mmicl_kernels.testing.inputs import (
    attention_shift_inputs,
    output_gradients,
    shifted_attention_inputs,
)

OPS = torch.ops.mmicl


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Which branch of the operators each takes.
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "q_start": 0},
    "blocks": {"softcap": 2.0, "causal": True},
    "mask": {"mask": torch.ones(2, 1, 13, 17, dtype=torch.bool)},
    "bounds": {"kv_start": ints(0, 3), "kv_end": ints(17, 9), "window": 4},
    "ids": {"adapter_ids": ints(1, -1)},
    "all_keys": {"all_keys": True, "causal": True},
    "packed": {"cu_seqlens_q": ints(0, 5, 13), "cu_seqlens_k": ints(0, 9, 17)},
}


def op_arguments(name, dtype):
    sizes = {"B": 1 if name == "packed" else 2, "T": 13, "S": 17}
    inputs = shifted_attention_inputs(
        adapters=2 if name == "ids" else None, dtype=dtype, layout="heads_last", **sizes
    )
    defaults = dict.fromkeys(Options._fields) | {"scale": 0.25, "causal": False, "all_keys": False}
    return inputs, Options(**{**defaults, **OPTIONS[name]})


# Tracing the backward operators under autograd is left to the compile tests: it is the slow part.
BACKWARD_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIONS), ("plain", torch.bfloat16), ("blocks", torch.bfloat16)],
)
def test_opcheck_shifted_attention(name, dtype):
    inputs, options = op_arguments(name, dtype)
    torch.library.opcheck(OPS.shifted_attention_fwd, (*inputs, *options))
    out, lse, gate_lse = OPS.shifted_attention_fwd(*inputs, *options)
    for dlse, need_dqkv in ((None, True), (torch.ones_like(lse), True), (None, False)):
        saved = (torch.ones_like(out), dlse, out, lse, gate_lse, need_dqkv)
        torch.library.opcheck(
            OPS.shifted_attention_bwd, (*saved, *inputs, *options), test_utils=BACKWARD_CHECKS
        )


@pytest.mark.parametrize("ids", (None, ints(1, -1)), ids=("shared", "ids"))
def test_opcheck_attention_shift(ids, composed):
    adapters = None if ids is None else 2
    inputs = attention_shift_inputs(adapters=adapters, dtype=torch.bfloat16, layout="heads_last")
    torch.library.opcheck(OPS.attention_shift_fwd, (*inputs, ids, "composed"))
    dout = torch.ones_like(inputs[0])
    torch.library.opcheck(
        OPS.attention_shift_bwd, (dout, *inputs[1:], ids, "composed"), test_utils=BACKWARD_CHECKS
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
        compared = zip(results(fn, inputs, douts), results(compiled, inputs, douts), strict=True)
        for eager, other in compared:
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


@pytest.mark.parametrize("name", COMPILED)
def test_compile_shifted_attention(name):
    """First and second call, then another length: forward, backward and lse, without a graph break."""
    adapters = 2 if name == "ids" else None
    fn = functools.partial(shifted_attention, **COMPILED[name], impl="composed")
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


# ---- CUDA branches, without a device ----

CUDA = {
    "cudnn": (_stock._cudnn_fwd, _stock._cudnn_bwd, torch.bfloat16),
    "flash": (_stock._flash_fwd, _stock._flash_bwd, torch.bfloat16),
    "efficient": (_stock._efficient_fwd, _stock._efficient_bwd, torch.float32),
    "efficient_half": (_stock._efficient_fwd, _stock._efficient_bwd, torch.float16),
}


@pytest.mark.parametrize(
    ("name", "with_bias"),
    [(name, bias) for name in CUDA for bias in (False, True) if (name, bias) != ("flash", True)],
)
def test_cuda_branches_type_check(name, with_bias):
    """Schemas, shapes and dtypes through PyTorch's own meta kernels; values need a GPU."""
    fwd, bwd, dtype = CUDA[name]
    q = torch.empty(2, 4, 37, 64, device="meta", dtype=dtype)
    k = torch.empty(2, 2, 41, 64, device="meta", dtype=dtype)
    bias = torch.empty(2, 1, 37, 37, device="meta", dtype=dtype) if with_bias else None
    kernel = _stock.StockAttention(fwd, bwd, 37, not with_bias, bias, 0.125, with_bias)
    out, lse = kernel.forward(q, k, k)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == (2, 4, 37) and lse.dtype == accumulation_dtype(q)
    grads = kernel.backward(torch.empty_like(out), q, k, k, out, lse)
    for grad, x in zip(grads, (q, k, k), strict=True):
        assert grad.shape == x.shape and grad.dtype == dtype


@pytest.mark.parametrize(
    ("expected", "dtype", "D", "capability", "with_bias"),
    (
        (_stock._cudnn_fwd, torch.bfloat16, 128, (9, 0), False),
        (_stock._cudnn_fwd, torch.float16, 64, (9, 0), True),
        (_stock._flash_fwd, torch.bfloat16, 256, (9, 0), False),
        (_stock._flash_fwd, torch.bfloat16, 128, (8, 0), False),
        (_stock._efficient_fwd, torch.bfloat16, 128, (8, 0), True),
        (_stock._efficient_fwd, torch.float32, 128, (9, 0), False),
        (None, torch.float64, 64, (9, 0), False),
        (None, torch.bfloat16, 36, (9, 0), False),
    ),
)
def test_which_cuda_kernel_is_chosen(expected, dtype, D, capability, with_bias, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with FakeTensorMode():
        q = torch.empty(2, 4, 37, D, device="cuda", dtype=dtype)
        bias = torch.empty(2, 1, 37, 37, device="cuda", dtype=dtype) if with_bias else None
    chosen = _stock._select(q, bias)
    assert (chosen and chosen[0]) is expected
