"""``shifted_attention``: beside stock attention, alone and with an epilogue, and MimIC as published.

q, k, v lie in memory as projections leave them, ``[B, T, H, D]``, or in a cache.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from benchmarks.harness.case import (
    DTYPES,
    IDEFICS2,
    MULTI_HEAD,
    PHI,
    QWEN,
    SMOLVLM,
    Case,
    decode,
    prefill,
    square,
    training,
)
from benchmarks.harness.spec import IMPLS, Inputs, Lineup, Provider, Spec, bound
from benchmarks.harness.timing import Function
from benchmarks.harness.values import Part, corner_rows, relative_error
from benchmarks.ops.attention_shift import compiled_shift, heads_last, shift_formula
from benchmarks.peers import all_heads, published_shifted_attention
from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.testing.budgets import eager_shifted_attention, gradients
from mmicl_kernels.testing.inputs import normal, shift_parameters, shifted_attention_inputs

Op = Callable[..., Tensor]

aten = torch.ops.aten

BLOCK_ELEMENTS = 2**26  # of the scores of one block of queries: half a GiB in fp64

_K = 1024
CPU_CASES = tuple(
    square(1, T, 8, D, dtype, backward, groups=groups)
    for backward, dtype, D, groups, T in product((False, True), DTYPES, (128, 64), (1, 4), (256, _K, 2 * _K))
)

# What targets are set for comes first, then every model, then the long tail of batches and lengths.
CUDA_CASES = (
    *(prefill(IDEFICS2, T) for T in (1 * _K, 2 * _K, 4 * _K, 8 * _K, 16 * _K)),
    *(decode(IDEFICS2, S, B=8) for S in (16 * _K, 64 * _K)),
    *(training(IDEFICS2, T) for T in (2 * _K, 4 * _K, 8 * _K)),
    *(prefill(SMOLVLM, T) for T in (1 * _K, 2 * _K, 4 * _K, 8 * _K, 16 * _K)),
    *(prefill(IDEFICS2, T) for T in (128, 512)),
    decode(IDEFICS2, 1 * _K, B=1),
    decode(IDEFICS2, 16 * _K, B=1),
    decode(IDEFICS2, 16 * _K, B=64),
    *(prefill(model, 2 * _K) for model in (MULTI_HEAD, QWEN, PHI)),
    training(SMOLVLM, 2 * _K),
    prefill(IDEFICS2, 512, B=32),
    *(decode(model, 16 * _K, B=8) for model in (SMOLVLM, QWEN, PHI, MULTI_HEAD)),
    decode(IDEFICS2, 4 * _K, B=8),
    decode(IDEFICS2, 1 * _K, B=8),
    decode(IDEFICS2, 1 * _K, B=64),
    decode(IDEFICS2, 64 * _K, B=1),
    decode(IDEFICS2, 64 * _K, B=64),
    *(training(model, 2 * _K) for model in (MULTI_HEAD, QWEN, PHI)),
    training(SMOLVLM, 8 * _K),
    training(IDEFICS2, 512, B=8),
    *(prefill(model, T) for T in (8 * _K, 512) for model in (MULTI_HEAD, QWEN, PHI)),
    prefill(IDEFICS2, 2 * _K, B=8),
    prefill(IDEFICS2, 128, B=32),
    prefill(SMOLVLM, 512, B=32),
    prefill(SMOLVLM, 128),
    *(decode(model, 1 * _K, B=1) for model in (SMOLVLM, QWEN, PHI, MULTI_HEAD)),
    *(training(IDEFICS2, T) for T in (1 * _K, 16 * _K)),
    *(training(model, 8 * _K) for model in (QWEN, PHI, MULTI_HEAD)),
    *(prefill(model, 16 * _K) for model in (MULTI_HEAD, QWEN, PHI)),
    prefill(IDEFICS2, 2 * _K, dtype="float16"),
    prefill(IDEFICS2, 2 * _K, B=32),
)

# FlexAttention is compiled for every shape, for many seconds: only here.
WITH_FLEX = frozenset(
    (
        *(prefill(IDEFICS2, T) for T in (2 * _K, 8 * _K)),
        decode(IDEFICS2, 16 * _K, B=8),
        training(IDEFICS2, 4 * _K),
        prefill(SMOLVLM, 4 * _K),
        training(SMOLVLM, 2 * _K),
        prefill(IDEFICS2, 512, B=32),
    )
)


def make_inputs(case: Case, device: str) -> Inputs:
    """``q, k, v``, the parameters, and the gradient of the result."""
    B, H, G, T, S, D = case.B, case.H, case.G, case.T, case.S, case.D
    if device == "cpu":
        options = {"dtype": case.torch_dtype, "layout": "heads_last"}
        inputs = shifted_attention_inputs(B, H, G, T, S, D, **options)
        dout = normal(B, H, T, D, seed=30, **options)
    else:
        inputs, dout = _made_on(device, case)
    return *(x.requires_grad_(case.backward) for x in inputs), dout


def _made_on(device: str, case: Case) -> tuple[Inputs, Tensor]:
    """The same, fast for gigabytes; the keys and values of a decode are dense, as caches are."""
    torch.manual_seed(0)
    q, dout = (heads_last(case.B, case.H, case.T, case.D, case, device) for _ in range(2))
    if case.section == "decode":
        shape = (case.B, case.G, case.S, case.D)
        k, v = (torch.randn(shape, dtype=case.torch_dtype, device=device) for _ in range(2))
    else:
        k, v = (heads_last(case.B, case.G, case.S, case.D, case, device) for _ in range(2))
    return (q, k, v, *shift_parameters(case.H, case.D, keys=case.S, device=device)), dout


def num_bytes(case: Case) -> int:
    """q, k, v, out and lse once; backward reads them and dout, and writes dq, dk, dv."""
    element = case.torch_dtype.itemsize
    q = case.B * case.H * case.T * case.D * element
    kv = 2 * case.B * case.G * case.S * case.D * element
    lse = case.B * case.H * case.T * torch.float32.itemsize
    forward, backward = 2 * q + kv + lse, 4 * q + 2 * kv + lse
    return forward + backward * case.backward


def num_flops(case: Case) -> int:
    """Two products forward and five backward, over the visible half of the scores where causal."""
    product_flops = 2 * case.B * case.H * case.T * case.S * case.D
    return product_flops * (7 if case.backward else 2) // (2 if case.causal else 1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Stock attention without a shift: the floor. ``q [B, H, T, D]``, ``k, v [B, G, S, D]``."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def forced_attention(backend: str) -> Callable[..., Tensor]:
    """Stock attention by this backend of SDPA, or a RuntimeError: ``(q, k, v, causal=)``.

    "efficient" knows no grouped heads: its keys and values are repeated first, as transformers does,
    and that is part of its time.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        if backend == "efficient":
            k, v = all_heads(k, q), all_heads(v, q)
        with sdpa_kernel(BACKENDS[backend]):
            return plain_attention(q, k, v, causal=causal)

    return attention


def cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
    return out, lse.reshape(q.shape[:3])


def flash_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[:2]


WITH_LSE: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cudnn": cudnn_with_lse,
    "flash": flash_with_lse,
}


def stock_and_epilogue(backend: str) -> Callable[..., Tensor]:
    """``(q, k, v, weight, bias, shift, causal=)``, forward only.

    The stock backward takes no gradient of the lse: autograd through this one would be wrong in q and k.
    """

    def attention(
        q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, *, causal: bool = False
    ) -> Tensor:
        with torch.no_grad():
            out, lse = WITH_LSE[backend](q, k, v, causal=causal)
            return compiled_shift(out, lse, q, weight, bias, shift)

    return attention


def causal_block_mask(T: int, device: str | torch.device) -> BlockMask:
    """Made for one length: FlexAttention needs another for every T."""
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


def flex_shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """FlexAttention, its lse, and the epilogue: to be compiled as one. The gradient of lse is exact."""
    out, aux = flex_attention(
        q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True)
    )
    return shift_formula(out, aux.lse, q, weight, bias, shift)


def _attention(fn: Callable[..., Tensor], num_inputs: int) -> Provider:
    """A provider from an attention that takes ``causal`` too."""
    return lambda case, inputs: bound(partial(fn, causal=case.causal), num_inputs)(case, inputs)


def _with_epilogue(backend: str) -> Provider:
    attention = _attention(stock_and_epilogue(backend), 6)
    return lambda case, inputs: None if case.backward else attention(case, inputs)


def _flex(case: Case, inputs: Inputs) -> Function | None:
    if case not in WITH_FLEX:
        return None
    fn = torch.compile(flex_shifted_attention, dynamic=False, fullgraph=True)
    block_mask = causal_block_mask(case.T, inputs[0].device) if case.causal else None
    return bound(lambda *arguments: fn(*arguments, block_mask), 6)(case, inputs)


def parts(case: Case, inputs: Inputs) -> list[Part]:
    """Of ``out``, or of the six gradients, in a few heads and rows: the whole would not fit in fp64.

    Of a forward the first, middle and last queries of the first and the last key/value head, the last in
    the last batch row, where an offset overflows first. Of gradients everything of these two heads.
    """
    *inputs, dout = (x.detach() for x in inputs)
    heads = dict.fromkeys((0, case.G - 1))
    if case.backward:
        return [part for g in heads for part in _gradient_parts(case, inputs, dout, g)]
    corners = dict.fromkeys(((0, 0), (case.B - 1, case.G - 1)))
    return [_output_part(case, inputs, b, g, rows) for b, g in corners for rows in corner_rows(case.T)]


