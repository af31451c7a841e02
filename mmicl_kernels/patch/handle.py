"""A patched model: which adapters it has, which batch row uses which, on, off and away."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmicl_kernels.data import Demonstration
from mmicl_kernels.methods import (
    ADAPTERS,
    Adapter,
    AIMAdapter,
    CheckpointError,
    MimICAdapter,
)
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.models.anchors import (
    Anchor,
    check_backbone,
    describe_backbone,
    find_mixers,
    refuse_method,
)
from mmicl_kernels.patch.aggregation import Collate, aggregate
from mmicl_kernels.patch.patches import Patches
from mmicl_kernels.patch.report import Report, report
from mmicl_kernels.patch.slots import Entry, check_products, parse_rows
from mmicl_kernels.patch.state import check_strength_of
from mmicl_kernels.store import DemonstrationBank


class Handle:
    """A patched model, from :func:`attach`. As a context manager it detaches at the end of its block.

    The model stays patched when its handle is dropped; :func:`handle_of` makes another.
    """

    def __init__(self, patches: Patches) -> None:
        self._patches, self._state = patches, patches.state
        patches.handle = weakref.ref(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._patches.handle = weakref.ref(self)

    @property
    def model(self) -> nn.Module:
        """The patched model, without what wraps it."""
        return self._state.model

    @property
    def anchors(self) -> list[Anchor]:
        """Its decoder layers, less those that no method touches."""
        return self._state.anchors

    @property
    def impl(self) -> str:
        """Implementation of the ops, see :func:`attach`; it may be changed."""
        return self._state.impl

    @impl.setter
    def impl(self, value: str) -> None:
        self._state.impl = value

    @property
    def adapter_ids(self) -> Tensor | None:
        """The slots of the open rows' MimIC adapters, int32 ``[rows]``, -1 for none; None without rows()."""
        return self._state.adapter_ids

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name; one attached by itself is called "default"."""
        return dict(self._state.adapters)

    @property
    def single(self) -> Adapter | None:
        """The adapter of all rows, where there is only one."""
        return self._state.single

    def scaled(self, scale: Tensor) -> Tensor:
        """``scale`` times the global strength; 0 at strength 0, whatever ``scale`` is."""
        return self._state.scaled(scale)

    def report(self) -> Report:
        """Which layers are patched with what, and why some are not; print it."""
        return report(find_mixers(self.model), self.anchors, self._state.adapters)

    @property
    def enabled(self) -> bool:
        return self._patches.is_attached and self._patches.enabled

    def enable(self) -> None:
        """Switch the adapters on, as they are after :func:`attach`."""
        self._check_attached()
        self._patches.enabled = True
        self._patches.sync()

    def disable(self) -> None:
        """Switch the adapters off: the plain model, bit for bit, until :meth:`enable`."""
        self._check_attached()
        self._patches.enabled = False
        self._patches.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model within a ``with`` block, for all threads."""
        enabled = self.enabled
        self.disable()
        try:
            yield
        finally:
            if enabled and self._patches.is_attached:
                self.enable()

    def detach(self) -> None:
        """Restore the model exactly. Detaching again does nothing."""
        if self._patches.is_attached:
            self._patches.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextmanager
    def rows(self, names: Entry | Sequence[Entry]) -> Iterator[None]:
        """Say which adapters each batch row uses, within a ``with`` block.

        The choice is the handle's: threads that share a model must take turns. The vectors of a row's
        M2IV and LIVE adapters are summed, each times its strength and the global one.

        Parameters that change within the block are read as they are now. Enter it again for a compiled
        model, or after a change that torch does not count (through ``.data``, by a fused optimizer) where
        no call with gradients came since the last without. With gradient checkpointing, which runs the
        model again, call ``backward()`` within the block, before another forward pass.

        Args:
            names: a list with one entry per row: an adapter's name, None for no shift, a tuple of names,
                at most one of method MimIC, or a dict of names with strengths (1 for MimIC). One such
                entry alone means all rows: ``("a", "b")`` is the sum everywhere, ``["a", "b"]`` two rows.
                Where ``generate`` repeats rows (beams, ``num_return_sequences``) the entries are repeated
                with them.

        Raises:
            KeyError: an unknown name. ValueError: two MimIC adapters in one row, a name twice, a strength
            that is not finite in fp32, by itself or times the global one, or no rows. TypeError: an entry
            that is none of these.
        """
        self._check_attached()
        rows = parse_rows(names, self._state.adapters)
        check_products(rows, self._state.strength)
        self._patches.copy_parameters()
        before = self._state.rows
        self._patches.choose(rows)
        try:
            yield
        finally:
            self._patches.choose(before)

    def strength(self, value: float) -> AbstractContextManager:
        """Multiply every M2IV and LIVE vector by ``value`` from now on: 0 is the plain model, bit for bit.

        As a context manager the strength is what it was at the end of the block. Without compiling again.
        With gradient checkpointing call ``backward()`` within the block, as of :meth:`rows`.

        Raises:
            TypeError, ValueError: not a number finite in fp32, by itself and times those of open rows, or
            not 1 beside a MimIC adapter, which has none.
        """
        self._check_attached()
        before = self._state.strength
        self._set_strength(value)
        restoring = ExitStack()
        restoring.callback(self._set_strength, before)
        return restoring

    def add(self, name: str, adapter: Adapter) -> None:
        """Put one more adapter into a free slot. Shapes stay, so nothing is compiled again.

        The first adapter of its method patches what the others leave alone; that is compiled once.

        Raises:
            ValueError: the name is taken, or no slot is free. CheckpointError: another backbone.
        """
        self._check_attached()
        self._take_slot(name, adapter)
        try:
            self._patches.sync()
        except BaseException:
            self._free_slot(name)
            raise
        if self._state.rows is not None:
            self._patches.copy_parameters()
            self._patches.choose(self._state.rows)

    def remove(self, name: str) -> None:
        """Free the slot of an adapter.

        Raises:
            KeyError: unknown name. ValueError: it is the last one, or :meth:`rows` is open.
        """
        adapters = self._state.adapters
        if name not in adapters:
            raise KeyError(f"no adapter is named {name!r}, expected one of {sorted(adapters)}")
        if len(adapters) == 1:
            raise ValueError(f"{name!r} is the last adapter, expected another; use detach()")
        if self._state.rows is not None:
            raise ValueError(f"{name!r} may be in use, expected no open rows()")
        self._free_slot(name)

    @property
    def bank(self) -> DemonstrationBank | None:
        """The bank given to :func:`attach`."""
        return self._patches.splicer.bank

    def splice(
        self,
        inputs: Mapping[str, object],
        demonstrations: Sequence[Sequence[int]],
        *,
        max_length: int | None = None,
        tokens: FusedTokens | None = None,
    ) -> dict[str, object]:
        """``inputs`` with fused tokens before every prompt: AIM (arXiv 2406.07588).

        They stand after a prompt's first token if that begins a text, else before it, and see no image.
        What has one entry per token grows with them. The result is for forward passes and ``generate``
        (beams too) until the next ``splice``, and so is the model's refusal of other prompts that have a
        placeholder's id; :meth:`unsplice` ends both. Using the result of an earlier ``splice`` is such an
        error (on CUDA as PyTorch's of an index out of range, by an assertion on the device), but for one of
        the same prompts with the same tokens, and the last but one of the same prompts with as many fused
        tokens. What the model says, and what assistants and lookups guess, may have any id. The prompts
        are read, which synchronises once.

        Args:
            inputs: of ``model(**inputs)``, with ``input_ids [R, T]``; padded on either side.
            demonstrations: for each prompt the ids of its demonstrations in the bank, in order; any number.
            max_length: tokens of a prompt with its fused ones. Of the demonstrations the longest run of last
                ones that fits is kept, each whole; the prompt is never cut.
            tokens: instead of the bank's, with gradients if they have any.

        Raises:
            RuntimeError: the handle is disabled or detached. TypeError, ValueError: no bank and no tokens,
            an unknown id, a prompt longer than ``max_length``, or an input that the model has to make for
            the longer prompt (``position_ids``).
        """
        self._check_attached()
        self._aim()
        if not self.enabled:
            raise RuntimeError("the handle is disabled, expected an enabled one: it would not see the tokens")
        return self._patches.splicer.splice(inputs, demonstrations, max_length, tokens)

    def unsplice(self) -> None:
        """Forget the last :meth:`splice` and its tokens; what it returned is no prompt any more."""
        self._patches.splicer.hook.prefix = None

    def aggregate(self, inputs: Mapping[str, Tensor], positions: Tensor | None = None) -> list[Tensor]:
        """The fused tokens ``[n, C]`` of every demonstration of a batch, each read alone by the plain model.

        It reads in eval mode. Gradients reach the projection alone. ``inputs`` are demonstrations as prompts
        ``[B, T]``; ``positions``, bool ``[B, T]``, says which tokens are fused: by default the text after the
        last image.

        Raises:
            ValueError: no AIM adapter is attached, ``positions`` has another shape, or is missing where the
            adapter's config has other positions than "text".
        """
        self._check_attached()
        adapter = self._aim()
        with self.disabled():
            return aggregate(self.model, adapter, inputs, positions, self.impl)

    def add_demonstrations(
        self,
        demonstrations: Sequence[Demonstration],
        collate: Collate,
        *,
        batch_size: int = 8,
        progress: bool = True,
    ) -> list[int]:
        """Aggregate demonstrations into the bank, where they are not there yet, and return their ids.

        ``collate`` makes a batch of them into the ``inputs`` and ``positions`` of :meth:`aggregate`. Every
        batch is stored before the next, so what an interruption leaves is kept.

        Raises:
            ValueError: no bank is attached, a bad ``batch_size``, and as :meth:`aggregate`. CheckpointError:
            the projection is not that of the bank any more.
        """
        if self.bank is None:
            raise ValueError("no bank is attached, expected attach(model, adapter, bank=...)")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected an int of at least 1")
        self._check_bank(self._aim())
        new = [x for x in dict.fromkeys(demonstrations) if self.bank.find(x) is None]
        with tqdm(total=len(new), desc="aggregating", unit="demonstration", disable=not progress) as bar:
            for start in range(0, len(new), batch_size):
                batch = new[start : start + batch_size]
                with torch.no_grad():
                    self.bank.add(batch, self.aggregate(*collate(batch)))
                bar.update(len(batch))
        return [self.bank.find(x) for x in demonstrations]

    def _set_strength(self, value: float) -> None:
        self._state.set_strength(value)
        self._patches.choose(self._state.rows)

    def _start(self, adapters: Mapping[str, Adapter], strength: float) -> None:
        """The first adapters: all of them act, or none and the model is as it was."""
        self._set_strength(strength)
        for name, adapter in adapters.items():
            self._take_slot(name, adapter)
        if self.bank is not None:
            self._aim()
        try:
            self._patches.sync()
        except BaseException:
            self._patches.remove()
            raise
        self._patches.register()

    def _take_slot(self, name: str, adapter: Adapter) -> None:
        state = self._state
        if name in state.adapters or adapter in state.slots:
            raise ValueError(f"name {name!r} or its adapter is attached already")
        if None not in state.slots:
            raise ValueError(f"all {len(state.slots)} slots are taken, expected a larger slots= at attach")
        self._check_fits(name, adapter)
        self._patches.prepare(adapter)
        state.slots[state.slots.index(None)] = adapter
        state.adapters[name] = adapter
        if isinstance(adapter, MimICAdapter):
            state.normalizer = adapter.config.normalizer  # the same for all

    def _free_slot(self, name: str) -> None:
        slots = self._state.slots
        slots[slots.index(self._state.adapters.pop(name))] = None
        self._patches.sync()

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        if not isinstance(adapter, tuple(ADAPTERS.values())):
            raise TypeError(
                f"adapter {name!r} is a {type(adapter).__name__}, "
                f"expected one of {', '.join(x.__name__ for x in ADAPTERS.values())}"
            )
        refuse_method(self.model, adapter.method, self.anchors)
        check_backbone(adapter, describe_backbone(self.model, self.anchors))
        check_strength_of(name, adapter, self._state.strength)
        gated = any(isinstance(x, MimICAdapter) for x in self._state.adapters.values())
        normalizer = self._state.normalizer
        if gated and isinstance(adapter, MimICAdapter) and adapter.config.normalizer != normalizer:
            raise ValueError(
                f"adapter {name!r} has normalizer {adapter.config.normalizer!r}, "
                f"expected {normalizer!r} like the others"
            )
        if isinstance(adapter, AIMAdapter):
            self._check_aim(name, adapter)
        for anchor in (x for x in self.anchors if str(x.index) in adapter.layers):
            for parameter in adapter.layers[str(anchor.index)].parameters():
                if parameter.device != anchor.device:
                    raise ValueError(
                        f"adapter {name!r} has layer {anchor.index} on {parameter.device}, "
                        f"expected {anchor.device}"
                    )

    def _check_aim(self, name: str, adapter: AIMAdapter) -> None:
        if any(isinstance(x, AIMAdapter) for x in self._state.adapters.values()):
            raise ValueError(f"adapter {name!r} is a second AIMAdapter, expected at most one")
        device = adapter.fuser.weight.device
        if device != self._patches.splicer.device:
            raise ValueError(f"adapter {name!r} is on {device}, expected {self._patches.splicer.device}")
        self._check_bank(adapter)

    def _check_bank(self, adapter: AIMAdapter) -> None:
        if self.bank is not None and self.bank.digest != adapter.digest():
            raise CheckpointError(
                "the bank's tokens were made with another projection than the adapter's: add its "
                "demonstrations to a new bank, DemonstrationBank.create(folder, adapter)"
            )

    def _aim(self) -> AIMAdapter:
        found = [x for x in self._state.adapters.values() if isinstance(x, AIMAdapter)]
        if not found:
            raise ValueError(
                f"no AIMAdapter is among the adapters {sorted(self._state.adapters)}, expected one"
            )
        return found[0]

    def _check_attached(self) -> None:
        if not self._patches.is_attached:
            raise RuntimeError("the handle is detached, expected an attached one")
