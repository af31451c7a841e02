"""``attention_shift``, the epilogue alone: beside a copy of as many bytes, and its formula in PyTorch."""

from itertools import product

import torch
from torch import Tensor

from benchmarks.harness.case import DTYPES, IDEFICS2, PHI, SMOLVLM, Case, prefill, square
from benchmarks.harness.spec import IMPLS, Inputs, Lineup, Provider, Spec, bound, compiled, memcpy
from benchmarks.harness.values import Part, corners
from mmicl_kernels.ops import attention_shift
from mmicl_kernels.testing.budgets import eager_attention_shift
from mmicl_kernels.testing.inputs import attention_shift_inputs, shift_parameters

_K = 1024
CPU_CASES = tuple(square(1, T, 8, dtype=dtype) for dtype, T in product(DTYPES, (256, _K, 2 * _K)))
CUDA_CASES = (
    *(prefill(IDEFICS2, T) for T in (2 * _K, 8 * _K, 16 * _K, 1 * _K, 128)),
    *(Case(B=B, H=32, G=8, T=1, S=_K, D=128, dtype="bfloat16", model=IDEFICS2) for B in (1, 64)),
    prefill(SMOLVLM, 4 * _K),
    prefill(PHI, 4 * _K),
    prefill(IDEFICS2, 2 * _K, B=8),
)


def heads_last(B: int, H: int, T: int, D: int, case: Case, device: str) -> Tensor:
    """Normal numbers as a projection leaves them, ``[B, T, H, D]`` in memory, made on the device."""
    return torch.randn(B, T, H, D, dtype=case.torch_dtype, device=device).transpose(1, 2)


def make_inputs(case: Case, device: str) -> Inputs:
    """``out, lse, q`` and the parameters."""
    B, H, T, D = case.B, case.H, case.T, case.D
    if device == "cpu":
        return attention_shift_inputs(B, H, T, D, dtype=case.torch_dtype, layout="heads_last")
    torch.manual_seed(0)
    out, q = (heads_last(B, H, T, D, case, device) for _ in range(2))
    return out, torch.randn(B, H, T, device=device), q, *shift_parameters(H, D, device=device)


def num_bytes(case: Case) -> int:
    """out, q and lse read, the result written."""
    rows = case.B * case.H * case.T
    return rows * (3 * case.D * case.torch_dtype.itemsize + torch.float32.itemsize)


def shift_formula(out: Tensor, lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """The epilogue as one would write it in PyTorch; see :func:`mmicl_kernels.ops.attention_shift`."""
    logit = (q.to(lse.dtype) * weight[:, None]).sum(-1) + bias[:, None]
    mu = torch.sigmoid(logit - lse)
    return (out.to(lse.dtype) + mu[..., None] * shift[:, None]).to(out.dtype)


# B and T are symbols: one compilation serves every length. H and D stay numbers, so that the sum over D
# is unrolled. Made once, because torch.compile keeps its cache by function.
_compiled_formula = torch.compile(shift_formula, dynamic=False)


def compiled_shift(
    out: Tensor, lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """:func:`shift_formula` by torch.compile, with B and T dynamic; no gradient."""
    out, lse, q = (x.detach() for x in (out, lse, q))  # the marks must not stay on the caller's tensors
    for x in (out, lse, q):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return _compiled_formula(out, lse, q, weight, bias, shift)


def parts(case: Case, inputs: Inputs) -> list[Part]:
    """Of the result, all heads."""
    out, lse, q, *parameters = inputs
    found = []
    for b, rows in corners(case.B, case.T):
        index = (slice(b, b + 1), slice(None), rows)
        part = (out[index], lse[index], q[index], *parameters)
        low = eager_attention_shift(*part)
        exact = attention_shift(*(x.double() for x in part), impl="reference")
        found.append(Part(f"out[{b}, :, {rows.start}:{rows.stop}]", 0, index, low, exact))
    return found


def _ours(impl: str) -> Provider:
    return bound(lambda *inputs: attention_shift(*inputs, impl=impl), 6)


def _lineup(device: str, cases: tuple[Case, ...], compiled_formula: Provider) -> Lineup:
    return Lineup(
        cases=cases,
        floors={"memcpy": memcpy(num_bytes)},
        others={"formula": bound(shift_formula, 6), "compiled": compiled_formula},
        stock=("formula", "compiled"),
        ours={impl: _ours(impl) for impl in IMPLS[device]},
    )


SPEC = Spec(
    name="attention_shift",
    tests=("tests/ops/test_attention_shift.py",),
    make_inputs=make_inputs,
    bytes=num_bytes,
    flops=lambda case: 4 * case.B * case.H * case.T * case.D,
    parts=parts,
    lineups={
        "cpu": _lineup("cpu", CPU_CASES, compiled(shift_formula, 6)),
        "cuda": _lineup("cuda", CUDA_CASES, bound(compiled_shift, 6)),
    },
    share=0.12,
)
