"""The parameters of one residual site: a vector and its learned scale."""

import torch
from torch import Tensor, nn

from mmicl_kernels.ops import residual_shift

VECTOR_STD = 0.01
SCALE_INIT = 0.1


class ResidualShift(nn.Module):
    """A learned vector in the residual stream: ``x + scale * vector`` (M2IV, arXiv 2504.04633).

    With ``preserve_norm`` the result has the length of ``x`` (LIVE, arXiv 2406.13185). Parameters:
    ``vector [C] ~ N(0, 0.01)``, ``scale [] = 0.1``.
    """

    def __init__(
        self,
        hidden_size: int,
        preserve_norm: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.preserve_norm = hidden_size, preserve_norm
        self.vector = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initialisation from torch's global generator."""
        nn.init.normal_(self.vector, std=VECTOR_STD)
        nn.init.constant_(self.scale, SCALE_INIT)

    def forward(self, x: Tensor, *, impl: str = "auto") -> Tensor:
        """Shift hidden states ``[B, T, C]``; see :func:`mmicl_kernels.ops.residual_shift`.

        Call the op itself for several vectors in one batch.
        """
        return residual_shift(x, self.vector, self.scale, preserve_norm=self.preserve_norm, impl=impl)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, preserve_norm={self.preserve_norm}"
