"""Checkpoints of the official code of MimIC and HiFICL, both called ``encoder.pth``."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from mmicl_kernels.durable import is_file, replacing
from mmicl_kernels.methods.base import Adapter, Backbone, CheckpointError, is_plain
from mmicl_kernels.methods.hificl import HiFICLAdapter
from mmicl_kernels.methods.hificl import official as hificl
from mmicl_kernels.methods.mimic import MimICAdapter
from mmicl_kernels.methods.mimic import official as mimic

# By a tensor that only it has.
FORMATS = {"attn_shift": mimic, "K_learn_A": hificl}
WRITERS = {MimICAdapter: mimic, HiFICLAdapter: hificl}
# What torch.load's unpicklers trip over in damaged files: found by damaging files at random.
DAMAGED = (
    pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError,
    LookupError, AttributeError, TypeError, AssertionError,
)  # fmt: skip


def read_official(path: str | os.PathLike, backbone: Backbone) -> Adapter:
    """Read ``encoder.pth`` of github.com/Kamichanw/MimIC or github.com/bbbandari/HiFICL for ``backbone``,
    dtype and bits unchanged.

    The adapter gets ``normalizer="all_keys"``, which is what that code computes.

    Raises:
        FileNotFoundError: no such file. CheckpointError: no such checkpoint, or of another geometry.
    """
    encoder = _load_tensors(Path(path))
    for name, official in FORMATS.items():
        if name in encoder:
            return official.from_encoder(encoder, str(path), backbone)
    names = ", ".join(FORMATS)
    raise CheckpointError(f"{path} has none of {names}, expected an encoder.pth of MimIC or HiFICL")


def save_official(adapter: Adapter, path: str | os.PathLike) -> None:
    """Write ``adapter`` as its official code's ``encoder.pth``.

    Raises:
        TypeError: neither MimIC nor HiFICL. ValueError: its gate is not the official one
        (``normalizer="all_keys"``), its layers differ in shape, which the format cannot hold, or its tensors
        could not be read back, as NaN could not. OSError: the disk. The old file is left then.
    """
    official = WRITERS.get(type(adapter))
    if official is None:
        expected = " or ".join(x.__name__ for x in WRITERS)
        raise TypeError(f"adapter is a {type(adapter).__name__}, expected a {expected}")
    encoder = official.to_encoder(adapter)
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
