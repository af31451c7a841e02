"""The parameters of prompt tuning: the input embeddings of tokens that no vocabulary has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone
from mmicl_kernels.methods.prompt_tuning.config import PromptTuningConfig
from mmicl_kernels.methods.sites import EmbeddingSite

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective


class PromptTuningAdapter(Adapter):
    """``tokens [num_tokens, C]``, which stand before every prompt: ``[P; E(x)]`` (arXiv 2104.08691).

    tokens ~ N(0, std): 81,920 parameters for 20 tokens of width 4096. It has none in any decoder layer, so
    ``layers`` is empty.
    """

    method = "prompt_tuning"
    config_class = PromptTuningConfig
    embedding_site = EmbeddingSite(positions=None)

    def __init__(self, config: PromptTuningConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        shape = (config.num_tokens, backbone.hidden_size)
        self.tokens = nn.Parameter(torch.randn(shape, dtype=DTYPE) * config.std)

    @staticmethod
    def tensor_shapes(config: PromptTuningConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        return {"tokens": (config.num_tokens, backbone.hidden_size)}

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.prompt_tuning.objective import PromptTuningObjective

        return PromptTuningObjective

    def learned_tokens(self) -> Tensor:
        return self.tokens
