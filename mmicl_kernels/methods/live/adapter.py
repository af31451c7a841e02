"""The parameters of LIVE: one vector and its scale per decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone, tensors_of
from mmicl_kernels.methods.live.config import LIVEConfig
from mmicl_kernels.methods.sites import ResidualSite
from mmicl_kernels.modules import ResidualShift

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective


class LIVEAdapter(Adapter):
    """``layers["0"].vector, .scale`` and so on: ``[C]`` and ``[]`` of that layer.

    ``x' = (x + scale * vector) |x| / |x + scale * vector|`` on every token, ``x`` being the output of the
    layer's MLP (or of the layer, ``config.site``). vector ~ N(0, 0.01), scale = 0.1: 131,104 parameters for
    32 layers of width 4096.
    """

    method = "live"
    config_class = LIVEConfig

    def __init__(self, config: LIVEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.residual_sites = (ResidualSite(config.site, preserve_norm=True),)
        for index in backbone.layers:
            self.layers[str(index)] = ResidualShift(backbone.hidden_size, preserve_norm=True, dtype=DTYPE)

    @staticmethod
    def tensor_shapes(config: LIVEConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for index in backbone.layers:
            shapes[f"layers.{index}.vector"] = (backbone.hidden_size,)
            shapes[f"layers.{index}.scale"] = ()
        return shapes

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.live.objective import LIVEObjective

        return LIVEObjective

    def residual_shift(self, site: ResidualSite, index: str) -> tuple[Tensor, Tensor]:
        return tensors_of(self, (index,), "vector", "scale")
