"""The official code's checkpoints, ``encoder.pth`` of github.com/bbbandari/HiFICL."""

from typing import Any

import torch
from torch import Tensor

from mmicl_kernels.methods.base import Backbone, CheckpointError, check_tensors, stored
from mmicl_kernels.methods.hificl.adapter import PARTS, HiFICLAdapter
from mmicl_kernels.methods.hificl.config import HiFICLConfig

NAMES = ("K_learn_A", "K_learn_B", "V_learn_A", "V_learn_B")  # [L, H, N, R], [L, H, R, D]


def from_encoder(encoder: dict[str, Any], source: str, backbone: Backbone) -> HiFICLAdapter:
    """Dtype and bits unchanged; ``normalizer`` is "all_keys", which is what that code computes.

    Raises CheckpointError: other tensors, or of another geometry.
    """
    missing, extra = set(NAMES) - encoder.keys(), encoder.keys() - set(NAMES)
    if missing or extra:
        raise CheckpointError(f"{source} lacks {sorted(missing)} and has {sorted(extra)} beside {NAMES}")
    indices, first = list(backbone.layers), encoder["K_learn_A"]
    if first.dim() != 4 or len(first) != len(indices):
        raise CheckpointError(
            f"{source}: K_learn_A has shape {list(first.shape)}, expected [layers, heads, keys, rank] of "
            f"{len(indices)} layers"
        )
    if 0 in first.shape:
        raise CheckpointError(f"{source}: K_learn_A has shape {list(first.shape)}, expected keys and a rank")
    config = HiFICLConfig(first.shape[2], first.shape[3], normalizer="all_keys")
    shapes = HiFICLAdapter.tensor_shapes(config, backbone)
    expected = {
        name: (len(indices), *shapes.get(f"layers.{indices[0]}.{part}", ()))
        for name, part in zip(NAMES, PARTS, strict=True)
    }
    check_tensors(source, encoder, expected)
    tensors = {
        f"layers.{index}.{part}": encoder[name][row].clone()
        for row, index in enumerate(indices)
        for name, part in zip(NAMES, PARTS, strict=True)
    }
    check_tensors(source, tensors, shapes)
    return HiFICLAdapter.from_tensors(config, backbone, tensors)


def to_encoder(adapter: HiFICLAdapter) -> dict[str, Tensor]:
    """Raises ValueError: its gate is not the official one, its layers differ in shape, or it holds NaN."""
    if adapter.config.normalizer != "all_keys" or not adapter.config.prefix:
        raise ValueError(
            f"config is {adapter.config}, expected normalizer='all_keys' and a prefix: the official code "
            "always computes these, so it would run this adapter as something else"
        )
    if adapter.backbone.geometry is None:
        raise ValueError("layers differ in heads or head dim, expected one shape for all of them")
    shapes = adapter.tensor_shapes(adapter.config, adapter.backbone)
    tensors = stored("adapter", adapter.state_dict(), shapes)
    return {
        name: torch.stack([tensors[f"layers.{index}.{part}"] for index in adapter.layers])
        for name, part in zip(NAMES, PARTS, strict=True)
    }
