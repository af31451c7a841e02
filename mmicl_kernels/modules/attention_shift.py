"""The parameters of one attention layer's shift, and the two ops that apply them."""

import torch
from torch import Tensor, nn

from mmicl_kernels.ops import attention_shift, shifted_attention

WEIGHT_STD = 0.02
SHIFT_STD = 0.001


class AttentionShift(nn.Module):
    """Per-head attention shift (MimIC, arXiv 2504.08851, section 3.2): ``out + sigmoid(q.w + b - lse) * v``.

    Parameters: ``weight [H, D] ~ N(0, 0.02)``, ``bias [H] = 0``, ``shift [H, D] ~ 0.001 N(0, 1)``.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, **options))
        self.bias = nn.Parameter(torch.empty(num_heads, **options))
        self.shift = nn.Parameter(torch.empty(num_heads, head_dim, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the paper's initialisation from torch's global generator."""
        nn.init.normal_(self.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.shift, std=SHIFT_STD)

    def forward(self, out: Tensor, lse: Tensor, q: Tensor, *, impl: str = "auto") -> Tensor:
        """Shift the output ``[B, H, T, D]`` of an attention that returned ``lse [B, H, T]``.

        See :func:`mmicl_kernels.ops.attention_shift` for dtypes, layout and errors.
        """
        return attention_shift(out, lse, q, self.weight, self.bias, self.shift, impl=impl)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class ShiftedAttention(AttentionShift):
    """The inner product of a self-attention with its shift: drop-in for ``softmax(q k^T) v``.

    The parameters are those of :class:`AttentionShift`, so a state dict moves between the two.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        normalizer: str = "visible",
        impl: str = "auto",
    ) -> Tensor:
        """``q [B, H, T, D]``, ``k, v [B, G, S, D]`` to ``[B, H, T, D]``.

        See :func:`mmicl_kernels.ops.shifted_attention` for the arguments and errors; call the op
        itself for caches, packed sequences and several adapters.
        """
        return shifted_attention(
            q, k, v, self.weight, self.bias, self.shift,
            scale=scale, causal=causal, window=window, softcap=softcap, mask=mask,
            normalizer=normalizer, impl=impl,
        )  # fmt: skip
