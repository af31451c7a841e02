"""The parameters of HiFICL: a few learned keys and values of each head, as products of two factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone
from mmicl_kernels.methods.hificl.config import HiFICLConfig
from mmicl_kernels.methods.sites import AttentionSite

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective

KEY_STD = 0.01  # of the keys' second factor; that of the values is 0, so that nothing is added at first
PARTS = ("key_a", "key_b", "value_a", "value_b")


class HiFICLAdapter(Adapter):
    """``layers["0"].key_a, .key_b, .value_a, .value_b`` and so on: ``[H, N, R]`` and ``[H, R, D]`` in turn.

    ``K = key_a key_b`` and ``V = value_a value_b`` are keys and values before the prompt's, without
    positions: key_a, value_a ~ N(0, 1), key_b ~ 0.01 N(0, 1), value_b = 0, as in the official code. 2,228,224
    parameters for 32 layers of 32 heads of 128, 8 keys and rank 8.
    """

    method = "hificl"
    config_class = HiFICLConfig

    def __init__(self, config: HiFICLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.attention_site = AttentionSite(config.normalizer, config.prefix)
        self._folded: dict[str, tuple[tuple, tuple[Tensor, Tensor, Tensor]]] = {}
        for index, (num_heads, head_dim) in backbone.attention_layers.items():
            left, right = _shapes(config, num_heads, head_dim)
            self.layers[str(index)] = nn.ParameterDict(
                {
                    "key_a": torch.randn(left, dtype=DTYPE),
                    "key_b": torch.randn(right, dtype=DTYPE) * KEY_STD,
                    "value_a": torch.randn(left, dtype=DTYPE),
                    "value_b": torch.zeros(right, dtype=DTYPE),
                }
            )

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_folded": {}}

    @staticmethod
    def tensor_shapes(config: HiFICLConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        return {
            f"layers.{index}.{part}": shape
            for index, (num_heads, head_dim) in backbone.attention_layers.items()
            for part, shape in zip(PARTS, 2 * _shapes(config, num_heads, head_dim), strict=True)
        }

    @classmethod
    def objective_class(cls) -> type[Objective]:
        from mmicl_kernels.methods.hificl.objective import HiFICLObjective

        return HiFICLObjective

    def attention_shift(self, index: str) -> tuple[Tensor, Tensor, Tensor]:
        """The products of the factors; kept while nothing changes them, as they are asked for every token."""
        layer = self.layers[index]
        factors = [layer[part] for part in PARTS]
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(x.requires_grad for x in factors)
        ):
            return _fold(*factors)
        state = tuple(
            (x.data_ptr(), x.dtype, x.device, 0 if x.is_inference() else x._version) for x in factors
        )
        known, folded = self._folded.get(index, (None, None))
        if known != state:
            with torch.inference_mode(False), torch.no_grad():
                folded = _fold(*(x.clone() if x.is_inference() else x for x in factors))
            self._folded[index] = state, folded
        return folded


def _shapes(config: HiFICLConfig, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (num_heads, config.num_keys, config.rank), (num_heads, config.rank, head_dim)


def _fold(key_a: Tensor, key_b: Tensor, value_a: Tensor, value_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = key_a @ (key_b * key_b.shape[-1] ** -0.5)
    return weight, weight.new_zeros(weight.shape[:2]), value_a @ value_b
