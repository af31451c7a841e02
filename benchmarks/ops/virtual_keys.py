"""``shifted_attention`` with 8 virtual keys as a prefix: beside one, and beside 8 keys and values more."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.case import DTYPES, IDEFICS2, Case, prefill, square
from benchmarks.harness.spec import IMPLS, Inputs, Lineup, Provider, Spec
from benchmarks.harness.timing import Function
from benchmarks.harness.values import Part, corner_rows
from benchmarks.ops.attention_shift import heads_last
from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.testing.budgets import eager_shifted_attention
from mmicl_kernels.testing.inputs import shift_parameters, shifted_attention_inputs

_K = 1024
KEYS = 8
CPU_CASES = tuple(square(1, T, 8, dtype=dtype) for dtype, T in product(DTYPES, (256, _K, 2 * _K)))
CUDA_CASES = tuple(prefill(IDEFICS2, T) for T in (2 * _K, 8 * _K, 512))


def make_inputs(case: Case, device: str) -> Inputs:
    """``q, k, v`` and the virtual keys of each head."""
    sizes = case.B, case.H, case.G, case.T, case.S, case.D
    if device == "cpu":
        options = {"dtype": case.torch_dtype, "layout": "heads_last"}
        return shifted_attention_inputs(*sizes, virtual=(case.H, KEYS), **options)
    torch.manual_seed(0)
    q = heads_last(case.B, case.H, case.T, case.D, case, device)
    k, v = (heads_last(case.B, case.G, case.S, case.D, case, device) for _ in range(2))
    return q, k, v, *shift_parameters(case.H, case.D, keys=case.S, virtual=(case.H, KEYS), device=device)


def num_bytes(case: Case) -> int:
    """q, k, v, out and lse once."""
    q, kv = case.B * case.H * case.T, 2 * case.B * case.G * case.S
    return (2 * q + kv) * case.D * case.torch_dtype.itemsize + q * torch.float32.itemsize


def num_flops(case: Case) -> int:
    """Two products over the visible half of the scores, and over the virtual keys."""
    rows = 4 * case.B * case.H * case.T * case.D
    return rows * (case.S // (2 if case.causal else 1) + KEYS)


def concatenated(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, *, causal: bool
) -> Tensor:
    """The same by stock attention: each head's keys and values before the others, the bias as a mask."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    keys, values = (x.to(q.dtype).expand(B, -1, -1, -1) for x in (weight * D**0.5, shift))
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    mask = torch.zeros(H, T, KEYS + S, dtype=q.dtype, device=q.device)
    mask[..., :KEYS] = bias[:, None]
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1)
        mask[..., KEYS:].masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(
        q, torch.cat((keys, k), 2), torch.cat((values, v), 2), attn_mask=mask
    )


def _concatenated(case: Case, inputs: Inputs) -> Function:
    return lambda: concatenated(*inputs, causal=case.causal)


def _one_key(impl: str) -> Provider:
    """The first of the keys, as a shift: MimIC."""

    def bind(case: Case, inputs: Inputs) -> Function:
        one = [x[:, 0].contiguous() for x in inputs[3:]]
        return lambda: shifted_attention(*inputs[:3], *one, causal=case.causal, impl=impl)

    return bind


def _ours(impl: str) -> Provider:
    return lambda case, inputs: lambda: shifted_attention(*inputs, causal=case.causal, prefix=True, impl=impl)


def parts(case: Case, inputs: Inputs) -> list[Part]:
    """Some rows of the first key head's queries."""
    q, k, v, *keys = inputs
    heads, found = slice(0, case.H // case.G), []
    for rows in corner_rows(case.T):
        # Where causal, the keys end with the rows: so it is bottom-right.
        S = rows.stop if case.causal else case.S
        block = q[:1, heads, rows], k[:1, :1, :S], v[:1, :1, :S], *(x[heads] for x in keys)
        options = {"causal": case.causal, "prefix": True}
        with torch.device(q.device):  # it makes its masks on the default device
            low = eager_shifted_attention(*block, **options)[0]
        exact = shifted_attention(*(x.double() for x in block), impl="reference", **options)
        index = slice(0, 1), heads, rows
        found.append(
            Part(f"out[0, {heads.start}:{heads.stop}, {rows.start}:{rows.stop}]", 0, index, low, exact)
        )
    return found


def _lineup(cases: tuple[Case, ...], impls: tuple[str, ...]) -> Lineup:
    return Lineup(
        cases=cases,
        floors={f"one key, {impl}": _one_key(impl) for impl in impls},
        others={"concatenated": _concatenated},
        stock=("concatenated",),
        ours={impl: _ours(impl) for impl in impls},
    )


SPEC = Spec(
    name="virtual_keys",
    tests=("tests/ops/test_virtual_keys.py",),
    make_inputs=make_inputs,
    bytes=num_bytes,
    flops=num_flops,
    parts=parts,
    lineups={
        "cpu": _lineup(CPU_CASES, IMPLS["cpu"]),
        "cuda": _lineup(CUDA_CASES, ("composed", "triton")),
    },
    share=0.05,
)
