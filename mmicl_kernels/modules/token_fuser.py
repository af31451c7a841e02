"""AIM's trainable projection of hidden states to fused tokens."""

import torch
from torch import Tensor, nn

from mmicl_kernels.ops.row_projection import row_projection


class TokenFuser(nn.Module):
    """Chosen rows of hidden states as fused tokens: ``Linear(C, C)``, with ``layer_norm`` LayerNorm after it.

    AIM (arXiv 2406.07588); neither its initialisation nor the norm are public. Parameters: ``weight [C, C]``
    the identity, ``bias [C] = 0``, so that training begins from the states themselves [ours];
    ``norm_weight [C] = 1`` and ``norm_bias [C] = 0``, or None.
    """

    def __init__(
        self,
        hidden_size: int,
        layer_norm: bool = False,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.layer_norm, self.eps = hidden_size, layer_norm, eps
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size, **options))
        self.bias = nn.Parameter(torch.empty(hidden_size, **options))
        for name in ("norm_weight", "norm_bias"):
            norm = nn.Parameter(torch.empty(hidden_size, **options)) if layer_norm else None
            self.register_parameter(name, norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity, before the norm."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)
        if self.layer_norm:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor,
        *,
        num_rows: int | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Fused tokens ``[N, C]`` of ``hidden [B, T, C]``; see :func:`mmicl_kernels.ops.row_projection`."""
        return row_projection(
            hidden, rows, self.weight, self.bias, norm_weight=self.norm_weight, norm_bias=self.norm_bias,
            eps=self.eps, num_rows=num_rows, dtype=dtype, impl=impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, layer_norm={self.layer_norm}, eps={self.eps}"
