"""What is measured: for every op its cases, inputs, least work, and who takes part on which device."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import alignment_peers, projection_peers, residual_peers, shapes, splice_peers
from benchmarks.attention_peers import (
    BACKENDS,
    WITH_LSE,
    causal_block_mask,
    compiled_shift,
    flex_shifted_attention,
    forced_attention,
    shift_formula,
    stock_and_epilogue,
)
from benchmarks.peers import plain_attention, published_shifted_attention
from benchmarks.shapes import Case
from benchmarks.timing import Function
from benchmarks.values import Part, attention_parts, residual_parts, shift_parts
from mmicl_kernels.ops import attention_shift, residual_shift, residual_shift_rms_norm, shifted_attention
from mmicl_kernels.testing.budgets import eager_residual_shift, eager_residual_shift_rms_norm
from mmicl_kernels.testing.inputs import (
    attention_shift_inputs,
    normal,
    shift_parameters,
    shifted_attention_inputs,
)

Inputs = tuple[Tensor, ...]
Provider = Callable[[Case, Inputs], Function | None]


@dataclass(frozen=True)
class Lineup:
    """Who takes part on one device, in what.

    cases: the most valuable first. providers: by name; from inputs to a function of no arguments, or
    None where it takes no part in a case. floors: the providers that no implementation can beat, the
    one to name first. others: the further ones that ratios are taken to. stock: those among them that
    compute the same as the op. ours: the op's implementations.
    """

    cases: tuple[Case, ...]
    providers: Mapping[str, Provider]
    floors: tuple[str, ...]
    others: tuple[str, ...] = ()
    stock: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()

    @property
    def peers(self) -> tuple[str, ...]:
        return (*self.floors, *self.others)

    @property
    def checked(self) -> tuple[str, ...]:
        """The providers whose values must be the op's."""
        return (*self.stock, *self.ours)


@dataclass(frozen=True)
class OpSpec:
    """An op's benchmark.

    tests: what pytest must pass before anything is measured on a CPU. make_inputs: from a case and a
    device. bytes, flops: the least memory traffic and the products of a case, whoever computes it.
    parts: what outputs must be near. lineups: by device. share: of a run's time, where that is limited.
    """

    name: str
    tests: tuple[str, ...]
    make_inputs: Callable[[Case, str], Inputs]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    parts: Callable[[Case, Inputs], list[Part]]
    lineups: Mapping[str, Lineup]
    share: float = 1.0


def _draw(B: int, H: int, T: int, D: int, case: Case, device: str) -> Tensor:
    """Normal numbers as a projection leaves them, ``[B, T, H, D]`` in memory, made on the device."""
    return torch.randn(B, T, H, D, dtype=case.torch_dtype, device=device).transpose(1, 2)


# ---- shifted_attention: q, k, v lie in memory as projections leave them, [B, T, H, D], or in a cache ----


def _attention_inputs(case: Case, device: str) -> Inputs:
    options = {"dtype": case.torch_dtype, "device": device, "layout": "heads_last"}
    inputs = shifted_attention_inputs(case.B, case.H, case.G, case.T, case.S, case.D, **options)
    dout = normal(case.B, case.H, case.T, case.D, seed=30, **options)
    leaves = [x.requires_grad_(case.backward) for x in inputs]
    return *leaves, dout


def _cuda_attention_inputs(case: Case, device: str) -> Inputs:
    """The same, fast for gigabytes; the keys and values of a decode are dense, as caches are."""
    torch.manual_seed(0)
    q, dout = (_draw(case.B, case.H, case.T, case.D, case, device) for _ in range(2))
    if case.section == "decode":
        shape = (case.B, case.G, case.S, case.D)
        k, v = (torch.randn(shape, dtype=case.torch_dtype, device=device) for _ in range(2))
    else:
        k, v = (_draw(case.B, case.G, case.S, case.D, case, device) for _ in range(2))
    inputs = (q, k, v, *shift_parameters(case.H, case.D, keys=case.S, device=device))
    return *(x.requires_grad_(case.backward) for x in inputs), dout


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


def _ours(impl: str) -> Provider:
    return _attention(lambda *inputs, causal: shifted_attention(*inputs, causal=causal, impl=impl), 6)


def _forward_only(provider: Provider) -> Provider:
    return lambda case, inputs: None if case.backward else provider(case, inputs)


def _flex(case: Case, inputs: Inputs) -> Function | None:
    if case not in shapes.WITH_FLEX:
        return None
    fn = torch.compile(flex_shifted_attention, dynamic=False, fullgraph=True)
    block_mask = causal_block_mask(case.T, inputs[0].device) if case.causal else None
    return _attention(lambda *arguments, causal: fn(*arguments, block_mask), 6)(case, inputs)


OURS = ("composed", "triton", "auto")

