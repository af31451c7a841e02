"""WorkingSet: the demonstrations in use, on the device."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmicl_kernels.methods.sites import FusedTokens

MOVED_BYTES = 2**24  # at once, beside the buffer, when it is compacted


class Bank(Protocol):
    """What a working set asks of a DemonstrationBank."""

    hidden_size: int
    dtype: torch.dtype
    fused: FusedTokens

    def prefetch(self, ids: Iterable[int]) -> None: ...


class WorkingSet:
    """Demonstrations of a bank in one buffer on ``device``; the least recently used make room for others.

    The buffer is allocated once and keeps its address: ``max_bytes`` of rows, scales of int8 rows included.
    What was loaded before the last ``load`` is not valid any more, because rows move. Work that was queued
    on the stream on which ``load`` is called has its rows; other streams must be waited for. Not for
    several threads at once: a lock must cover ``load`` and the launch of what uses its result.

    Args:
        max_bytes: at least one row's.

    Raises:
        ValueError: ``max_bytes`` is less.
    """

    @torch.inference_mode(False)  # what was made in that mode could not be used outside, here and in ``load``
    def __init__(self, bank: Bank, device: torch.device | str, max_bytes: int) -> None:
        C, quantised = bank.hidden_size, bank.dtype == torch.int8
        self._row_bytes = C * bank.dtype.itemsize + (torch.float32.itemsize if quantised else 0)
        if type(max_bytes) is not int or max_bytes < self._row_bytes:
            raise ValueError(f"max_bytes is {max_bytes!r}, expected at least one row's {self._row_bytes}")
        self._bank, self.max_bytes = bank, max_bytes
        capacity = max_bytes // self._row_bytes
        self._rows = torch.zeros(capacity, C, dtype=bank.dtype, device=device)
        self._scale = torch.zeros(capacity, dtype=torch.float32, device=device) if quantised else None
        self._offsets = torch.zeros(1, dtype=torch.int64, device=device)
        self._sizes: dict[int, int] = {}  # rows by id, in the buffer's order
        self._positions: dict[int, int] = {}  # among ``_sizes``
        self._recent: dict[int, None] = {}  # ids, the least recently used first

    @torch.inference_mode(False)
    def load(self, ids: Sequence[int]) -> tuple[FusedTokens, list[int]]:
        """Have ``ids`` on the device, with one copy of the rows that are not there yet.

        Args:
            ids: of the bank, in any order, repeated ones allowed.

        Returns:
            The buffer, and where each id is in it: its tokens are ``rows[offsets[p]:offsets[p + 1]]`` for its
            position p, which is its id for ``ops.prefix_splice``. Rows past ``offsets[-1]`` mean nothing.

        Raises:
            IndexError: no such id. ValueError: together they are larger than ``max_bytes``.
        """
        ids = [operator.index(id) for id in ids]
        fused = self._bank.fused
        bounds = self._bounds(fused, dict.fromkeys(ids))
        total = sum(end - begin for begin, end in bounds.values())
        if total > len(self._rows):
            raise ValueError(f"ids have {total} rows, {total * self._row_bytes} bytes, expected at most "
                             f"max_bytes = {self.max_bytes}")  # fmt: skip
        missing = {id: pair for id, pair in bounds.items() if id not in self._sizes}
        if missing:
            self._bank.prefetch(missing)
            rows, scale = self._staged(fused, list(missing.values()))
            self._make_room(len(rows), bounds)
            used = sum(self._sizes.values())
            self._rows[used : used + len(rows)].copy_(rows, non_blocking=True)
            if scale is not None:
                self._scale[used : used + len(rows)].copy_(scale, non_blocking=True)
            self._sizes |= {id: end - begin for id, (begin, end) in missing.items()}
            self._place()
        for id in bounds:
            self._recent.pop(id, None)
            self._recent[id] = None
        return FusedTokens(self._rows, self._offsets, self._scale), [self._positions[id] for id in ids]

    def _bounds(self, fused: FusedTokens, ids: dict[int, None]) -> dict[int, tuple[int, int]]:
        """First and last row of each id in the bank."""
        count = len(fused.offsets) - 1
        for id in ids:
            if not 0 <= id < count:
                raise IndexError(f"ids has {id}, expected 0 to {count - 1}")
        chosen = torch.tensor(list(ids), dtype=torch.int64, device="cpu")
        pairs = zip(fused.offsets[chosen].tolist(), fused.offsets[chosen + 1].tolist(), strict=True)
        return dict(zip(ids, pairs, strict=True))

    def _staged(self, fused: FusedTokens, bounds: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """Rows and scales of the bank in one piece each, in pinned memory for a GPU."""

        def joined(x: Tensor) -> Tensor:
            size = sum(end - begin for begin, end in bounds)
            out = torch.empty(
                size, *x.shape[1:], dtype=x.dtype, device="cpu", pin_memory=self._rows.is_cuda and size > 0
            )
            return torch.cat([x[begin:end] for begin, end in bounds], out=out)

        return joined(fused.rows), None if fused.scale is None else joined(fused.scale)

    def _make_room(self, rows: int, wanted: dict[int, tuple[int, int]]) -> None:
        """Drop what was not used for longest, none of ``wanted``, until ``rows`` more have room."""
        room = len(self._rows) - sum(self._sizes.values())
        dropped = set()
        for id in self._recent:
            if room >= rows:
                break
            if id not in wanted:
                dropped.add(id)
                room += self._sizes[id]
        if dropped:
            self._compact(dropped)

    def _compact(self, dropped: set[int]) -> None:
        """Close the gaps: rows only ever move towards the front, so a block at a time can be copied."""
        kept = torch.tensor([id not in dropped for id in self._sizes], device="cpu")
        rows = kept.repeat_interleave(torch.tensor(list(self._sizes.values()), device="cpu"))
        source = rows.nonzero().view(-1)
        self._sizes = {id: size for id, size in self._sizes.items() if id not in dropped}
        for id in dropped:
            del self._recent[id]
        place = int((source == torch.arange(len(source), device="cpu")).sum())  # what is before stays there
        for block in self._sent(source[place:]).split(max(1, MOVED_BYTES // self._row_bytes)):
            for x in (self._rows, self._scale):
                if x is not None:
                    x[place : place + len(block)] = x.index_select(0, block)
            place += len(block)

    def _place(self) -> None:
        """Positions and offsets of what is in the buffer."""
        self._positions = {id: position for position, id in enumerate(self._sizes)}
        sizes = torch.tensor([0, *self._sizes.values()], dtype=torch.int64, device="cpu")
        self._offsets = self._sent(sizes.cumsum(0))

    def _sent(self, x: Tensor) -> Tensor:
        """``x`` of the CPU on the device, without waiting for what is queued there."""
        pinned = x.pin_memory() if self._rows.is_cuda and len(x) > 0 else x
        return pinned.to(self._rows.device, non_blocking=True)
