"""A patched model: which adapters it has, and which batch rows and tokens they act on."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from mmicl_kernels.data import Demonstration
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.models.anchors import Anchor, find_mixers
from mmicl_kernels.patch.aggregation import Collate, aggregate, fill
from mmicl_kernels.patch.fit import check_filling, require_fusing, require_splicing
from mmicl_kernels.patch.patches import Patches
from mmicl_kernels.patch.report import Report, report
from mmicl_kernels.patch.slots import RowEntry, check_products, parse_rows
from mmicl_kernels.patch.switch import Switch
from mmicl_kernels.store import DemonstrationBank


class Handle(Switch):
    """A patched model, from :func:`attach`. As a context manager it detaches at the end of its block.

    The model stays patched when its handle is dropped; :func:`handle_of` makes another.

    ``model`` is the model without what wraps it, ``anchors`` are the decoder layers that may be touched.
    """

    def __init__(self, patches: Patches) -> None:
        self._patches, self._state = patches, patches.state
        self.model: nn.Module = patches.state.model
        self.anchors: list[Anchor] = patches.state.anchors
        patches.handle = weakref.ref(self)

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name!r} ({x.method})" for name, x in self._state.adapters.items())
        state = "enabled" if self.enabled else "disabled" if self._patches.is_attached else "detached"
        return f"Handle({type(self.model).__name__}, {state}: {adapters})"

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._patches.handle = weakref.ref(self)

    @property
    def impl(self) -> str:
        """Of the ops, see :func:`attach`; it may be changed."""
        return self._state.impl

    @impl.setter
    def impl(self, value: str) -> None:
        self._state.impl = value

    @property
    def adapter_ids(self) -> Tensor | None:
        """Slots of what shifts the open rows' attention, int32 ``[rows]``, -1 for none; or None."""
        return self._state.adapter_ids

    @property
    def adapters(self) -> dict[str, Adapter]:
        """By name; one attached by itself is called "default"."""
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

    def rows(self, names: RowEntry | Sequence[RowEntry]) -> ExitStack:
        """Say which adapters each batch row uses from now on, until ``close()`` of what is returned, or the
        end of its ``with`` block.

        The choice is the handle's: threads that share a model must take turns. A row's vectors are summed,
        each times its strength and the global one. Parameters that change are read as they are now; call it
        again for a compiled model, or after a change that torch does not count (through ``.data``, by a
        fused optimizer) where no call with gradients came since the last without. With gradient
        checkpointing call ``backward()`` within the block, before another forward pass.

        Args:
            names: a list with one entry per row: an adapter's name, None, a tuple of names of which at most
                one shifts attention (MimIC), or a dict of names with strengths. One such entry alone means
                all rows: ``("a", "b")`` is the sum everywhere, ``["a", "b"]`` two rows. Where ``generate``
                repeats rows (beams, ``num_return_sequences``) the entries are repeated with them.

        Raises:
            KeyError: an unknown name. ValueError: two that shift attention in one row, a name twice, no rows,
            a strength that is not finite in fp32 or other than 1 where there is none. TypeError: others.
        """
        self._check_attached()
        rows = parse_rows(names, self._state.adapters)
        check_products(rows, self._state.strength)
        restoring = ExitStack()
        restoring.callback(self._patches.choose, self._state.rows)
        self._patches.copy_parameters()
        self._patches.choose(rows)
        return restoring

    def strength(self, value: float) -> ExitStack:
        """Multiply every vector in the residual stream (M2IV, LIVE) by ``value`` from now on, until as of
        :meth:`rows`. 0 is the plain model, bit for bit. Nothing is compiled again.

        With gradient checkpointing call ``backward()`` within the block, as of :meth:`rows`.
        Raises TypeError, ValueError: not a number finite in fp32, by itself and times those of open rows, or
        not 1 beside an adapter that has none (MimIC, AIM, prompt tuning).
        """
        self._check_attached()
        restoring = ExitStack()
        restoring.callback(self._patches.set_strength, self._state.strength)
        self._patches.set_strength(value)
        return restoring

    def tokens(self, tokens: str | Tensor | None) -> ExitStack:
        """Say which tokens the adapters act on from now on, until as of :meth:`rows`; fused ones stay.

        Args:
            tokens: "all"; those of the "prompt", or its "last" one; "generated" ones; "text"; "image", what
                stands for, begins or ends images and frames; or a mask, bool ``[rows, columns]`` of a padded
                sequence from its first column, False beyond its last. What ``generate`` is given is the
                prompt, else what a pass with an empty cache sees: in training all but what a mask leaves out.
                None is "all" without the hooks that find tokens: between names nothing is compiled again.

        Raises TypeError, ValueError: others. A forward pass raises ValueError: a mask of too few columns, or
        rows that do not divide the batch; RuntimeError: it is that of a part of the model.
        """
        self._check_attached()
        restoring = ExitStack()
        restoring.callback(self._patches.set_tokens, self._state.selection.tokens)
        self._patches.set_tokens(tokens)
        return restoring

    def add(self, name: str, adapter: Adapter) -> None:
        """One more adapter. Nothing is compiled again but where it is the first that acts at a site.

        Raises ValueError: the name is taken, or no slot is free; CheckpointError: another backbone.
        """
        self._check_attached()
        self._patches.add(name, adapter)

    def remove(self, name: str) -> None:
        """Free the slot of an adapter.

        Raises KeyError: unknown name; ValueError: it is the last one, or :meth:`rows` is open.
        """
        adapters = self._state.adapters
        if name not in adapters:
            raise KeyError(f"no adapter is named {name!r}, expected one of {sorted(adapters)}")
        if len(adapters) == 1:
            raise ValueError(f"{name!r} is the last adapter, expected another; use detach()")
        if self._state.rows is not None:
            raise ValueError(f"{name!r} may be in use, expected no open rows()")
        self._patches.drop(name)

    @property
    def bank(self) -> DemonstrationBank | None:
        """The bank given to :func:`attach`."""
        return self._patches.splicer.bank

    def splice(
        self, inputs: Mapping[str, object], demonstrations: Sequence[Sequence[int]] | None = None, *,
        max_length: int | None = None, tokens: FusedTokens | None = None,
    ) -> dict[str, object]:  # fmt: skip
        """``inputs`` with tokens before every prompt: fused ones (AIM, arXiv 2406.07588), or learned ones.

        They stand after a prompt's first token if that begins a text, else before it, and see no image.
        What has one entry per token grows with them. The result is for forward passes and ``generate`` until
        the next ``splice``; using that of an earlier one is an error (on CUDA an assertion on the device),
        but for one of the same prompts with the same tokens, and the last but one of the same prompts with
        as many. Till then, or :meth:`unsplice`, other prompts may not have a placeholder's id; what the model
        says, and what assistants and lookups guess, may. Reading the prompts synchronises once.

        Args:
            inputs: of ``model(**inputs)``, with ``input_ids [R, T]``; padded on either side.
            demonstrations: for each prompt the ids of its demonstrations in the bank, in order; any number.
                None, and no ``tokens``, for an adapter that has learned ones, which every prompt gets.
            max_length: tokens of a prompt with its fused ones. Of the demonstrations the longest run of last
                ones that fits is kept, each whole; the prompt and learned tokens are never cut.
            tokens: instead of the bank's, with gradients if they have any.

        Raises RuntimeError: the handle is disabled or detached; TypeError, ValueError: no bank and no tokens,
        an unknown id, a prompt longer than ``max_length``, an input that the model has to make anew.
        """
        self._check_attached()
        adapter = require_splicing(self._state.adapters)
        if not self.enabled:
            raise RuntimeError("the handle is disabled, expected an enabled one: it would not see the tokens")
        return self._patches.splicer.splice(adapter, inputs, demonstrations, max_length, tokens)

    def unsplice(self) -> None:
        """Forget the last :meth:`splice` and its tokens; what it returned is no prompt any more."""
        self._patches.splicer.hook.prefix = None

    def aggregate(self, inputs: Mapping[str, Tensor], positions: Tensor | None = None) -> list[Tensor]:
        """The fused tokens ``[n, C]`` of every demonstration of a batch, each read alone by the plain model.

        It reads in eval mode. Gradients reach the adapter alone. ``inputs`` are demonstrations as prompts
        ``[B, T]``; ``positions``, bool ``[B, T]``, says which tokens are fused: by default the text after the
        last image. Raises ValueError: no attached adapter fuses, ``positions`` has another shape, or is
        missing where the adapter fuses others.
        """
        self._check_attached()
        adapter = require_fusing(self._state.adapters)
        with self.disabled():
            return aggregate(self.model, adapter, inputs, positions, self.impl)

    def add_demonstrations(
        self, demonstrations: Sequence[Demonstration], collate: Collate, *, batch_size: int = 8,
        progress: bool = True,
    ) -> list[int]:  # fmt: skip
        """Aggregate demonstrations into the bank, where they are not there yet, and return their ids.

        ``collate`` makes a batch of them into the ``inputs`` and ``positions`` of :meth:`aggregate`. Every
        batch is stored before the next, so what an interruption leaves is kept. Raises ValueError: no bank
        is attached, a bad ``batch_size``, and as :meth:`aggregate`; CheckpointError: the adapter is not that
        of the bank any more.
        """
        check_filling(self.bank, self._state.adapters, batch_size)
        return fill(self.bank, demonstrations, collate, self.aggregate, batch_size, progress)
