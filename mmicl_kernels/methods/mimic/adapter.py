"""The parameters of MimIC: one attention shift per decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone, tensors_of
from mmicl_kernels.methods.mimic.config import MimICConfig
from mmicl_kernels.methods.sites import AttentionSite, ResidualSite
from mmicl_kernels.modules import AttentionShift
from mmicl_kernels.modules.attention_shift import SHIFT_STD

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective

FFN_SITE = ResidualSite("mlp", preserve_norm=True)


class MimICAdapter(Adapter):
    """``layers["0"].weight, .bias, .shift`` and so on: ``[H, D]``, ``[H]``, ``[H, D]`` of that layer.

    Initialised as in the paper: 263,168 parameters for 32 layers of 32 heads of 128. Layers may differ
    in heads and head dim; those without softmax attention have no shift. ``ffn_shift [L, C]``, of every
    layer, exists only with ``config.ffn_shift``; as in the official code it is added to the MLP's output,
    whose norm is kept.
    """

    method = "mimic"
    config_class = MimICConfig

    def __init__(self, config: MimICConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.attention_site = AttentionSite(config.normalizer)
        for index, (num_heads, head_dim) in backbone.attention_layers.items():
            self.layers[str(index)] = AttentionShift(num_heads, head_dim, dtype=DTYPE)
        if config.ffn_shift:
            self.residual_sites = (FFN_SITE,)
            shape = (len(backbone.layers), backbone.hidden_size)
            self.ffn_shift = nn.Parameter(torch.randn(shape, dtype=DTYPE) * SHIFT_STD)

    @staticmethod
    def tensor_shapes(config: MimICConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for index, (num_heads, head_dim) in backbone.attention_layers.items():
            shapes[f"layers.{index}.weight"] = (num_heads, head_dim)
            shapes[f"layers.{index}.bias"] = (num_heads,)
            shapes[f"layers.{index}.shift"] = (num_heads, head_dim)
        if config.ffn_shift:
            shapes["ffn_shift"] = (len(backbone.layers), backbone.hidden_size)
        return shapes

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.mimic.objective import MimICObjective

        return MimICObjective

    def attention_shift(self, index: str) -> tuple[Tensor, Tensor, Tensor]:
        return tensors_of(self, (index,), "weight", "bias", "shift")

    attention_parts = attention_shift

    def residual_shift(self, site: ResidualSite, index: str) -> tuple[Tensor, float]:
        return self.ffn_shift[list(self.backbone.layers).index(int(index))], 1.0