SHIFTED_ATTENTION = OpSpec(
    name="shifted_attention",
    tests=("tests/ops/test_shifted_attention.py",),
    make_inputs=lambda case, device: (
        _attention_inputs(case, device) if device == "cpu" else _cuda_attention_inputs(case, device)
    ),
    bytes=_attention_bytes,
    flops=_attention_flops,
    parts=attention_parts,
    lineups={
        "cpu": Lineup(
            cases=shapes.CPU_ATTENTION,
            providers={
                "plain": _attention(plain_attention, 3),
                "published": _attention(published_shifted_attention, 6),
                "composed": _ours("composed"),
            },
            floors=("plain",),
            others=("published",),
            ours=("composed",),
        ),
        "cuda": Lineup(
            cases=shapes.CUDA_ATTENTION,
            providers={
                **{name: _attention(forced_attention(name), 3) for name in BACKENDS},
                "published": _attention(published_shifted_attention, 6),
                **{
                    f"{name} + epilogue": _forward_only(_attention(stock_and_epilogue(name), 6))
                    for name in WITH_LSE
                },
                "flex + epilogue": _flex,
                **{impl: _ours(impl) for impl in OURS},
            },
            floors=tuple(BACKENDS),
            others=("published", *(f"{name} + epilogue" for name in WITH_LSE), "flex + epilogue"),
            stock=(*(f"{name} + epilogue" for name in WITH_LSE), "flex + epilogue"),
            ours=OURS,
        ),
    },
    share=0.88,
)


# ---- attention_shift: the epilogue alone ----


def _shift_inputs(case: Case, device: str) -> Inputs:
    if device == "cpu":
        return attention_shift_inputs(
            case.B, case.H, case.T, case.D, dtype=case.torch_dtype, device=device, layout="heads_last"
        )
    torch.manual_seed(0)
    out, q = (_draw(case.B, case.H, case.T, case.D, case, device) for _ in range(2))
    lse = torch.randn(case.B, case.H, case.T, device=device)
    return out, lse, q, *shift_parameters(case.H, case.D, device=device)


def _shift_bytes(case: Case) -> int:
    """out, q and lse read, the result written."""
    rows = case.B * case.H * case.T
    return rows * (3 * case.D * case.torch_dtype.itemsize + torch.float32.itemsize)


def _shift_flops(case: Case) -> int:
    return 4 * case.B * case.H * case.T * case.D


def _shift(impl: str) -> Provider:
    return lambda case, inputs: lambda: attention_shift(*inputs, impl=impl)


def _compiled(case: Case, inputs: Inputs) -> Function:
    fn = torch.compile(shift_formula, dynamic=False)
    return lambda: fn(*inputs)


