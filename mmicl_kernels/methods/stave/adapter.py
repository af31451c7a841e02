"""The parameters of STAVE: two vectors for the tokens that enter the first layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone
from mmicl_kernels.methods.sites import ResidualSite
from mmicl_kernels.methods.stave.config import STAVEConfig

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective


class STAVEAdapter(Adapter):
    """``layers["0"].vector [2, C]``: of a prompt's readout tokens, and of its other ones, the context.

    ``E'_t = E_t + vector[r] / sqrt(N_r)`` where token t is one of the N_r of slot r; nothing is added to what
    begins a text, to padding and to generated tokens. vector = 0 at first: 8,192 numbers of width 4096.
    """

    method = "stave"
    config_class = STAVEConfig

    def __init__(self, config: STAVEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.residual_sites = (ResidualSite("input", preserve_norm=False, readout=config.readout),)
        self._first = str(min(backbone.layers))
        vector = torch.zeros(2, backbone.hidden_size, dtype=DTYPE)
        self.layers[self._first] = nn.ParameterDict({"vector": vector})

    @staticmethod
    def tensor_shapes(config: STAVEConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        return {f"layers.{min(backbone.layers)}.vector": (2, backbone.hidden_size)}

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.stave.objective import STAVEObjective

        return STAVEObjective

    def residual_shift(self, site: ResidualSite, index: str) -> tuple[Tensor, float]:
        return self.layers[self._first]["vector"], 1.0
