"""Parameters of several adapters side by side, and which batch row uses which."""

import functools
from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from mmicl_kernels.methods import Adapter, MimICAdapter

# What one entry of rows() may be: names of adapters, with their strengths or without.
Entry = str | tuple[str, ...] | Mapping[str, float] | None


class SlotStack:
    """One layer's parameters of all slots, in fixed ``[slots, ...]`` tensors.

    Adapters that come, go and change places change values in them, never shapes. Subclasses say with
    :meth:`_of` what they read of an adapter.
    """

    def __init__(self, slots: list[Adapter | None], device: torch.device) -> None:
        """``slots`` is the handle's own list, which changes."""
        self._slots, self._device = slots, device
        self._stacks: list[Tensor] = []

    def _of(self, adapter: Adapter) -> list[Tensor] | None:
        """The tensors of ``adapter`` that belong here, None if it does not act here."""
        raise NotImplementedError

    def _used(self) -> list[tuple[int, list[Tensor]]]:
        found = [(slot, self._of(adapter)) for slot, adapter in enumerate(self._slots) if adapter is not None]
        return [(slot, tensors) for slot, tensors in found if tensors is not None]

    def copy_parameters(self) -> None:
        """Copy the current parameters of all adapters into the stacks."""
        used = self._used()
        if not used:
            return
        dtypes = (x.dtype for _, tensors in used for x in tensors)
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        if not self._stacks or self._stacks[0].dtype != dtype:
            options = {"dtype": dtype, "device": self._device}
            self._stacks = [torch.zeros(len(self._slots), *x.shape, **options) for x in used[0][1]]
        for slot, tensors in used:
            for stack, x in zip(self._stacks, tensors, strict=True):
                stack[slot].copy_(x.detach())

    def stacked(self) -> list[Tensor]:
        """The copied parameters; while training, stacked anew so that gradients reach the adapters."""
        # Asked first: a graph compiled without gradients must not depend on which adapters there are.
        if not torch.is_grad_enabled():
            return self._stacks
        used = self._used()
        if not any(x.requires_grad for _, tensors in used for x in tensors):
            return self._stacks
        columns = [[*stack] for stack in self._stacks]
        for slot, tensors in used:
            for column, x in zip(columns, tensors, strict=True):
                column[slot] = x.to(column[slot])
        return [torch.stack(column) for column in columns]


def parse_rows(names: Entry | Sequence[Entry], adapters: Mapping[str, Adapter]) -> list[dict[str, float]]:
    """The names and strengths of every batch row. Raises as :meth:`Handle.rows` says."""
    alone = names is None or isinstance(names, str | Mapping)
    entries = [names] if alone else list(names)
    if not entries:
        raise ValueError("names is empty, expected one entry per batch row")
    return [_parse_entry(entry, adapters) for entry in entries]


def _parse_entry(entry: Entry, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    if not isinstance(entry, str | tuple | Mapping | None):
        raise TypeError(
            f"a row is {entry!r}, expected a name, a tuple of names, a dict of their strengths or None"
        )
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    for name in names:
        if name not in adapters:
            raise KeyError(f"no adapter is named {name!r}, expected one of {sorted(adapters)} or None")
    if len(set(names)) < len(names):
        raise ValueError(f"a row names {names}, expected every name once")
    gates = [name for name in names if isinstance(adapters[name], MimICAdapter)]
    if len(gates) > 1:
        raise ValueError(f"a row names {tuple(gates)}, expected at most one MimIC adapter")
    strengths = entry if isinstance(entry, Mapping) else dict.fromkeys(names, 1.0)
    for name in names:
        check_strength(f"strength of {name!r}", strengths[name])
        if name in gates and strengths[name] != 1:
            raise ValueError(
                f"strength of {name!r} is {strengths[name]!r}, expected 1: a MimIC adapter has none"
            )
    return {name: float(strengths[name]) for name in names}


def check_strength(what: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} is {value!r}, expected a number")
    if not isfinite(value):
        raise ValueError(f"{what} is {value!r}, expected a finite number")


def for_batch(rows: Tensor, B: int) -> Tensor:
    """``rows [n, ...]`` repeated for a batch of B, as ``generate`` repeats rows for beams."""
    n = rows.shape[0]
    if B % n != 0:
        raise ValueError(f"rows() named {n} rows, expected a divisor of the batch {B}")
    return rows if n == B else rows.repeat_interleave(B // n, dim=0)
