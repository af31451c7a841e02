"""The official code's checkpoints, ``encoder.pth`` of github.com/Kamichanw/MimIC."""

from typing import Any

import torch
from torch import Tensor

from mmicl_kernels.methods.base import Backbone, CheckpointError, check_tensors, stored
from mmicl_kernels.methods.mimic.adapter import MimICAdapter
from mmicl_kernels.methods.mimic.config import MimICConfig


def from_encoder(encoder: dict[str, Any], source: str, backbone: Backbone) -> MimICAdapter:
    """Dtype and bits unchanged; ``normalizer`` is "all_keys", which is what that code computes.

    Raises CheckpointError: not of the multi-head variant, or of another geometry.
    """
    shift = encoder["attn_shift"]
    indices = list(backbone.layers)
    expected = None if backbone.geometry is None else (len(indices), *backbone.geometry)
    if tuple(shift.shape) != expected:
        raise CheckpointError(
            f"{source}: attn_shift has shape {list(shift.shape)}, expected "
            f"[layers, heads, head dim] = {list(expected or ())} of this model (one shift per head)"
        )
    config = MimICConfig("all_keys", alignment="mean_square", ffn_shift="ffn_shift" in encoder)
    tensors = {}
    for row, index in enumerate(indices):
        tensors[f"layers.{index}.shift"] = shift[row].clone()
        for name in ("weight", "bias"):
            key = f"log_Z1_lin.{row}.{name}"
            if key not in encoder:
                raise CheckpointError(f"{source} lacks {key}")
            tensors[f"layers.{index}.{name}"] = encoder[key]
    if config.ffn_shift:
        tensors["ffn_shift"] = encoder["ffn_shift"]
    unknown = len(encoder) - 1 - 2 * len(indices) - config.ffn_shift
    if unknown:
        raise CheckpointError(f"{source} has {unknown} tensors beside those of MimIC")
    check_tensors(source, tensors, MimICAdapter.tensor_shapes(config, backbone))
    return MimICAdapter.from_tensors(config, backbone, tensors)


def to_encoder(adapter: MimICAdapter) -> dict[str, Tensor]:
    """Raises ValueError: its gate is not the official one, its layers differ in shape, or it holds NaN."""
    if adapter.config.normalizer != "all_keys":
        raise ValueError(
            f"normalizer is {adapter.config.normalizer!r}; the official code always computes "
            "'all_keys', so it would run this adapter as something else"
        )
    if adapter.backbone.geometry is None:
        raise ValueError("layers differ in heads or head dim, expected one shape for all of them")
    shapes = adapter.tensor_shapes(adapter.config, adapter.backbone)
    tensors = stored("adapter", adapter.state_dict(), shapes)
    layers = list(adapter.layers)
    encoder = {"attn_shift": torch.stack([tensors[f"layers.{index}.shift"] for index in layers])}
    for row, index in enumerate(layers):
        for name in ("weight", "bias"):
            encoder[f"log_Z1_lin.{row}.{name}"] = tensors[f"layers.{index}.{name}"]
    if adapter.config.ffn_shift:
        encoder["ffn_shift"] = tensors["ffn_shift"]
    return encoder
