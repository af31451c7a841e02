"""A patched model: which adapters it has, which batch row uses which, on, off and away."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmicl_kernels.integration import hf_attention
from mmicl_kernels.integration.aggregation import Collate, aggregate
from mmicl_kernels.integration.anchors import (
    Anchor,
    check_backbone,
    describe_backbone,
    find_anchors,
    find_mixers,
    refuse_method,
    unwrap,
)
from mmicl_kernels.integration.attention import PatchedLayer
from mmicl_kernels.integration.recomputation import refuse_reentrant_checkpointing, repeats_reentrant
from mmicl_kernels.integration.report import Report, report
from mmicl_kernels.integration.residual import ResidualHook, SiteShift
from mmicl_kernels.integration.slots import Entry, check_products, check_strength, parse_rows
from mmicl_kernels.integration.splicing import EmbeddingHook, Splicer
from mmicl_kernels.library import Demonstration, DemonstrationBank, FusedTokens
from mmicl_kernels.methods import (
    ADAPTERS,
    Adapter,
    AIMAdapter,
    CheckpointError,
    MimICAdapter,
    ResidualSite,
)

# A disabled handle leaves no trace on its model, so handles are also known by their first layer's id.
_attached: "WeakValueDictionary[int, Handle]" = WeakValueDictionary()


class Handle:
    """A patched model, from :func:`attach`. As a context manager it detaches at the end of its block."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Adapter],
        single: bool,
        impl: str,
        slots: int,
        strength: float,
        bank: DemonstrationBank | None,
        bank_bytes: int,
        placeholder_ids: tuple[int, int] | None,
    ) -> None:
        model = unwrap(model)
        self.model, self.impl, self.normalizer = model, impl, "visible"
        self.anchors = find_anchors(model)
        self.adapter_ids: Tensor | None = None
        self._backbone = describe_backbone(model, self.anchors)
        self._device = self.anchors[0].device
        self._single, self._enabled, self._is_attached = single, True, True
        self._adapters: dict[str, Adapter] = {}
        self._slots: list[Adapter | None] = [None] * slots
        self._rows: list[dict[str, float]] | None = None
        self._last_forward: tuple[float, list[dict[str, float]] | None] | None = None
        self._attention: list[PatchedLayer] = []
        self._sites: dict[ResidualSite, SiteShift] = {}
        self._hooks: dict[str, list[ResidualHook]] = {}
        self._splicer = Splicer(model, bank, bank_bytes, placeholder_ids, impl)
        self._check_plain()
        self._set_strength(strength)
        for name, adapter in adapters.items():
            self._take_slot(name, adapter)
        if bank is not None:
            self._aim()
        try:
            self._sync()
        except BaseException:
            self._remove_patches()
            raise
        _attached[id(self.anchors[0].layer)] = self

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy's model, made by deepcopy or pickle, is patched by the copy."""
        self.__dict__.update(state)
        if self._is_attached:
            _attached[id(self.anchors[0].layer)] = self

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name; a single one is called "default"."""
        return dict(self._adapters)

    @property
    def single(self) -> Adapter | None:
        """The adapter of all rows, where there is only one and it was attached by itself."""
        alone = self._single and len(self._adapters) == 1
        return next(iter(self._adapters.values())) if alone else None

    def report(self) -> Report:
        """Which layers are patched with what, and why some are not; print it."""
        return report(find_mixers(self.model), self.anchors, self._adapters)

    @property
    def enabled(self) -> bool:
        return self._is_attached and self._enabled

    def enable(self) -> None:
        """Switch the adapters on, as they are after :func:`attach`."""
        self._check_attached()
        self._enabled = True
        self._sync()

    def disable(self) -> None:
        """Switch the adapters off: the plain model, bit for bit, until :meth:`enable`."""
        self._check_attached()
        self._enabled = False
        self._remove_patches()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model within a ``with`` block, for all threads."""
        enabled = self.enabled
        self.disable()
        try:
            yield
        finally:
            if enabled and self._is_attached:
                self.enable()

    def detach(self) -> None:
        """Restore the model exactly. Detaching again does nothing."""
        if self._is_attached:
            self._remove_patches()
            self._is_attached = False
            key = id(self.anchors[0].layer)
            if _attached.get(key) is self:
                del _attached[key]

    def __enter__(self) -> "Handle":
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
        rows = parse_rows(names, self._adapters)
        check_products(rows, self._strength)
        self._copy_parameters()
        before = self._rows
        self._choose(rows)
        try:
            yield
        finally:
            self._choose(before)

    def strength(self, value: float) -> AbstractContextManager:
        """Multiply every M2IV and LIVE vector by ``value`` from now on: 0 is the plain model, bit for bit.

        As a context manager the strength is what it was at the end of the block. Without compiling again.
        With gradient checkpointing call ``backward()`` within the block, as of :meth:`rows`.

        Raises:
            TypeError, ValueError: not a number finite in fp32, by itself and times those of open rows, or
            not 1 beside a MimIC adapter, which has none.
        """
        self._check_attached()
        before = self._strength
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
            self._sync()
        except BaseException:
            self._slots[self._slots.index(self._adapters.pop(name))] = None
            self._sync()
            raise
        if self._rows is not None:
            self._copy_parameters()
            self._choose(self._rows)

    def remove(self, name: str) -> None:
        """Free the slot of an adapter.

        Raises:
            KeyError: unknown name. ValueError: it is the last one, or :meth:`rows` is open.
        """
        if name not in self._adapters:
            raise KeyError(f"no adapter is named {name!r}, expected one of {sorted(self._adapters)}")
        if len(self._adapters) == 1:
            raise ValueError(f"{name!r} is the last adapter, expected another; use detach()")
        if self._rows is not None:
            raise ValueError(f"{name!r} may be in use, expected no open rows()")
        self._slots[self._slots.index(self._adapters.pop(name))] = None
        self._sync()

    @property
    def bank(self) -> DemonstrationBank | None:
        """The bank given to :func:`attach`."""
        return self._splicer.bank

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
        error (on CUDA as PyTorch's of an index out of range, by an assertion on the device), but for the
        last but one of the same prompts with as many fused tokens. The lengths of the prompts are read,
        which synchronises once.

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
        if not self._enabled:
            raise RuntimeError("the handle is disabled, expected an enabled one: it would not see the tokens")
        return self._splicer.splice(inputs, demonstrations, max_length, tokens)

    def unsplice(self) -> None:
        """Forget the last :meth:`splice` and its tokens; what it returned is no prompt any more."""
        self._splicer.hook.prefix = None

    def aggregate(self, inputs: Mapping[str, Tensor], positions: Tensor | None = None) -> list[Tensor]:
        """The fused tokens ``[n, C]`` of every demonstration of a batch, each read alone by the plain model.

        It reads in eval mode. Gradients reach the projection alone. ``inputs`` are demonstrations as prompts
        ``[B, T]``; ``positions``, bool ``[B, T]``, says which tokens are fused: by default the text after the
        last image.

        Raises:
            ValueError: no AIM adapter is attached, ``positions`` has another shape, or is missing where the
            adapter's config has "answer".
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

    def require_single(self) -> Adapter:
        """The adapter of all rows. Raises RuntimeError where :meth:`rows` must say which."""
        single = self.single
        if single is None:
            names = ", ".join(map(repr, self._adapters))
            raise RuntimeError(
                f"several adapters are attached ({names}): say which rows use which, "
                "`with handle.rows([...]):`"
            )
        return single

    def scaled(self, scale: Tensor) -> Tensor:
        """``scale`` times the global strength; 0 at strength 0, whatever ``scale`` is."""
        # Compiled graphs multiply always, so that they do not depend on the value.
        if not torch.compiler.is_compiling() and self._strength == 1:
            return scale
        strength = self._strength_tensor.to(scale.device)
        return torch.where(strength == 0, 0.0, scale * strength)

    def check_recomputation(self, anchor: Anchor) -> None:
        """Raise RuntimeError where checkpointing would give other gradients than without.

        Reentrant it may lose them. Any kind repeats a forward pass, in which the handle's state must be that
        of the last forward pass that built a graph: of several before one backward pass, the earlier ones
        must have had the same.
        """
        if torch.compiler.is_compiling():
            return
        refuse_reentrant_checkpointing(self.model, anchor)
        if not (torch.is_grad_enabled() or repeats_reentrant(anchor.layer)):
            return
        state = (self._strength, self._rows)
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            self._last_forward = state
        elif self._last_forward not in (state, None):
            raise RuntimeError(
                f"strength and rows are {state}, expected {self._last_forward} as at the last forward pass: "
                "with gradient checkpointing call backward() within their block, before another forward pass"
            )

    def _choose(self, rows: list[dict[str, float]] | None) -> None:
        """Make ``rows`` tensors on the device, or close the open ones."""
        self._rows = rows
        slots = {name: self._slots.index(adapter) for name, adapter in self._adapters.items()}
        gates = {name for name, adapter in self._adapters.items() if isinstance(adapter, MimICAdapter)}
        # Inference tensors could not be copied into again outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self.adapter_ids = None
            if rows is not None:
                ids = [next((slots[name] for name in row if name in gates), -1) for row in rows]
                self.adapter_ids = torch.tensor(ids, dtype=torch.int32).to(self._device)
            for site, of in self._sites.items():
                here = {name: slots[name] for name, x in self._adapters.items() if site in x.residual_sites}
                of.choose(rows, here, self._strength, self._device)

    def _set_strength(self, value: float) -> None:
        check_strength("strength", value)
        for name, adapter in self._adapters.items():
            _check_strength_of(name, adapter, value)
        check_products(self._rows or [], float(value))
        self._strength = float(value)
        with torch.inference_mode(False):
            self._strength_tensor = torch.tensor(self._strength, dtype=torch.float32).to(self._device)
        self._choose(self._rows)

    def _copy_parameters(self) -> None:
        for stack in (*self._attention, *(x for shift in self._sites.values() for x in shift.layers)):
            stack.copy_parameters()

    def _take_slot(self, name: str, adapter: Adapter) -> None:
        if name in self._adapters or adapter in self._slots:
            raise ValueError(f"name {name!r} or its adapter is attached already")
        if None not in self._slots:
            raise ValueError(f"all {len(self._slots)} slots are taken, expected a larger slots= at attach")
        self._check_fits(name, adapter)
        self._make_patches(adapter)
        self._slots[self._slots.index(None)] = adapter
        self._adapters[name] = adapter
        if isinstance(adapter, MimICAdapter):
            self.normalizer = adapter.config.normalizer  # the same for all

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        if not isinstance(adapter, tuple(ADAPTERS.values())):
            raise TypeError(
                f"adapter {name!r} is a {type(adapter).__name__}, "
                f"expected one of {', '.join(x.__name__ for x in ADAPTERS.values())}"
            )
        refuse_method(self.model, adapter.method, self.anchors)
        check_backbone(adapter, self._backbone)
        _check_strength_of(name, adapter, self._strength)
        gated = any(isinstance(x, MimICAdapter) for x in self._adapters.values())
        if gated and isinstance(adapter, MimICAdapter) and adapter.config.normalizer != self.normalizer:
            raise ValueError(
                f"adapter {name!r} has normalizer {adapter.config.normalizer!r}, "
                f"expected {self.normalizer!r} like the others"
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
        if any(isinstance(x, AIMAdapter) for x in self._adapters.values()):
            raise ValueError(f"adapter {name!r} is a second AIMAdapter, expected at most one")
        device = adapter.fuser.weight.device
        if device != self._splicer.device:
            raise ValueError(f"adapter {name!r} is on {device}, expected {self._splicer.device}")
        self._check_bank(adapter)

    def _check_bank(self, adapter: AIMAdapter) -> None:
        if self.bank is not None and self.bank.digest != adapter.digest():
            raise CheckpointError(
                "the bank's tokens were made with another projection than the adapter's: add its "
                "demonstrations to a new bank, DemonstrationBank.create(folder, adapter)"
            )

    def _aim(self) -> AIMAdapter:
        found = [x for x in self._adapters.values() if isinstance(x, AIMAdapter)]
        if not found:
            raise ValueError(f"no AIMAdapter is among the adapters {sorted(self._adapters)}, expected one")
        return found[0]

    def _make_patches(self, adapter: Adapter) -> None:
        """What ``adapter`` needs in the model and no other needed so far; not in its place yet."""
        if isinstance(adapter, MimICAdapter) and not self._attention:
            hf_attention.register()
            softmax = [anchor for anchor in self.anchors if anchor.self_attn is not None]
            self._attention = [PatchedLayer(self, anchor, self._slots) for anchor in softmax]
        for site in adapter.residual_sites:
            if site not in self._sites:
                self._sites[site] = SiteShift(self, site, self._slots)
            if site.module not in self._hooks:
                self._hooks[site.module] = [ResidualHook(anchor, site.module) for anchor in self.anchors]

    def _sync(self) -> None:
        """Put in place what the attached adapters need, and nothing else."""
        if not self._enabled:
            return
        gated = any(isinstance(x, MimICAdapter) for x in self._adapters.values())
        for layer in self._attention:
            layer.install() if gated else layer.remove()
        needed = {site for adapter in self._adapters.values() for site in adapter.residual_sites}
        # The norm that is kept is that of what the module returned, so those shifts act first.
        order = sorted(needed, key=lambda site: not site.preserve_norm)
        for module, hooks in self._hooks.items():
            for index, hook in enumerate(hooks):
                hook.shifts = [self._sites[site].layers[index] for site in order if site.module == module]
                hook.install() if hook.shifts else hook.remove()
        fuses = any(isinstance(x, AIMAdapter) for x in self._adapters.values())
        self._splicer.hook.install() if fuses else self._splicer.hook.remove()

    def _remove_patches(self) -> None:
        for layer in self._attention:
            layer.remove()
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._splicer.hook.remove()

    def _check_plain(self) -> None:
        """Raise ValueError if the model is patched."""
        patched = id(self.anchors[0].layer) in _attached
        for anchor in self.anchors:
            patched |= hasattr(anchor.mixer, "mmicl_layer")
            for module in (anchor.after_attention, anchor.mlp, anchor.layer):
                patched |= any(isinstance(hook, ResidualHook) for hook in module._forward_hooks.values())
        hooks = self.model.get_input_embeddings()._forward_hooks.values()
        patched |= any(isinstance(hook, EmbeddingHook) for hook in hooks)
        if patched:
            raise ValueError(
                "the model is patched already: detach() its handle or add() to it "
                "(a deepcopy of a patched model is patched too: copy it before attach)"
            )

    def _check_attached(self) -> None:
        if not self._is_attached:
            raise RuntimeError("the handle is detached, expected an attached one")


def _check_strength_of(name: str, adapter: Adapter, strength: float) -> None:
    if strength != 1 and isinstance(adapter, MimICAdapter | AIMAdapter):
        raise ValueError(
            f"strength is {strength!r}, expected 1: {name!r} is a {type(adapter).__name__}, which has none"
        )
