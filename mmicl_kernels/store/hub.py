"""The Hugging Face hub, where huggingface_hub is installed."""

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

from mmicl_kernels.durable import is_file, is_folder
from mmicl_kernels.methods.base import CONFIG_FILE, DESCRIPTION_FILE, TENSORS_FILE

# "owner/name" and nothing that could only be a path.
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def huggingface_hub(what: str) -> ModuleType:
    """The package. Raises ModuleNotFoundError: it is not installed, and ``what`` needs it."""
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        message = f"{what} huggingface_hub: pip install huggingface_hub"
        raise ModuleNotFoundError(message, name=error.name) from error


def adapter_folder(folder: str | os.PathLike, revision: str | None = None) -> str | os.PathLike:
    """``folder`` if it is there or does not look like "owner/name"; else where the hub's cache has its files.

    Only an adapter's JSON files and its safetensors are fetched, of the branch, tag or commit ``revision``.

    Raises:
        FileNotFoundError: nothing there, and the hub could not be asked or has not got it.
    """
    if not isinstance(folder, str) or not REPO_ID.fullmatch(folder):
        return folder
    if is_file(Path(folder)) or is_folder(Path(folder)):
        return folder
    where = folder if revision is None else f"{folder} at revision {revision!r}"
    try:
        hub = huggingface_hub("to ask the hub for a repository of this name needs")
        files = [CONFIG_FILE, TENSORS_FILE, DESCRIPTION_FILE]
        found = hub.snapshot_download(folder, revision=revision, allow_patterns=files)
    # Not found, gated, offline, and what the HTTP library of the day raises: they share no other class.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{folder!r} is no folder here ({Path.cwd()}), and {where} could not be had from the hub: "
            f"{type(error).__name__}: {reason}"
        ) from error
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not os.path.isfile(os.path.join(found, name)):
            raise FileNotFoundError(
                f"{folder!r} is no folder here ({Path.cwd()}), and {where} on the hub has no {name}, "
                "expected an adapter that save_pretrained wrote"
            )
    return found
