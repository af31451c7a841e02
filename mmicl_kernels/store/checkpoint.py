"""Adapters of any method on disk."""

import os
from pathlib import Path

from mmicl_kernels.durable import is_file
from mmicl_kernels.methods import ADAPTERS, Adapter, CheckpointError
from mmicl_kernels.methods.base import read_description
from mmicl_kernels.store.entry_file import read_all


def read_adapter(folder: str | os.PathLike) -> Adapter:
    """Read an adapter of any method, from its folder or from the file of a VLibrary's entry.

    Raises as ``Adapter.from_pretrained``.
    """
    if is_file(Path(folder)):
        return read_all(Path(folder))[1]
    method = read_description(folder)["method"]
    if method not in ADAPTERS:
        raise CheckpointError(
            f"{folder} holds an adapter of method {method!r}, expected one of {sorted(ADAPTERS)}"
        )
    return ADAPTERS[method].from_pretrained(folder)
