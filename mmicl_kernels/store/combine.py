"""Vectors as values: the weighted sum of adapters that add vectors to the residual stream."""

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from mmicl_kernels.methods import Adapter, CheckpointError

REASONS = {
    "mimic": "how much of its shift it adds depends on the query and on every head's own gate, so that no "
    "MimIC adapter acts as the sum of two",
    "aim": "it learns a projection of tokens, not a vector that is added",
}
VECTOR = ".vector"


def combine_adapters(terms: Mapping[str, tuple[Adapter, float]]) -> Adapter:
    """The adapter whose vectors are the sum of ``weight * scale * vector``, and whose scales are 1.

    ``terms`` are ``(adapter, weight)`` by name. The sum is taken in fp64 and rounded once, to the widest
    dtype among fp32 and the adapters': products with a small scale are zero in fp16. Their configs may
    differ in how they were trained; the result has the first's.

    Raises:
        ValueError: no terms, a weight that is no finite number, or a method without vectors.
        CheckpointError: adapters of different methods, sites or backbones, or a sum that overflows.
    """
    if not terms:
        raise ValueError("weights is empty, expected at least one entry")
    weights = {name: _finite(name, weight) for name, (_, weight) in terms.items()}
    (first_name, (first, _)), *others = terms.items()
    for name, (other, _) in others:
        _check_alike(first_name, first, name, other)
    states = [(adapter.state_dict(), weights[name]) for name, (adapter, _) in terms.items()]
    tensors = {}
    for vector, scale in _vectors_and_scales(first).items():
        dtype = torch.float32
        for state, _ in states:
            dtype = torch.promote_types(dtype, state[vector].dtype)
        total = sum(weight * _product(state, vector, scale) for state, weight in states)
        tensors[vector] = total.to(dtype)
        if not bool(torch.isfinite(tensors[vector]).all()):
            raise CheckpointError(f"the sum of {list(terms)} overflows {dtype} in {vector}")
        if scale is not None:
            tensors[scale] = torch.ones_like(states[0][0][scale], dtype=dtype)
    return type(first).from_tensors(first.config, first.backbone, tensors)


def _finite(name: str, weight: Real) -> float:
    try:
        if isinstance(weight, Real) and not isinstance(weight, bool) and math.isfinite(weight):
            return float(weight)
    except OverflowError:  # an integer beyond fp64
        pass
    raise ValueError(f"weight of {name!r} is {weight!r:.80}, expected a finite number")


def _product(state: Mapping[str, Tensor], vector: str, scale: str | None) -> Tensor:
    """``scale * vector`` in fp64, where the product of two fp32 numbers is exact."""
    product = state[vector].double().cpu()
    return product if scale is None else product * state[scale].double().cpu()


def _vectors_and_scales(adapter: Adapter) -> dict[str, str | None]:
    """Name of each vector in the state dict -> name of its scale, if it has one."""
    if adapter.method in REASONS:
        raise ValueError(f"adapters of {adapter.method} cannot be combined: {REASONS[adapter.method]}")
    names = set(adapter.state_dict())
    found = {}
    for name in sorted(names):
        if name.endswith(VECTOR):
            scale = name.removesuffix(VECTOR) + ".scale"
            found[name] = scale if scale in names else None
    strangers = names - found.keys() - set(found.values())
    if strangers or not adapter.residual_sites:
        raise ValueError(
            f"adapters of {adapter.method} cannot be combined: they have the parameters "
            f"{sorted(strangers)[:3]}, expected nothing but vectors of the residual stream and their scales"
        )
    return found


def _check_alike(first_name: str, first: Adapter, name: str, other: Adapter) -> None:
    pair = f"{first_name!r} and {name!r} cannot be combined"
    if first.method != other.method:
        raise CheckpointError(f"{pair}: their methods are {first.method} and {other.method}")
    if first.residual_sites != other.residual_sites:
        raise CheckpointError(f"{pair}: they act at {first.residual_sites} and {other.residual_sites}")
    differences = first.backbone.differences(other.backbone)
    if differences:
        raise CheckpointError(f"{pair}: they belong to different backbones: {'; '.join(differences)}")
