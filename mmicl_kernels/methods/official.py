"""Checkpoints of the official code of MimIC, HiFICL and LIVE, most of them called ``encoder.pth``."""

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
from mmicl_kernels.methods.live import LIVEAdapter
from mmicl_kernels.methods.live import official as live
from mmicl_kernels.methods.mimic import MimICAdapter
from mmicl_kernels.methods.mimic import official as mimic

# By a tensor that only it has.
READERS = {
    "attn_shift": mimic.from_encoder, "K_learn_A": hificl.from_encoder,
    "ffn_shift_scale": live.from_encoder, "icv_encoder.icv": live.from_own,
}  # fmt: skip
WRITERS = {MimICAdapter: mimic, HiFICLAdapter: hificl, LIVEAdapter: live}
SETTINGS = {"lmm_args": dict, "icv_intervention_args": dict, "use_sigmoid": bool}  # beside LIVE's own tensors
# Of peft, beside an encoder.pth that was trained together with a LoRA.
LORA_FILE = "adapter_config.json"
# What torch.load's unpicklers trip over in damaged files: found by damaging files at random.
DAMAGED = (
    pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError,
    LookupError, AttributeError, TypeError, AssertionError,
)  # fmt: skip


def read_official(path: str | os.PathLike, backbone: Backbone) -> Adapter:
    """Read a checkpoint for ``backbone``, dtype and bits unchanged.

    It is ``encoder.pth`` of github.com/Kamichanw/MimIC or github.com/bbbandari/HiFICL, or ``icv_cpk.pth`` of
    github.com/ForJadeForest/LIVE-Learnable-In-Context-Vector.

    An adapter with a gate gets ``normalizer="all_keys"``, which is what that code computes.

    Raises:
        FileNotFoundError: no such file. CheckpointError: no such checkpoint, or of another geometry.
    """
    encoder = _load_tensors(Path(path))
    for name, read in READERS.items():
        if name in encoder:
            return read(encoder, str(path), backbone)
    names = ", ".join(READERS)
    raise CheckpointError(f"{path} has none of {names}, expected a checkpoint of MimIC, HiFICL or LIVE")


def belongs_to_lora(path: str | os.PathLike) -> bool:
    """Whether the official code wrote a LoRA beside ``encoder.pth``, trained together with it."""
    return is_file(Path(path).parent / LORA_FILE)


def save_official(adapter: Adapter, path: str | os.PathLike) -> None:
    """Write ``adapter`` as its official code's ``encoder.pth``.

    Raises:
        TypeError: of another method. ValueError: its gate is not the official one
        (``normalizer="all_keys"``), the format cannot hold its layers of several shapes or its site, or its
        tensors could not be read back, as NaN could not. OSError: the disk. The old file is left then.
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
        isinstance(key, str) and (type(x) is SETTINGS[key] if key in SETTINGS else is_plain(x))
        for key, x in loaded.items()
    ):
        raise CheckpointError(f"{path} does not hold a dict of dense tensors")
    return loaded
