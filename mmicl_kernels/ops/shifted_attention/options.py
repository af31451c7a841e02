"""The arguments of ``shifted_attention`` that are not differentiated."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops.shifted_attention.visibility import Visibility

# At and below it, kernels that hide keys with -inf before they scale make NaN of them, or +inf.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Options(NamedTuple):
    """In the order of the operators' schema: plain values and tensors only."""

    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    q_start: int | None
    q_starts: Tensor | None
    kv_start: Tensor | None
    kv_end: Tensor | None
    mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    adapter_ids: Tensor | None
    all_keys: bool
    training: bool  # whether a backward may follow, for which ``a`` is kept
    impl: str

    @property
    def visibility(self) -> Visibility:
        q_start = self.q_start if self.q_starts is None else self.q_starts
        return Visibility(self.causal, self.window, q_start, self.kv_start, self.kv_end, self.mask)

    @property
    def is_mask_added(self) -> bool:
        """Whether the mask is the kind that is added to the scores."""
        return self.mask is not None and self.mask.is_floating_point()

    def sequences(self) -> list[tuple[slice, slice, "Options"]]:
        """Rows of queries and keys, and options, of every packed sequence; one of all if not packed."""
        if self.cu_seqlens_q is None:
            return [(slice(None), slice(None), self)]
        starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        dense = self._replace(cu_seqlens_q=None, cu_seqlens_k=None)
        ids = self.adapter_ids
        return [
            (
                slice(starts_q[n], starts_q[n + 1]),
                slice(starts_k[n], starts_k[n + 1]),
                dense._replace(adapter_ids=None if ids is None else ids[n : n + 1]),
            )
            for n in range(len(starts_q) - 1)
        ]


def new_results(q: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised ``out``, ``lse``, ``gate_lse`` (empty but for all_keys), ``lse_low`` and ``a``.

    ``lse_low`` is what rounding took from lse where a mask is added to the scores; empty elsewhere.
    ``a`` is the attention output before the shift; empty unless training.
    """
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    gate_lse = torch.empty_like(lse) if options.all_keys else lse.new_empty(0)
    lse_low = torch.empty_like(lse) if options.is_mask_added else lse.new_empty(0)
    a = new_heads(q) if options.training else q.new_empty(0)
    return new_heads(q), lse, gate_lse, lse_low, a