def _memcpy(case: Case, inputs: Inputs) -> Function:
    """As many bytes moved, half of them read and half written, into memory that is there already."""
    half = torch.zeros(2, _shift_bytes(case) // 2, dtype=torch.uint8, device=inputs[0].device)
    return lambda: half[1].copy_(half[0])


_SHIFT_PEERS = {"memcpy": _memcpy, "formula": lambda case, inputs: lambda: shift_formula(*inputs)}

ATTENTION_SHIFT = OpSpec(
    name="attention_shift",
    tests=("tests/ops/test_attention_shift.py",),
    make_inputs=_shift_inputs,
    bytes=_shift_bytes,
    flops=_shift_flops,
    parts=shift_parts,
    lineups={
        "cpu": Lineup(
            cases=shapes.CPU_SHIFT,
            providers={**_SHIFT_PEERS, "compiled": _compiled, "composed": _shift("composed")},
            floors=("memcpy",),
            others=("formula", "compiled"),
            stock=("formula", "compiled"),
            ours=("composed",),
        ),
        "cuda": Lineup(
            cases=shapes.CUDA_SHIFT,
            providers={
                **_SHIFT_PEERS,
                "compiled": lambda case, inputs: lambda: compiled_shift(*inputs),
                **{impl: _shift(impl) for impl in OURS},
            },
            floors=("memcpy",),
            others=("formula", "compiled"),
            stock=("formula", "compiled"),
            ours=OURS,
        ),
    },
    share=0.12,
)

# ---- residual_shift, with and without LIVE's norm, and residual_shift_rms_norm ----


def _bound(fn: Callable[..., Tensor | tuple[Tensor, ...]], num_inputs: int) -> Provider:
    """A provider from a function of the first ``num_inputs``; the others are gradients of its outputs."""

    def bind(case: Case, inputs: Inputs) -> Function:
        arguments, douts = inputs[:num_inputs], inputs[num_inputs:]
        if not case.backward:
            return lambda: fn(*arguments)
        return lambda: torch.autograd.grad(fn(*arguments), arguments, douts, allow_unused=True)

    return bind


def _compiled_bound(fn: Callable[..., Tensor | tuple[Tensor, ...]], num_inputs: int) -> Provider:
    return lambda case, inputs: _bound(torch.compile(fn, dynamic=False), num_inputs)(case, inputs)


def _hidden(count: int, case: Case, device: str) -> list[Tensor]:
    shape = (case.B, case.T, case.H * case.D)
    return [torch.randn(shape, dtype=case.torch_dtype, device=device) for _ in range(count)]


def _residual_inputs(case: Case, device: str, normed: bool) -> Inputs:
    """``x, vector, scale``, or with ``normed`` ``x, residual, vector, scale, weight``; then the gradients."""
    torch.manual_seed(0)
    C = case.H * case.D
    tokens = _hidden(4 if normed else 2, case, device)
    vector, scale = torch.randn(C, device=device), torch.full((), 0.1, device=device)
    if normed:
        weight = torch.randn(C, dtype=case.torch_dtype, device=device)
        inputs, douts = (*tokens[:2], vector, scale, weight), tokens[2:]
    else:
        inputs, douts = (tokens[0], vector, scale), tokens[1:]
    return *(x.requires_grad_(case.backward) for x in inputs), *douts


# Forward and backward: how often the op reads or writes a tensor like x. Without the norm dx is dout.
_PASSES = {
    "residual_shift": (2, 1),
    "residual_shift_preserve_norm": (2, 3),
    "residual_shift_rms_norm": (4, 4),
}


def _residual_spec(name: str, op: Callable[..., Tensor], formula: Callable, eager: Callable) -> OpSpec:
    normed = name.endswith("rms_norm")
    num_inputs = 5 if normed else 3

    def count_bytes(case: Case) -> int:
        tokens = case.B * case.T
        forward, backward = (
            tokens * (passes * case.H * case.D * case.torch_dtype.itemsize + 4 * normed)
            for passes in _PASSES[name]
        )
        return forward + backward * case.backward

    def memcpy(case: Case, inputs: Inputs) -> Function:
        half = torch.zeros(2, count_bytes(case) // 2, dtype=torch.uint8, device=inputs[0].device)
        return lambda: half[1].copy_(half[0])

    def lineup(cases: tuple[Case, ...], impls: tuple[str, ...], others: Mapping[str, Provider]) -> Lineup:
        return Lineup(
            cases=cases,
            providers={
                "memcpy": memcpy,
                "formula": _bound(formula, num_inputs),
                "compiled": _compiled_bound(formula, num_inputs),
                **others,
                **{impl: _bound(functools.partial(op, impl=impl), num_inputs) for impl in impls},
            },
            floors=("memcpy",),
            others=("formula", "compiled", *others),
            stock=("formula", "compiled"),
            ours=impls,
        )

    liger = {"liger": _bound(residual_peers.liger, num_inputs)} if normed else {}
    test = "residual_shift_rms_norm" if normed else "residual_shift"
    return OpSpec(
        name=name,
        tests=(f"tests/ops/test_{test}.py",),
        make_inputs=lambda case, device: _residual_inputs(case, device, normed),
        bytes=count_bytes,
        flops=lambda case: 2 * case.B * case.T * case.H * case.D,
        parts=lambda case, inputs: residual_parts(op, eager, case.backward, inputs, num_inputs),
        lineups={
            "cpu": lineup(shapes.CPU_RESIDUAL, ("composed",), {}),
            "cuda": lineup(shapes.CUDA_RESIDUAL, OURS, liger),
        },
        share=0.06,
    )


_preserving = functools.partial(residual_shift, preserve_norm=True)
_normed = functools.partial(residual_shift_rms_norm, eps=residual_peers.EPS)
RESIDUAL_SHIFT = (
    _residual_spec("residual_shift", residual_shift, residual_peers.added, eager_residual_shift),
    _residual_spec(
        "residual_shift_preserve_norm",
        _preserving,
        residual_peers.added_with_norm,
        functools.partial(eager_residual_shift, preserve_norm=True),
    ),
    _residual_spec(
        "residual_shift_rms_norm",
        _normed,
        residual_peers.added_and_normed,
        functools.partial(eager_residual_shift_rms_norm, eps=residual_peers.EPS),
    ),
)

# ---- prefix_splice: copies alone; row_projection: a gather and a product; alignment_loss: sums of rows ----


def _lineup(module: ModuleType, cases: tuple[Case, ...], impls: tuple[str, ...]) -> Lineup:
    """The module's floors and peers, all of them stock unless it says which, and our implementations."""
    return Lineup(
        cases=cases,
        providers={**module.FLOORS, **module.PEERS, **{impl: module.ours(impl) for impl in impls}},
        floors=tuple(module.FLOORS),
        others=tuple(module.PEERS),
        stock=getattr(module, "STOCK", tuple(module.PEERS)),
        ours=impls,
    )


PREFIX_SPLICE, ROW_PROJECTION, ALIGNMENT_LOSS = (
    OpSpec(
        name=name,
        tests=(f"tests/ops/test_{name}.py",),
        make_inputs=module.make_inputs,
        bytes=module.count_bytes,
        flops=module.count_flops,
        parts=module.parts,
        lineups={
            "cpu": _lineup(module, module.CPU_CASES, ("composed",)),
            "cuda": _lineup(module, module.CUDA_CASES, OURS),
        },
        share=0.04,
    )
    for name, module in (
        ("prefix_splice", splice_peers),
        ("row_projection", projection_peers),
        ("alignment_loss", alignment_peers),
    )
)

OPS = {
    spec.name: spec
    for spec in (
        SHIFTED_ATTENTION,
        ATTENTION_SHIFT,
        *RESIDUAL_SHIFT,
        PREFIX_SPLICE,
        ROW_PROJECTION,
        ALIGNMENT_LOSS,
    )
}
