"""The parameters of HiFICL: a few learned keys and values of each head, as products of two factors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmicl_kernels.methods.base import DTYPE, Adapter, Backbone, tensors_of
from mmicl_kernels.methods.hificl.config import HiFICLConfig
from mmicl_kernels.methods.sites import AttentionSite
from mmicl_kernels.ops._core.dispatch import no_autocast

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

    def attention_parts(self, index: str) -> tuple[Tensor, ...]:
        return tensors_of(self, (index,), *PARTS)

    def attention_shift(self, index: str) -> tuple[Tensor, Tensor, Tensor]:
        key_a, key_b, value_a, value_b = _in_one_dtype(self.attention_parts(index))
        with no_autocast(key_a.device):
            weight = key_a @ (key_b * key_b.shape[-1] ** -0.5)
            return weight, weight.new_zeros(weight.shape[:2]), value_a @ value_b


def _shapes(config: HiFICLConfig, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (num_heads, config.num_keys, config.rank), (num_heads, config.rank, head_dim)


def _in_one_dtype(factors: Sequence[Tensor]) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in factors))
    return [x.to(dtype) for x in factors]
