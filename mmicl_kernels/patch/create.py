"""Make or load an adapter for a model."""

import os
from pathlib import Path

import torch
from torch import nn

from mmicl_kernels.methods import (
    ADAPTERS,
    Adapter,
    AIMAdapter,
    AIMConfig,
    LIVEConfig,
    M2IVConfig,
    MimICAdapter,
    MimICConfig,
)
from mmicl_kernels.models.anchors import (
    Anchor,
    check_backbone,
    compute_device,
    describe_backbone,
    find_anchors,
    refuse_method,
    unwrap,
)
from mmicl_kernels.store import adapter_folder, read_adapter, read_official


def create(model: nn.Module, config: MimICConfig | M2IVConfig | LIVEConfig | AIMConfig) -> Adapter:
    """A freshly initialised adapter for ``model``, in fp32 on its devices, not attached.

    Neither torch's default dtype nor its default device matters.

    Raises:
        UnsupportedModelError: unknown family, or the method cannot apply to it. TypeError: ``config`` is of
        no known method.
    """
    model = unwrap(model)
    anchors = find_anchors(model)
    for adapter_class in ADAPTERS.values():
        if isinstance(config, adapter_class.config_class):
            refuse_method(model, adapter_class.method, anchors)
            backbone = describe_backbone(model, anchors)
            with torch.device("cpu"):
                adapter = adapter_class(config, backbone)
            return _place(adapter, model, anchors)
    names = ", ".join(adapter.config_class.__name__ for adapter in ADAPTERS.values())
    raise TypeError(f"config is a {type(config).__name__}, expected one of {names}")


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


def load_official(path: str | os.PathLike, model: nn.Module) -> MimICAdapter:
    """Read ``encoder.pth`` of the official MimIC code for ``model``; ``normalizer`` is "all_keys".

    Raises: as :func:`load`. The file does not say which model it belongs to: only shapes are checked.
    """
    model = unwrap(model)
    anchors = find_anchors(model)
    return _place(read_official(path, describe_backbone(model, anchors)), model, anchors)


def _place(adapter: Adapter, model: nn.Module, anchors: list[Anchor]) -> Adapter:
    if isinstance(adapter, AIMAdapter):
        return adapter.to(compute_device(model.get_input_embeddings()))
    for anchor in anchors:
        if str(anchor.index) in adapter.layers:
            adapter.layers[str(anchor.index)].to(anchor.device)
    if isinstance(adapter, MimICAdapter) and adapter.config.ffn_shift:
        adapter.ffn_shift.data = adapter.ffn_shift.data.to(anchors[0].device)
    return adapter
