"""The arguments of ``shifted_attention`` that are not differentiated, among them what a query may see."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_heads

# At and below it, kernels that hide keys with -inf before they scale make NaN of them, or +inf.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
FARTHEST = 2**29  # of positions: sums of three of them fit into int32


class Visibility(NamedTuple):
    """Key ``j`` is visible to query ``i`` of row ``b`` iff all given conditions hold.

    ``kv_start[b] <= j < kv_end[b]``; if causal ``j <= q_start[b] + i``; if windowed
    ``j > q_start[b] + i - window``; and ``mask``, 4-D (bool: True keeps, float: added to the scores).
    ``q_start=None`` means ``kv_end[b] - T``, and ``kv_end=None`` means S. A ``q_start`` in a tensor counts as
    the nearest position within FARTHEST of 0.
    """

    causal: bool = False
    window: int | None = None
    q_start: int | Tensor | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    mask: Tensor | None = None

    def all_keys(self) -> "Visibility":
        """What the gate of ``normalizer="all_keys"`` sums over: every row of the cache in use."""
        return Visibility(kv_end=self.kv_end)

    def is_all_keys(self) -> bool:
        return not self.causal and self.window is None and self.kv_start is None and self.mask is None

    def is_top_left_causal(self) -> bool:
        """Whether query i sees exactly the keys up to i: what stock kernels call causal."""
        others = (self.window, self.kv_start, self.kv_end, self.mask)
        at_zero = not isinstance(self.q_start, Tensor) and self.q_start == 0
        return self.causal and at_zero and all(x is None for x in others)

    def simplified(self, T: int, S: int) -> "Visibility":
        """The same visibility without ``causal`` and ``window`` where they hide nothing.

        ``q_start`` becomes an int where it is the same for all rows.
        """
        if isinstance(self.q_start, Tensor) or (self.q_start is None and self.kv_end is not None):
            return self  # known on the device alone: nothing may be computed there for this
        first = self.first_position(T, S)
        causal = self.causal and first < S - 1
        window = None if self.window is None or first + T <= self.window else self.window
        return self._replace(causal=causal, window=window, q_start=first)

    def reachable_keys(self, T: int, S: int) -> int:
        """How many of the first keys some query may see, as far as Python knows."""
        if not self.causal or isinstance(self.q_start, Tensor) or self.q_start is None:
            return S
        return min(S, max(self.q_start + T, 0))

    def first_keys(self, n: int) -> "Visibility":
        """The visibility among the first ``n`` keys; ``q_start`` must be given."""
        if self.mask is None or self.mask.shape[-1] == 1:
            return self
        return self._replace(mask=self.mask[..., :n])

    def first_position(self, T: int, S: int) -> int | Tensor:
        """The absolute position of query 0: an int, or ``[B, 1, 1, 1]``."""
        if isinstance(self.q_start, Tensor):
            return _column(self.q_start).clamp(-FARTHEST, FARTHEST)
        if self.q_start is not None:
            return self.q_start
        return S - T if self.kv_end is None else _column(self.kv_end) - T

    def keep(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """All conditions but a float ``mask`` as a bool mask ``[B or 1, H or 1, T or 1, S or 1]``.

        None when they hide nothing.
        """
        if self.is_all_keys() and self.kv_end is None:
            return None
        j = torch.arange(S, device=device)
        conditions = []
        if self.kv_start is not None:
            conditions.append(j >= _column(self.kv_start))
        if self.kv_end is not None:
            conditions.append(j < _column(self.kv_end))
        if self.causal or self.window is not None:
            i = torch.arange(T, device=device)[None, None, :, None]
            position = self.first_position(T, S) + i
            if self.causal:
                conditions.append(j <= position)
            if self.window is not None:
                conditions.append(j > position - self.window)
        if self.mask is not None and self.mask.dtype == torch.bool:
            conditions.append(self.mask)
        if not conditions:
            return None
        keep = conditions[0]
        for condition in conditions[1:]:
            keep = keep & condition
        return keep

    def additive_mask(self) -> Tensor | None:
        """``mask`` if it is the additive kind."""
        return None if self.mask is None or self.mask.dtype == torch.bool else self.mask


class Options(NamedTuple):
    """In the order of the operators' schema, which is made of these annotations: plain values and tensors.

    A SymInt is an int, or in a traced graph a symbol for one.
    """

    scale: float
    softcap: float | None = None
    causal: bool = False
    window: int | None = None
    q_start: torch.SymInt | None = None
    q_starts: Tensor | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: torch.SymInt | None = None
    max_seqlen_k: torch.SymInt | None = None
    adapter_ids: Tensor | None = None
    prefix: bool = False
    prefixes: Tensor | None = None
    all_keys: bool = False
    training: bool = False  # whether a backward may follow, for which ``a`` is kept
    impl: str = "auto"

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
        return [
            (
                slice(starts_q[n], starts_q[n + 1]),
                slice(starts_k[n], starts_k[n + 1]),
                dense._replace(adapter_ids=self._ids_of(n, slice(starts_q[n], starts_q[n + 1]))),
            )
            for n in range(len(starts_q) - 1)
        ]

    def _ids_of(self, n: int, rows: slice) -> Tensor | None:
        """The adapter of packed sequence ``n``, or those of its rows."""
        ids = self.adapter_ids
        if ids is None:
            return None
        return ids[n : n + 1] if ids.dim() == 1 else ids[:, rows].contiguous()


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


def _column(values: Tensor) -> Tensor:
    return values.long()[:, None, None, None]