def _output_part(case: Case, inputs: Sequence[Tensor], b: int, g: int, rows: slice) -> Part:
    heads = _query_heads(case, g)
    block = _block(case, inputs, slice(b, b + 1), g, rows)
    low, exact = _eager(case)(*block), _exact(case)(*(x.double() for x in block))
    name = f"out[{b}, {heads.start}:{heads.stop}, {rows.start}:{rows.stop}]"
    return Part(name, 0, (slice(b, b + 1), heads, rows), low, exact)


def _gradient_parts(case: Case, inputs: Sequence[Tensor], dout: Tensor, g: int) -> list[Part]:
    heads, everything = _query_heads(case, g), slice(None)
    low = _block_gradients(_eager(case), case, inputs, dout, g)
    exact = _block_gradients(_exact(case), case, [x.double() for x in inputs], dout.double(), g)
    indices = (
        *((everything, heads), (everything, slice(g, g + 1)), (everything, slice(g, g + 1))),
        *((heads,), (heads,), (heads,)),
    )
    lows = [x.to(like.dtype) for x, like in zip(low, inputs, strict=True)]
    # The dbias of a head is one number, which can come out exact by luck; dweight sums the same terms.
    lows[4] = (lows[4], exact[4] * (1 + relative_error(low[3], exact[3])))
    names = ("dq", "dk", "dv", "dweight", "dbias", "dshift")
    return [
        Part(f"{name} of key head {g}", number, indices[number], lows[number], exact[number])
        for number, name in enumerate(names)
    ]


def _block_gradients(op: Op, case: Case, inputs: Sequence[Tensor], dout: Tensor, g: int) -> list[Tensor]:
    """The six gradients of key head ``g`` and its queries, summed over blocks of queries in fp32 or fp64."""
    heads, acc = _query_heads(case, g), torch.promote_types(dout.dtype, torch.float32)
    q, k, v, *parameters = inputs
    selected = (q[:, heads], k[:, g : g + 1], v[:, g : g + 1], *(x[heads] for x in parameters))
    totals = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in selected]
    length = max(BLOCK_ELEMENTS // (case.B * (heads.stop - heads.start) * case.S), 1)
    for start in range(0, case.T, length):
        rows = slice(start, min(start + length, case.T))
        block = _block(case, inputs, slice(None), g, rows)
        _, (dq, dk, dv, *rest) = gradients(op, block, [dout[:, heads, rows]])
        totals[0][:, :, rows] += dq
        for total, part in zip(totals[1:3], (dk, dv), strict=True):
            total[:, :, : part.shape[2]] += part
        for total, part in zip(totals[3:], rest, strict=True):
            total += part
    return totals


def _block(case: Case, inputs: Sequence[Tensor], batch: slice, g: int, rows: slice) -> tuple[Tensor, ...]:
    """Inputs of some queries alone. Where causal, the keys end with the block: so it is bottom-right."""
    q, k, v, *parameters = inputs
    heads, keys = _query_heads(case, g), slice(rows.stop if case.causal else case.S)
    return (
        q[batch, heads, rows],
        k[batch, g : g + 1, keys],
        v[batch, g : g + 1, keys],
        *(x[heads] for x in parameters),
    )


def _eager(case: Case) -> Op:
    def op(*inputs: Tensor) -> Tensor:
        with torch.device(inputs[0].device):  # it makes its masks on the default device
            return eager_shifted_attention(*inputs, causal=case.causal)[0]

    return op


def _exact(case: Case) -> Op:
    return lambda *inputs: shifted_attention(*inputs, causal=case.causal, impl="reference")


def _query_heads(case: Case, g: int) -> slice:
    groups = case.H // case.G
    return slice(g * groups, (g + 1) * groups)


OURS = {
    impl: _attention(partial(shifted_attention, impl=impl), 6) for impls in IMPLS.values() for impl in impls
}
PUBLISHED = {"published": _attention(published_shifted_attention, 6)}
EPILOGUES = {**{f"{name} + epilogue": _with_epilogue(name) for name in WITH_LSE}, "flex + epilogue": _flex}

SPEC = Spec(
    name="shifted_attention",
    tests=("tests/ops/test_shifted_attention.py",),
    make_inputs=make_inputs,
    bytes=num_bytes,
    flops=num_flops,
    parts=parts,
    lineups={
        "cpu": Lineup(
            cases=CPU_CASES,
            floors={"plain": _attention(plain_attention, 3)},
            others=PUBLISHED,
            ours={"composed": OURS["composed"]},
        ),
        "cuda": Lineup(
            cases=CUDA_CASES,
            floors={name: _attention(forced_attention(name), 3) for name in BACKENDS},
            others={**PUBLISHED, **EPILOGUES},
            stock=tuple(EPILOGUES),
            ours=OURS,
        ),
    },
    share=0.88,
)
