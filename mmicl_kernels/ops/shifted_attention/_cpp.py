"""Plain attention on CPU by our own kernels: the interface of ``_stock``, for any visibility."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import backend
from mmicl_kernels.ops._core.layout import last_dim_contiguous
from mmicl_kernels.ops.shifted_attention import dispatch
from mmicl_kernels.ops.shifted_attention.options import Visibility


class CppAttention(NamedTuple):
    """``forward`` and ``backward`` as those of ``StockAttention``; no backward where a mask is added."""

    scale: float
    softcap: float | None
    visibility: Visibility

    @staticmethod
    def runs_on(q: Tensor) -> bool:
        return backend("composed", q.device) == "cpp"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, all_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``out``, ``lse``, and lse again; with ``all_keys`` that of all in use, whatever is hidden."""
        options = (*self._options(), self.visibility.mask, all_keys, dispatch.FEW_QUERIES)
        return torch.ops.mmicl_cpu.attention_fwd(q, k, v, *options)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, out = last_dim_contiguous(dout), last_dim_contiguous(out)
        options = (*self._options(), self.visibility.mask)
        return torch.ops.mmicl_cpu.attention_bwd(dout, q, k, v, out, lse, *options)

    def _options(self) -> tuple:
        causal, window, q_start, kv_start, kv_end, _ = self.visibility
        starts = (None, q_start) if isinstance(q_start, Tensor) else (q_start, None)
        return (self.scale, self.softcap, causal, window, *starts, kv_start, kv_end)
