"""A method that the package does not know, which acts at every kind of site at once."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from mmicl_kernels.data.batch import AggregationBatch
from mmicl_kernels.methods import Adapter, AttentionSite, EmbeddingSite, ResidualSite
from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.objective import Objective
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.ops import row_projection

STREAM = ResidualSite("layer", preserve_norm=False)


@dataclass(frozen=True)
class EverywhereConfig:
    size: float = 0.1


class EverywhereAdapter(Adapter):
    """Per layer a shift of the heads and a vector after the layer; a projection of demonstrations."""

    method, config_class = "everywhere", EverywhereConfig
    attention_site, residual_sites, embedding_site = AttentionSite(), (STREAM,), EmbeddingSite("answer")

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        for name, shape in self.tensor_shapes(config, backbone).items():
            if name != "projection":
                _, index, part = name.split(".")
                if index not in self.layers:
                    self.layers[index] = nn.ParameterDict()
                self.layers[index][part] = nn.Parameter(config.size * torch.randn(shape))
        self.projection = nn.Parameter(torch.eye(backbone.hidden_size))

    @staticmethod
    def tensor_shapes(config, backbone):
        C = backbone.hidden_size
        shapes = {"projection": (C, C)}
        for index, (heads, dim) in backbone.layers.items():
            own = {"weight": (heads, dim), "bias": (heads,), "shift": (heads, dim), "vector": (C,)}
            shapes |= {f"layers.{index}.{part}": shape for part, shape in own.items()}
        return shapes

    @classmethod
    def objective_class(cls):
        return EverywhereObjective

    def attention_shift(self, index):
        return tuple(self.layers[index][part] for part in ("weight", "bias", "shift"))

    def residual_shift(self, site, index):
        assert site == STREAM
        return self.layers[index]["vector"], 1.0

    def fuse(self, hidden, positions, *, num_rows, impl):
        return row_projection(hidden, positions, self.projection, num_rows=num_rows, impl=impl)


class EverywhereObjective(Objective):
    """The loss of the answer after fused tokens."""

    method, batch = "everywhere", AggregationBatch

    def __call__(self, batch):
        fused = self.handle.aggregate(batch.demonstrations, batch.positions)
        tokens = FusedTokens(torch.cat(fused), torch.tensor([0, *accumulate(map(len, fused))]), None)
        inputs = self.handle.splice({**batch.queries, "labels": batch.labels}, batch.chosen, tokens=tokens)
        labels = inputs.pop("labels")
        try:
            return self._losses({"ce": (1.0, answer_loss(self.handle.model, inputs, labels))})
        finally:
            self.handle.unsplice()
