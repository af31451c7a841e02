"""What is measured: for every op its cases, inputs, least work, and who takes part on which device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.peers import plain_attention, published_shifted_attention
from benchmarks.timing import Function
from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.testing.inputs import attention_shift_inputs, normal, shifted_attention_inputs

LENGTHS = (256, 1024, 2048)
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Case:
    """One problem size, in the letters of the ops; ``dtype`` is a name in torch."""

    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    dtype: str
    causal: bool = True
    backward: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


Inputs = tuple[Tensor, ...]
Provider = Callable[[Case, Inputs], Function]


@dataclass(frozen=True)
class OpSpec:
    """An op's benchmark.

    tests: what pytest must pass before anything is measured. make_inputs: from a case and a device.
    bytes, flops: the least memory traffic and the products of a case, whoever computes it.
    providers: by device and name; the inputs to a function of no arguments. peers: the providers that
    ratios are taken to, the floor first.
    """

    name: str
    tests: tuple[str, ...]
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, str], Inputs]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    providers: Mapping[str, Mapping[str, Provider]]
    peers: tuple[str, ...]


# ---- shifted_attention: q, k, v lie in memory as projections leave them, [B, T, H, D] ----


def _attention_inputs(case: Case, device: str) -> Inputs:
    options = {"dtype": case.torch_dtype, "device": device, "layout": "heads_last"}
    inputs = shifted_attention_inputs(case.B, case.H, case.G, case.T, case.S, case.D, **options)
    dout = normal(case.B, case.H, case.T, case.D, seed=30, **options)
    leaves = [x.requires_grad_(case.backward) for x in inputs]
    return *leaves, dout


def _attention_bytes(case: Case) -> int:
    """q, k, v, out and lse once; backward reads them and dout, and writes dq, dk, dv."""
    element = case.torch_dtype.itemsize
    q = case.B * case.H * case.T * case.D * element
    kv = 2 * case.B * case.G * case.S * case.D * element
    lse = case.B * case.H * case.T * torch.float32.itemsize
    forward, backward = 2 * q + kv + lse, 4 * q + 2 * kv + lse
    return forward + backward * case.backward


def _attention_flops(case: Case) -> int:
    """Two products forward and five backward, over the visible half of the scores where causal."""
    product_flops = 2 * case.B * case.H * case.T * case.S * case.D
    return product_flops * (7 if case.backward else 2) // (2 if case.causal else 1)


def _attention(fn: Callable[..., Tensor], num_inputs: int) -> Provider:
    """A provider from an attention that takes the first ``num_inputs`` inputs, and ``causal``."""

    def bind(case: Case, inputs: Inputs) -> Function:
        arguments, dout = inputs[:num_inputs], inputs[-1]
        if not case.backward:
            return lambda: fn(*arguments, causal=case.causal)
        return lambda: torch.autograd.grad(fn(*arguments, causal=case.causal), arguments, dout)

    return bind


def _composed(*inputs: Tensor, causal: bool) -> Tensor:
    return shifted_attention(*inputs, causal=causal, impl="composed")


_ATTENTION_PROVIDERS = {
    "plain": _attention(plain_attention, 3),
    "published": _attention(published_shifted_attention, 6),
    "composed": _attention(_composed, 6),
}

SHIFTED_ATTENTION = OpSpec(
    name="shifted_attention",
    tests=("tests/ops/test_shifted_attention.py",),
    cases=tuple(
        Case(B=1, H=8, G=8, T=T, S=T, D=128, dtype=dtype, backward=backward)
        for backward, dtype, T in product((False, True), DTYPES, LENGTHS)
    ),
    make_inputs=_attention_inputs,
    bytes=_attention_bytes,
    flops=_attention_flops,
    providers={"cpu": _ATTENTION_PROVIDERS, "cuda": _ATTENTION_PROVIDERS},
    peers=("plain", "published"),
)


# ---- attention_shift: the epilogue alone ----


def _shift_inputs(case: Case, device: str) -> Inputs:
    return attention_shift_inputs(
        case.B, case.H, case.T, case.D, dtype=case.torch_dtype, device=device, layout="heads_last"
    )


def _shift_bytes(case: Case) -> int:
    """out, q and lse read, the result written."""
    rows = case.B * case.H * case.T
    return rows * (3 * case.D * case.torch_dtype.itemsize + torch.float32.itemsize)


def _shift_flops(case: Case) -> int:
    return 4 * case.B * case.H * case.T * case.D


def _formula(out: Tensor, lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    logit = (q.to(lse.dtype) * weight[:, None]).sum(-1) + bias[:, None]
    mu = torch.sigmoid(logit - lse)
    return (out.to(lse.dtype) + mu[..., None] * shift[:, None]).to(out.dtype)


def _shift(impl: str) -> Provider:
    return lambda case, inputs: lambda: attention_shift(*inputs, impl=impl)


def _compiled(case: Case, inputs: Inputs) -> Function:
    fn = torch.compile(_formula, dynamic=False)
    return lambda: fn(*inputs)


def _memcpy(case: Case, inputs: Inputs) -> Function:
    """As many bytes moved, half of them read and half written, into memory that is there already."""
    half = torch.zeros(2, _shift_bytes(case) // 2, dtype=torch.uint8, device=inputs[0].device)
    return lambda: half[1].copy_(half[0])


_SHIFT_PROVIDERS = {
    "memcpy": _memcpy,
    "formula": lambda case, inputs: lambda: _formula(*inputs),
    "compiled": _compiled,
    "composed": _shift("composed"),
}

ATTENTION_SHIFT = OpSpec(
    name="attention_shift",
    tests=("tests/ops/test_attention_shift.py",),
    cases=tuple(Case(B=1, H=8, G=8, T=T, S=T, D=128, dtype=dtype) for dtype, T in product(DTYPES, LENGTHS)),
    make_inputs=_shift_inputs,
    bytes=_shift_bytes,
    flops=_shift_flops,
    providers={"cpu": _SHIFT_PROVIDERS, "cuda": {**_SHIFT_PROVIDERS, "triton": _shift("triton")}},
    peers=("memcpy", "formula", "compiled"),
)

OPS = {spec.name: spec for spec in (SHIFTED_ATTENTION, ATTENTION_SHIFT)}
