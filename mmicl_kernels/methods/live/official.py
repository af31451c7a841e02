"""Checkpoints of LIVE: ``encoder.pth`` of MimIC's repository, and its authors' own ``icv_cpk.pth``."""

import re
from typing import Any

import torch
from torch import Tensor

from mmicl_kernels.methods.base import Backbone, CheckpointError, check_tensors, stored
from mmicl_kernels.methods.live.adapter import LIVEAdapter
from mmicl_kernels.methods.live.config import LIVEConfig

ENCODER = ("ffn_shift", "ffn_shift_scale")  # [L, C], [L]
OWN = ("icv_encoder.icv", "icv_encoder.alpha")  # [1, L, C], [1, L]


def from_encoder(encoder: dict[str, Any], source: str, backbone: Backbone) -> LIVEAdapter:
    """Of MimIC's repository, dtype and bits unchanged; it acts on the MLPs' outputs.

    Raises CheckpointError: other tensors, or of another geometry.
    """
    L = len(backbone.layers)
    check_tensors(source, encoder, dict(zip(ENCODER, ((L, backbone.hidden_size), (L,)), strict=True)))
    return _adapter(*(encoder[name] for name in ENCODER), LIVEConfig(site="mlp"), backbone)


def from_own(checkpoint: dict[str, Any], source: str, backbone: Backbone) -> LIVEAdapter:
    """Of LIVE's own repository, whose settings say which modules' outputs are shifted, and of all layers.

    Raises CheckpointError: other tensors, of another geometry, or settings that no ``LIVEConfig`` has.
    """
    settings = checkpoint.get("lmm_args", checkpoint.get("icv_intervention_args"))
    modules = settings.get("layer_format") if isinstance(settings, dict) else None
    found = re.search(r"(?:^|\.)<LAYER_NUM>(\.mlp)?$", modules) if isinstance(modules, str) else None
    if found is None:
        raise CheckpointError(
            f"{source} has layer_format {modules!r} in its lmm_args, expected a name that ends in "
            "<LAYER_NUM> or <LAYER_NUM>.mlp"
        )
    tensors = {name: x for name, x in checkpoint.items() if isinstance(x, Tensor) and name != "temperature"}
    L = len(backbone.layers)
    check_tensors(source, tensors, dict(zip(OWN, ((1, L, backbone.hidden_size), (1, L)), strict=True)))
    vectors, scales = (tensors[name][0] for name in OWN)
    scales = scales.sigmoid() if checkpoint.get("use_sigmoid") else scales
    return _adapter(vectors, scales, LIVEConfig(site="mlp" if found[1] else "layer"), backbone)


def to_encoder(adapter: LIVEAdapter) -> dict[str, Tensor]:
    """Raises ValueError: it acts on the layers' outputs, which the format does not know, or it holds NaN."""
    if adapter.config.site != "mlp":
        raise ValueError(
            f"site is {adapter.config.site!r}, expected 'mlp': the code that reads an encoder.pth of LIVE "
            "shifts the MLPs' outputs, so it would run this adapter as something else"
        )
    tensors = stored("adapter", adapter.state_dict(), adapter.tensor_shapes(adapter.config, adapter.backbone))
    return {
        name: torch.stack([tensors[f"layers.{index}.{part}"] for index in adapter.layers])
        for name, part in zip(ENCODER, ("vector", "scale"), strict=True)
    }


def _adapter(vectors: Tensor, scales: Tensor, config: LIVEConfig, backbone: Backbone) -> LIVEAdapter:
    tensors = {}
    for row, index in enumerate(backbone.layers):
        tensors[f"layers.{index}.vector"] = vectors[row].clone()
        tensors[f"layers.{index}.scale"] = scales[row].clone()
    return LIVEAdapter.from_tensors(config, backbone, tensors)
