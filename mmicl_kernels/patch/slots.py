"""Parameters of several adapters side by side, and which batch row uses which."""

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.methods import Adapter

FP32_MAX = torch.finfo(torch.float32).max

# What one entry of rows() may be: names of adapters, with their strengths or without.
RowEntry = str | tuple[str, ...] | Mapping[str, float] | None


class Prepared(NamedTuple):
    """Tensors as kernels take them, and what they were made of: kept, so that no other comes to lie there."""

    version: tuple
    parts: tuple[Tensor, ...]
    tensors: tuple[Tensor | None, ...]


class SlotStack:
    """One layer's parameters of all slots, in fixed ``[slots, ...]`` tensors.

    Adapters that come, go and change places change values in them, never shapes. Subclasses say with
    :meth:`_of` what they read of an adapter.
    """

    def __init__(self, slots: list[Adapter | None], device: torch.device) -> None:
        """``slots`` is the handle's own list, which changes."""
        self._slots, self._device = slots, device
        self._stacks: list[Tensor] = []
        self._copied: list[Tensor] = []
        self._versions: list[tuple] | None = None
        self._prepared: Prepared | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_prepared": None}

    def prepared(
        self, parts: tuple[Tensor, ...], settings: tuple, make: Callable[..., tuple[Tensor | None, ...]],
        *arguments: object,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        """What ``make(*arguments)`` returns, made again where a part was replaced or changed in place, or
        ``settings`` are others; None if a part counts no changes. Called for every layer and token."""
        version = settings
        try:
            for x in parts:
                version += (id(x), x._version, x.data_ptr(), x.dtype, x.shape, x.stride())
        except RuntimeError:  # of inference mode, where changes are not counted
            return None
        kept = self._prepared
        if kept is None or kept.version != version:
            kept = self._prepared = Prepared(version, parts, make(*arguments))
        return kept.tensors

    def note_training(self) -> None:
        """A pass with gradients: a step may follow, and fused optimizers count theirs as no change."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._prepared = None

    def _of(self, adapter: Adapter) -> list[Tensor] | None:
        """The tensors of ``adapter`` that belong here, None if it does not act here."""
        raise NotImplementedError

    def _used(self) -> list[tuple[int, list[Tensor]]]:
        """The slots in use, with what their adapters have there now: a tensor may be another object."""
        found = [(slot, self._of(adapter)) for slot, adapter in enumerate(self._slots) if adapter is not None]
        return [(slot, tensors) for slot, tensors in found if tensors is not None]

    def _fitted(self, used: list[tuple[int, list[Tensor]]]) -> list[tuple[int, list[Tensor]]]:
        """The same in one shape for all slots, which they have unless a subclass says otherwise."""
        return used

    # Stacks that were inference tensors could not be copied into again outside of inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def copy_parameters(self) -> None:
        """Copy the current parameters of all adapters into the stacks."""
        used = self._used()
        sources = [x for _, tensors in used for x in tensors]
        # Kept, so that no other tensor comes to lie where these are.
        self._copied, self._versions = [x.detach() for x in sources], [_version(x) for x in sources]
        if not used:
            return
        used = self._fitted(used)
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in sources), torch.float32)
        shapes = [(len(self._slots), *x.shape) for x in used[0][1]]
        if [x.shape for x in self._stacks] != shapes or self._stacks[0].dtype != dtype:
            options = {"dtype": dtype, "device": self._device}
            self._stacks = [torch.zeros(shape, **options) for shape in shapes]
        for slot, tensors in used:
            for stack, x in zip(self._stacks, tensors, strict=True):
                stack[slot].copy_(x)

    def stacked(self) -> list[Tensor]:
        """The parameters: copies, or while training stacked anew so that gradients reach the adapters.

        Copies are renewed where the parameters changed; compiled graphs read them as rows() made them.
        """
        eager, gradients = not torch.compiler.is_compiling(), torch.is_grad_enabled()
        # A graph compiled without gradients must not depend on which adapters there are.
        used = self._used() if eager or gradients else []
        if gradients and any(x.requires_grad for _, tensors in used for x in tensors):
            if eager:
                self._versions = None  # a step may follow, and fused optimizers count theirs as no change
            return self._stack_anew(used)
        if eager and self._versions != [_version(x) for _, tensors in used for x in tensors]:
            self.copy_parameters()
        return self._stacks

    def _stack_anew(self, used: list[tuple[int, list[Tensor]]]) -> list[Tensor]:
        columns = [[*stack] for stack in self._stacks]
        for slot, tensors in self._fitted(used):
            for column, x in zip(columns, tensors, strict=True):
                column[slot] = x.to(column[slot])
        return [torch.stack(column) for column in columns]


def _version(x: Tensor) -> tuple:
    """Another one after ``x`` was replaced, or changed in place; inference tensors do not count changes."""
    return x.data_ptr(), x.dtype, x.stride(), 0 if x.is_inference() else x._version


def parse_rows(
    names: RowEntry | Sequence[RowEntry], adapters: Mapping[str, Adapter]
) -> list[dict[str, float]]:
    """The names and strengths of every batch row. Raises as :meth:`Handle.rows` says."""
    alone = names is None or isinstance(names, str | tuple | Mapping)
    entries = [names] if alone else list(names)
    if not entries:
        raise ValueError("names is empty, expected one entry per batch row")
    return [_parse_entry(entry, adapters) for entry in entries]


def _parse_entry(entry: RowEntry, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    if not isinstance(entry, str | tuple | Mapping | None):
        raise TypeError(
            f"a row is {entry!r}, expected a name, a tuple of names, a dict of their strengths or None"
        )
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"a row names {name!r}, expected strings; a list has one entry per batch row")
        if name not in adapters:
            raise KeyError(f"no adapter is named {name!r}, expected one of {sorted(adapters)} or None")
        if not (adapters[name].attention_site or adapters[name].residual_sites):
            raise ValueError(f"a row names {name!r}, which acts through splice() alone")
    if len(set(names)) < len(names):
        raise ValueError(f"a row names {names}, expected every name once")
    shifting = tuple(name for name in names if adapters[name].attention_site is not None)
    if len(shifting) > 1:
        raise ValueError(f"a row names {shifting}, expected at most one that shifts attention")
    strengths = entry if isinstance(entry, Mapping) else dict.fromkeys(names, 1.0)
    for name in names:
        check_strength(f"strength of {name!r}", strengths[name])
        check_strength_of(name, adapters[name], strengths[name])
    return {name: float(strengths[name]) for name in names}


def check_strength(what: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite in fp32."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} is {value!r}, expected a number")
    if not abs(value) <= FP32_MAX:
        raise ValueError(f"{what} is {value!r}, expected a finite number in fp32")


def check_strength_of(name: str, adapter: Adapter, strength: float) -> None:
    """Raise ValueError unless ``adapter`` can have this strength."""
    if strength != 1 and not adapter.has_strength:
        raise ValueError(
            f"strength is {strength!r}, expected 1: {name!r} is a {type(adapter).__name__}, which has none"
        )


def check_products(rows: list[dict[str, float]], strength: float) -> None:
    """Raise ValueError unless every row's strengths times the global one are finite in fp32."""
    for row in rows:
        for name, x in row.items():
            check_strength(f"strength of {name!r} times the global {strength!r}", x * strength)


def for_batch(rows: Tensor, B: int, named_by: str = "rows()") -> Tensor:
    """``rows [n, ...]`` repeated for a batch of B, as ``generate`` repeats rows for beams."""
    n = rows.shape[0]
    if B % n != 0:
        raise ValueError(f"{named_by} named {n} rows, expected a divisor of the batch {B}")
    return rows if n == B else rows.repeat_interleave(B // n, dim=0)
