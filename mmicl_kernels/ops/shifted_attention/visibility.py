"""What a query may see: the conditions of DESIGN section 2, and the softmax under them."""

from typing import NamedTuple

import torch
from torch import Tensor

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


def masked_softmax(scores: Tensor, keep: Tensor | None, additive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and natural-log normaliser of ``scores [B, H, T, S]`` under a visibility.

    A row that sees no key has probabilities 0 and normaliser -inf, and gets no gradient.
    """
    if additive is not None:
        scores = scores + additive.to(scores.dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    blind = (scores == -torch.inf).all(-1)
    # The blind rows' scores are replaced first: logsumexp of -inf alone has a NaN gradient.
    scores = scores.masked_fill(blind[..., None], 0.0)
    # In two steps: where a whole row carries finfo.min, the first swallows the logarithm of the sum.
    level = torch.logsumexp(scores, -1).detach()
    scores = scores - level[..., None]
    remainder = torch.logsumexp(scores, -1)
    probabilities = torch.exp(scores - remainder[..., None]).masked_fill(blind[..., None], 0.0)
    return probabilities, (level + remainder).masked_fill(blind, -torch.inf)


def _column(values: Tensor) -> Tensor:
    return values.long()[:, None, None, None]
