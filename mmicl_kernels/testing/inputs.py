"""Seeded inputs of the ops, in the layouts that models hand over."""

import math

import torch
from torch import Tensor

LAYOUTS = ("dense", "heads_last", "sliced", "expanded")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(
    *shape: int, dtype: torch.dtype, device: str = "cpu", layout: str = "dense", seed: int = 0
) -> Tensor:
    """Standard normal numbers of the given shape, drawn in fp64 on the CPU and rounded to ``dtype``.

    Args:
        layout: "dense"; "heads_last", a transposed ``[B, T, H, D]`` as a projection leaves it;
            "sliced", a window of a larger buffer whose rows start at odd offsets (a KV cache, a fused
            projection); "expanded", one batch row seen B times (stride 0). The two before it need 4 dims.
    """
    if layout == "heads_last":
        B, H, T, D = shape
        return normal(B, T, H, D, dtype=dtype, device=device, seed=seed).transpose(1, 2)
    if layout == "sliced":
        B, H, T, D = shape
        buffer = normal(B, H + 1, T + 3, D + 6, dtype=dtype, device=device, seed=seed)
        return buffer[:, 1:, 2 : T + 2, 3 : D + 3]
    if layout == "expanded":
        row = normal(1, *shape[1:], dtype=dtype, device=device, seed=seed)
        return row.expand(*shape)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values.to(dtype=dtype, device=device)


def shift_parameters(
    H: int,
    D: int,
    *,
    keys: int = 1,
    virtual: tuple[int, int] | None = None,
    adapters: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight [H, D]``, ``bias [H]``, ``shift [H, D]``, or stacked ``[A, ...]``.

    ``virtual``: P and N, for ``[P, N, ...]`` in the place of ``[H, ...]``. The bias is about the lse of
    ``keys`` random keys, so that gates lie well inside (0, 1).
    """
    heads = (H,) if virtual is None else virtual
    shape = heads if adapters is None else (adapters, *heads)
    weight = normal(*shape, D, dtype=torch.float64, seed=seed) * D**-0.5
    bias = normal(*shape, dtype=torch.float64, seed=seed + 1) + math.log(max(keys, 1))
    if virtual is not None:
        bias -= math.log(virtual[1])
    shift = normal(*shape, D, dtype=torch.float64, seed=seed + 2)
    return tuple(x.to(dtype=dtype, device=device) for x in (weight, bias, shift))


def shifted_attention_inputs(
    B: int = 2,
    H: int = 4,
    G: int = 2,
    T: int = 37,
    S: int = 37,
    D: int = 16,
    *,
    virtual: tuple[int, int] | None = None,
    adapters: int | None = None,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: str = "dense",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """``q, k, v, weight, bias, shift``. Parameters are fp32 (fp64 beside fp64) unless told otherwise."""
    options = {"dtype": dtype, "device": device, "layout": layout}
    q = normal(B, H, T, D, seed=10 + seed, **options)
    k = normal(B, G, S, D, seed=11 + seed, **options)
    v = normal(B, G, S, D, seed=12 + seed, **options)
    if parameter_dtype is None:
        parameter_dtype = torch.promote_types(dtype, torch.float32)
    parameters = shift_parameters(
        H, D, keys=S, virtual=virtual, adapters=adapters, dtype=parameter_dtype, device=device, seed=13 + seed
    )
    return q, k, v, *parameters


def attention_shift_inputs(
    B: int = 2,
    H: int = 4,
    T: int = 37,
    D: int = 16,
    *,
    virtual: tuple[int, int] | None = None,
    adapters: int | None = None,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: str = "dense",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """``out, lse, q, weight, bias, shift``; lse is fp32 (fp64 beside fp64)."""
    acc = torch.promote_types(dtype, torch.float32)
    options = {"dtype": dtype, "device": device, "layout": layout}
    out = normal(B, H, T, D, seed=20 + seed, **options)
    q = normal(B, H, T, D, seed=21 + seed, **options)
    lse = normal(B, H, T, dtype=acc, device=device, seed=22 + seed)
    parameters = shift_parameters(
        H, D, virtual=virtual, adapters=adapters, dtype=parameter_dtype or acc, device=device, seed=23 + seed
    )
    return out, lse, q, *parameters


def output_gradients(
    B: int, H: int, T: int, D: int, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of ``out`` (in ``dtype``) and of ``lse`` (in fp32, or fp64)."""
    acc = torch.promote_types(dtype, torch.float32)
    dout = normal(B, H, T, D, dtype=dtype, device=device, seed=30 + seed)
    return dout, normal(B, H, T, dtype=acc, device=device, seed=31 + seed)


def residual_shift_inputs(
    B: int = 2,
    T: int = 13,
    C: int = 40,
    *,
    adapters: int | None = None,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: str = "dense",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [B, T, C]``, ``vector [C]`` or ``[A, C]``, ``scale []`` or ``[A]``.

    Args:
        layout: of x: "dense"; "tokens_first", a transposed ``[T, B, C]``; "sliced", a window of a larger
            buffer whose rows start at odd offsets; "expanded", one batch row seen B times (stride 0).
    """
    stack = () if adapters is None else (adapters,)
    parameter_dtype = parameter_dtype or torch.promote_types(dtype, torch.float32)
    x = hidden_states(B, T, C, dtype=dtype, device=device, layout=layout, seed=40 + seed)
    vector = normal(*stack, C, dtype=parameter_dtype, device=device, seed=41 + seed)
    scale = 0.5 + normal(*stack or (1,), dtype=torch.float64, seed=42 + seed).abs().reshape(stack)
    return x, vector, scale.to(dtype=parameter_dtype, device=device)


def token_ids(B: int, T: int, K: int, *, adapters: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Int32 ids ``[B, T, K]`` of every token's entries, any of them -1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, adapters, (B, T, K), dtype=torch.int32, generator=generator).to(device)


def hidden_states(
    B: int, T: int, C: int, *, dtype: torch.dtype, device: str = "cpu", layout: str = "dense", seed: int = 0
) -> Tensor:
    """``[B, T, C]`` in one of the layouts of :func:`residual_shift_inputs`."""
    options = {"dtype": dtype, "device": device, "seed": seed}
    if layout == "tokens_first":
        return normal(T, B, C, **options).transpose(0, 1)
    if layout == "sliced":
        return normal(B, T + 3, C + 6, **options)[:, 2 : T + 2, 3 : C + 3]
    return normal(B, T, C, layout=layout, **options)
