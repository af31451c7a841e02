"""How a method acts on a model."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class ResidualSite:
    """Where in every decoder layer a method adds a vector to the residual stream, and how.

    ``module`` is what the vector is added to: the output of "after_attention" (the last module before
    the attention branch joins the stream), "mlp", or "layer". ``preserve_norm``: see ``ops.residual_shift``.
    """

    module: str
    preserve_norm: bool


class FusedTokens(NamedTuple):
    """What ``ops.prefix_splice`` takes as its bank: demonstration d is ``rows[offsets[d]:offsets[d + 1]]``.

    rows: ``[N, C]``, floating, or int8 beside ``scale``. offsets: int64 ``[M + 1]``. scale: fp32 ``[N]``, for
    rows that are ``rows[n] * scale[n]``; None beside floating rows.
    """

    rows: Tensor
    offsets: Tensor
    scale: Tensor | None
