"""The parameters of M2IV: two vectors and their scales per decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone, tensors_of
from mmicl_kernels.methods.m2iv.config import M2IVConfig
from mmicl_kernels.methods.sites import ResidualSite
from mmicl_kernels.modules import ResidualShift

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective

AFTER_ATTENTION = ResidualSite("after_attention", preserve_norm=False)
# The layer's output is its input plus both branches, so this is where the MLP's branch has arrived.
AFTER_MLP = ResidualSite("layer", preserve_norm=False)


class M2IVLayer(nn.Module):
    """One layer's two shifts: ``attn`` after the attention branch, ``mlp`` after the MLP branch."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attn = ResidualShift(hidden_size, dtype=DTYPE)
        self.mlp = ResidualShift(hidden_size, dtype=DTYPE)


class M2IVAdapter(Adapter):
    """``layers["0"].attn.vector, .attn.scale, .mlp.vector, .mlp.scale`` and so on: ``[C]`` and ``[]``.

    ``h_l = h_{l-1} + (a_l + attn.scale * attn.vector) + (m_l + mlp.scale * mlp.vector)`` on every token,
    ``a_l`` and ``m_l`` being the outputs of the layer's two branches. vector ~ N(0, 0.01), scale = 0.1:
    262,208 parameters for 32 layers of width 4096.
    """

    method = "m2iv"
    config_class = M2IVConfig
    residual_sites = AFTER_ATTENTION, AFTER_MLP

    def __init__(self, config: M2IVConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        for index in backbone.layers:
            self.layers[str(index)] = M2IVLayer(backbone.hidden_size)

    @staticmethod
    def tensor_shapes(config: M2IVConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for index in backbone.layers:
            for branch in ("attn", "mlp"):
                shapes[f"layers.{index}.{branch}.vector"] = (backbone.hidden_size,)
                shapes[f"layers.{index}.{branch}.scale"] = ()
        return shapes

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.m2iv.objective import M2IVObjective

        return M2IVObjective

    def residual_shift(self, site: ResidualSite, index: str) -> tuple[Tensor, Tensor]:
        branch = "attn" if site.module == AFTER_ATTENTION.module else "mlp"
        return tensors_of(self, (index, branch), "vector", "scale")
