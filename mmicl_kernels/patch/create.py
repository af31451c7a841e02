"""Make or load an adapter for a model."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmicl_kernels.methods import ADAPTERS, Adapter
from mmicl_kernels.methods.base import CheckpointError
from mmicl_kernels.methods.official import LORA_FILE, belongs_to_lora, read_official
from mmicl_kernels.models.anchors import (
    Anchor,
    check_backbone,
    compute_device,
    describe_backbone,
    find_anchors,
    refuse_adapter,
    unwrap,
)
from mmicl_kernels.store import adapter_folder, read_adapter


def create(model: nn.Module, config: Any) -> Adapter:
    """A freshly initialised adapter for ``model``, in fp32 on its devices, not attached.

    ``config`` is that of a method in ``methods.ADAPTERS``.

    Neither torch's default dtype nor its default device matters.

    Raises:
        UnsupportedModelError: unknown family, or the method cannot apply to it. TypeError: ``config`` is of
        no known method.
    """
    model = unwrap(model)
    anchors = find_anchors(model)
    with torch.device("cpu"):
        adapter = _new(model, anchors, config)
    return _place(adapter, model, anchors)


def outline(model: nn.Module, config: Any) -> Adapter:
    """What :func:`create` makes, without any numbers (on "meta"). Raises as that."""
    model = unwrap(model)
    anchors = find_anchors(model)
    with torch.device("meta"):
        return _new(model, anchors, config)


def load(folder: str | os.PathLike, model: nn.Module, *, revision: str | None = None) -> Adapter:
    """Read an adapter that ``save_pretrained`` wrote, check that it is ``model``'s, and place it.

    Args:
        folder: or the file of a library's entry, or "owner/name" of a repository of the Hugging Face hub,
            which is asked where no such folder is, if huggingface_hub is installed. revision: branch, tag or
            commit there; a folder has none.

    Raises:
        UnsupportedModelError. FileNotFoundError: nothing there, or the hub's reason. CheckpointError: an
        unreadable file, or an adapter of another backbone.
    """
    model = unwrap(model)
    anchors = find_anchors(model)
    found = adapter_folder(folder, revision)
    adapter = read_adapter(found)
    adapter.source = Path(found)
    check_backbone(adapter, describe_backbone(model, anchors))
    return _place(adapter, model, anchors)


def load_official(path: str | os.PathLike, model: nn.Module) -> Adapter:
    """Read ``encoder.pth`` of the official code of MimIC (LIVE's, too) or HiFICL, or LIVE's ``icv_cpk.pth``.

    ``normalizer`` is "all_keys": methods/mimic/README.md says what padded batches need to give that code's
    numbers. A LoRA beside the file was trained together with it: ``model`` must have
    one, which is not compared.

    Raises: as :func:`load`; CheckpointError too if there is a LoRA beside it and none in ``model``. The file
    does not say which model it belongs to: only shapes are checked.
    """
    model = unwrap(model)
    anchors = find_anchors(model)
    adapter = read_official(path, describe_backbone(model, anchors))
    if belongs_to_lora(path) and not any("lora_A" in name for name, _ in model.named_modules()):
        folder = Path(path).parent
        raise CheckpointError(
            f"{folder} has {LORA_FILE} beside {Path(path).name}: a LoRA was trained together with it, and "
            f"model has none, expected peft.PeftModel.from_pretrained(model, {str(folder)!r}) as the model "
            "(or, where it is merged into the model, the file without that beside it)"
        )
    return _place(adapter, model, anchors)


def _new(model: nn.Module, anchors: list[Anchor], config: Any) -> Adapter:
    adapter_class = ADAPTERS.of_config(config)
    if adapter_class is None:
        ADAPTERS.load_all()
        adapter_class = ADAPTERS.of_config(config)
    if adapter_class is None:
        names = ", ".join(x.config_class.__name__ for x in ADAPTERS.known)
        raise TypeError(f"config is a {type(config).__name__}, expected one of {names}")
    adapter = adapter_class(config, describe_backbone(model, anchors))
    refuse_adapter(model, adapter, anchors)
    return adapter


def _place(adapter: Adapter, model: nn.Module, anchors: list[Anchor]) -> Adapter:
    splices = adapter.embedding_site is not None
    adapter.to(compute_device(model.get_input_embeddings()) if splices else anchors[0].device)
    for anchor in anchors:
        if str(anchor.index) in adapter.layers:
            adapter.layers[str(anchor.index)].to(anchor.device)
    return adapter
