"""Everything that is put into a model, and what finds it there again."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import ReferenceType, WeakValueDictionary

import torch
from torch import Tensor, nn

from mmicl_kernels.methods import Adapter, ResidualSite
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.patch.fit import check_fits, require_fusing
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.patch.sites.attention import PatchedLayer
from mmicl_kernels.patch.sites.embedding import EmbeddingHook, Splicer
from mmicl_kernels.patch.sites.residual import InputHook, ResidualHook, SiteShift, hooks_of
from mmicl_kernels.patch.state import Rows, State

# A disabled handle leaves no trace on its model, so patches are known by the ids of its layers.
_attached: WeakValueDictionary[int, Patches] = WeakValueDictionary()


class Patches:
    """What the attached adapters of ``state`` need in its model.

    The model, once patched, keeps this alive, and this does not keep the user's ``handle``: a handle may be
    dropped while its model stays patched.
    """

    def __init__(self, state: State, splicer: Splicer) -> None:
        self.state, self.splicer = state, splicer
        self._layers = [anchor.layer for anchor in state.anchors]
        self.enabled, self.is_attached = True, True
        self.handle: ReferenceType[object] | None = None
        self._attention: list[PatchedLayer] = []
        self._sites: dict[ResidualSite, SiteShift] = {}
        self._hooks: dict[str, list[InputHook] | list[ResidualHook]] = {}
        state.patches = self

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "handle": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy's model, made by deepcopy or pickle, is patched by the copy."""
        self.__dict__.update(state)
        if self.is_attached:
            self.register()

    @property
    def is_dropped(self) -> bool:
        """Whether it had a handle and nobody has one now; a copy of a patched model never had."""
        return self.handle is not None and self.handle() is None

    def register(self) -> None:
        """Be found by :func:`patches_of` from now on, as long as the model keeps one of its layers."""
        _attached.update({id(layer): self for layer in self._layers})

    def start(self, adapters: Mapping[str, Adapter]) -> None:
        """The first adapters: all of them act, or none and the model is as it was."""
        for name, adapter in adapters.items():
            self._take_slot(name, adapter)
        if self.splicer.bank is not None:
            require_fusing(self.state.adapters)
        try:
            self.sync()
        except BaseException:
            self.remove()
            raise
        self.register()

    def add(self, name: str, adapter: Adapter) -> None:
        """One more adapter: it acts, or all is as it was. Raises as ``Handle.add``."""
        self._take_slot(name, adapter)
        try:
            self.sync()
            if self.state.rows is not None:
                self.copy_parameters()
                self.choose(self.state.rows)
        except BaseException:
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        """One adapter less."""
        slots = self.state.slots
        slots[slots.index(self.state.adapters.pop(name))] = None
        self.sync()

    def _take_slot(self, name: str, adapter: Adapter) -> None:
        state = self.state
        if name in state.adapters or adapter in state.slots:
            raise ValueError(f"name {name!r} or its adapter is attached already")
        if None not in state.slots:
            raise ValueError(f"all {len(state.slots)} slots are taken, expected a larger slots= at attach")
        check_fits(name, adapter, state, self.splicer)
        self._prepare(adapter)
        state.slots[state.slots.index(None)] = adapter
        state.adapters[name] = adapter
        if adapter.attention_site is not None:
            state.normalizer = adapter.attention_site.normalizer  # the same for all

    def _prepare(self, adapter: Adapter) -> None:
        """What ``adapter`` needs in the model and no other needed so far; not in its place yet."""
        state = self.state
        if adapter.attention_site is not None and not self._attention:
            hf_attention.register()
            softmax = [anchor for anchor in state.anchors if anchor.self_attn is not None]
            self._attention = [PatchedLayer(state, anchor) for anchor in softmax]
        for site in adapter.residual_sites:
            if site not in self._sites:
                self._sites[site] = SiteShift(state, site)
            if site.module not in self._hooks:
                self._hooks[site.module] = hooks_of(state.anchors, site.module)

    def sync(self) -> None:
        """Put in place what the attached adapters need, and nothing else."""
        if not (self.enabled and self.is_attached):
            return
        adapters = self.state.adapters.values()
        shifting = any(x.attention_site is not None for x in adapters)
        for layer in self._attention:
            layer.install() if shifting else layer.remove()
        needed = {site for adapter in adapters for site in adapter.residual_sites}
        # The norm that is kept is that of what the module returned, so those shifts act first.
        order = sorted(needed, key=lambda site: not site.preserve_norm)
        for module, hooks in self._hooks.items():
            for index, hook in enumerate(hooks):
                hook.shifts = [self._sites[site].layers[index] for site in order if site.module == module]
                hook.install() if hook.shifts else hook.remove()
        splicing = any(x.embedding_site is not None for x in adapters)
        self.splicer.hook.install() if splicing else self.splicer.hook.remove()
        selection = self.state.selection
        knows_slots = any(site.readout for site in needed)
        selection.install() if selection.is_on or knows_slots else selection.remove()

    def remove(self) -> None:
        """The plain model, object by object; :meth:`sync` brings everything back."""
        for layer in self._attention:
            layer.remove()
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self.splicer.hook.remove()
        self.state.selection.remove()

    def detach(self) -> None:
        """The plain model for good."""
        self.remove()
        self.is_attached = False
        for key in [id(layer) for layer in self._layers if _attached.get(id(layer)) is self]:
            del _attached[key]

    def copy_parameters(self) -> None:
        """Make the stacks of all slots those of the adapters as they are now."""
        for stack in (*self._attention, *(x for shift in self._sites.values() for x in shift.layers)):
            stack.copy_parameters()

    def set_strength(self, value: float) -> None:
        """Raises as ``Handle.strength``."""
        self.state.set_strength(value)
        self.choose(self.state.rows)

    def set_tokens(self, tokens: str | Tensor | None) -> None:
        """Raises as ``Handle.tokens``."""
        self.state.selection.choose(tokens)
        self.sync()

    def choose(self, rows: Rows | None) -> None:
        """Make ``rows`` tensors on the device, or close the open ones."""
        state = self.state
        state.rows = rows
        slots = {name: state.slots.index(adapter) for name, adapter in state.adapters.items()}
        shifting = {name for name, x in state.adapters.items() if x.attention_site is not None}
        # Inference tensors could not be copied into again outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            state.adapter_ids = state.prefixes = None
            if rows is not None:
                ids = [next((slots[name] for name in row if name in shifting), -1) for row in rows]
                state.adapter_ids = torch.tensor(ids, dtype=torch.int32, device=state.device)
                sites = [None if x is None else x.attention_site for x in state.slots]
                prefixes = [site is not None and site.prefix for site in sites]
                if any(prefixes):
                    state.prefixes = torch.tensor(prefixes, device=state.device)
            for site, shift in self._sites.items():
                here = {name: slots[name] for name, x in state.adapters.items() if site in x.residual_sites}
                shift.choose(rows, here, state.strength, state.device)


def patches_of(model: nn.Module) -> Patches | None:
    """What ``attach`` put into ``model``, enabled or not, if anything.

    Raises:
        UnsupportedModelError: unknown family.
    """
    found = (_attached.get(id(anchor.layer)) for anchor in find_anchors(model))
    return next((patches for patches in found if patches is not None), None)


def is_patched(model: nn.Module) -> bool:
    """Whether something of ours acts in ``model``, whoever put it there."""
    anchors = find_anchors(model)
    hooked = [x for anchor in anchors for x in (anchor.after_attention, anchor.mlp, anchor.layer)]
    hooks = [hook for x in (*hooked, model.get_input_embeddings()) for hook in x._forward_hooks.values()]
    hooks += anchors[0].layer._forward_pre_hooks.values()
    return any(isinstance(hook, InputHook | ResidualHook | EmbeddingHook) for hook in hooks) or any(
        hasattr(anchor.mixer, "mmicl_layer") for anchor in anchors
    )
