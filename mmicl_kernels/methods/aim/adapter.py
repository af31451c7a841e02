"""The parameters of AIM: one projection from last hidden states to input embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mmicl_kernels.methods.aim.config import AIMConfig
from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone
from mmicl_kernels.methods.sites import EmbeddingSite
from mmicl_kernels.modules import TokenFuser

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective


class AIMAdapter(Adapter):
    """``fuser.weight [C, C]``, ``fuser.bias [C]``, and the LayerNorm's two ``[C]`` if the config has one.

    A demonstration's last hidden states, after the final norm, at its text positions become as many fused
    tokens, which stand for it before the query: ``C_i = P(H_i^txt)``. Of one width-4096 model 16,781,312
    parameters. It has none in any decoder layer, so ``layers`` is empty.
    """

    method = "aim"
    config_class = AIMConfig

    def __init__(self, config: AIMConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.embedding_site = EmbeddingSite(config.positions)
        self.fuser = TokenFuser(backbone.hidden_size, config.layer_norm, dtype=DTYPE)

    @staticmethod
    def tensor_shapes(config: AIMConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        C = backbone.hidden_size
        shapes = {"fuser.weight": (C, C), "fuser.bias": (C,)}
        if config.layer_norm:
            shapes |= {"fuser.norm_weight": (C,), "fuser.norm_bias": (C,)}
        return shapes

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.aim.objective import AIMObjective

        return AIMObjective

    def fuse(self, hidden: Tensor, positions: Tensor, *, num_rows: int, impl: str) -> Tensor:
        device = self.fuser.weight.device
        return self.fuser(hidden.to(device), positions.to(device), num_rows=num_rows, impl=impl)
