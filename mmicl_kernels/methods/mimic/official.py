"""The official code's checkpoints, ``encoder.pth`` of github.com/Kamichanw/MimIC."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from mmicl_kernels.durable import is_file, replacing
from mmicl_kernels.methods.base import Backbone, CheckpointError, check_tensors, is_plain, stored
from mmicl_kernels.methods.mimic.adapter import MimICAdapter
from mmicl_kernels.methods.mimic.config import MimICConfig

# What torch.load's unpicklers trip over in damaged files: found by damaging files at random.
DAMAGED = (
    pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError,
    LookupError, AttributeError, TypeError, AssertionError,
)  # fmt: skip


def read_official(path: str | os.PathLike, backbone: Backbone) -> MimICAdapter:
    """Read ``encoder.pth`` of github.com/Kamichanw/MimIC for ``backbone``, dtype and bits unchanged.

    The adapter gets ``normalizer="all_keys"``, which is what that code computes.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint of the multi-head variant,
        or of another geometry.
    """
    encoder = _load_tensors(Path(path))
    if "attn_shift" not in encoder:
        raise CheckpointError(f"{path} has no attn_shift, expected an encoder.pth of MimIC")
    shift = encoder["attn_shift"]
    indices = list(backbone.layers)
    heads = set(backbone.layers.values())
    expected = (len(indices), *heads.pop()) if len(heads) == 1 else None
    if tuple(shift.shape) != expected:
        raise CheckpointError(
            f"{path}: attn_shift has shape {list(shift.shape)}, expected "
            f"[layers, heads, head dim] = {list(expected or ())} of this model (one shift per head)"
        )
    config = MimICConfig("all_keys", alignment="mean_square", ffn_shift="ffn_shift" in encoder)
    tensors = {}
    for row, index in enumerate(indices):
        tensors[f"layers.{index}.shift"] = shift[row].clone()
        for name in ("weight", "bias"):
            key = f"log_Z1_lin.{row}.{name}"
            if key not in encoder:
                raise CheckpointError(f"{path} lacks {key}")
            tensors[f"layers.{index}.{name}"] = encoder[key]
    if config.ffn_shift:
        tensors["ffn_shift"] = encoder["ffn_shift"]
    unknown = len(encoder) - 1 - 2 * len(indices) - config.ffn_shift
    if unknown:
        raise CheckpointError(f"{path} has {unknown} tensors beside those of MimIC")
    check_tensors(str(path), tensors, MimICAdapter.tensor_shapes(config, backbone))
    return MimICAdapter.from_tensors(config, backbone, tensors)


def save_official(adapter: MimICAdapter, path: str | os.PathLike) -> None:
    """Write ``adapter`` as the official code's ``encoder.pth``.

    Raises:
        TypeError: not a MimIC adapter. ValueError: its gate is not the official one
        (``normalizer="all_keys"``), its layers differ in shape, which the format cannot hold, or its tensors
        could not be read back, as NaN could not. OSError: the disk. The old file is left then.
    """
    if not isinstance(adapter, MimICAdapter):
        raise TypeError(f"adapter is a {type(adapter).__name__}, expected a MimICAdapter")
    if adapter.config.normalizer != "all_keys":
        raise ValueError(
            f"normalizer is {adapter.config.normalizer!r}; the official code always computes "
            "'all_keys', so it would run this adapter as something else"
        )
    heads = set(adapter.backbone.layers.values())
    if len(heads) != 1 or (0, 0) in heads:
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
    with replacing(Path(path)) as (temporary,):
        torch.save(encoder, temporary)


def _load_tensors(path: Path) -> dict[str, Any]:
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist, expected an encoder.pth")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise CheckpointError(f"{path} is not a checkpoint of tensors: {error}") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and is_plain(x) for key, x in loaded.items()
    ):
        raise CheckpointError(f"{path} does not hold a dict of dense tensors")
    return loaded
