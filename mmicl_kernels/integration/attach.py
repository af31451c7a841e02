"""Patch a model with adapters, and take the patch off again."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mmicl_kernels.integration import hf_attention
from mmicl_kernels.integration.anchors import Anchor, describe_backbone, find_anchors
from mmicl_kernels.methods import Adapter, Backbone, CheckpointError, MimICAdapter
from mmicl_kernels.ops._impl import resolve
from mmicl_kernels.ops.shifted_attention.api import IMPLEMENTATIONS

DEFAULT_NAME = "default"
PARAMETERS = ("weight", "bias", "shift")

# A disabled handle leaves no trace on its model, so handles are also known by their first attention's id.
_attached: "WeakValueDictionary[int, Handle]" = WeakValueDictionary()


def attach(
    model: nn.Module,
    adapter: Adapter | Mapping[str, Adapter],
    *,
    impl: str = "auto",
    slots: int = 8,
) -> "Handle":
    """Patch ``model``, an instance of a supported HuggingFace LVLM, so that ``adapter`` acts in it.

    A single adapter acts on every batch row. Of a dict of adapters, each row uses the one that
    :meth:`Handle.rows` names. Nothing is registered on the model: its parameters, state dict and
    ``save_pretrained`` stay as they are, and no other instance is touched.

    Args:
        impl: implementation of :func:`mmicl_kernels.ops.shifted_attention`.
        slots: how many adapters the handle can hold at once.

    Raises:
        UnsupportedModelError: unknown family, or a part of it is missing. CheckpointError: an adapter
        of another backbone. TypeError, ValueError, NotImplementedError: other bad arguments. The model
        is untouched after any of them.
    """
    resolve(impl, IMPLEMENTATIONS, "auto", "shifted_attention")
    single = isinstance(adapter, Adapter)
    adapters = {DEFAULT_NAME: adapter} if single else adapter
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapter is {adapter!r}, expected an Adapter or a dict of them by name")
    if not isinstance(slots, int) or slots < len(adapters):
        raise ValueError(f"slots is {slots!r}, expected at least the {len(adapters)} adapters given")
    return Handle(model, adapters, single, impl, slots)


class Handle:
    """A patched model, from :func:`attach`. As a context manager it detaches at the end of its block."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Adapter],
        single: bool,
        impl: str,
        slots: int,
    ) -> None:
        self.model, self.impl = model, impl
        self.adapter_ids: Tensor | None = None
        self.anchors = find_anchors(model)
        self._backbone = describe_backbone(model, self.anchors)
        self._single = single
        self._adapters: dict[str, Adapter] = {}
        self._slots: list[Adapter | None] = [None] * slots
        self._original = [anchor.self_attn.config for anchor in self.anchors]
        self._key = id(self.anchors[0].self_attn)
        if self._key in _attached or any(hasattr(config, "mmicl_layer") for config in self._original):
            raise ValueError(
                "the model is patched already: detach() its handle or add() to it "
                "(a deepcopy of a patched model is patched too: copy it before attach)"
            )
        for name, adapter in adapters.items():
            self._take_slot(name, adapter)

        hf_attention.register()
        self._patched = [
            _patched_config(config, PatchedLayer(self, anchor, config))
            for anchor, config in zip(self.anchors, self._original, strict=True)
        ]
        self.enable()
        _attached[self._key] = self

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name; a single one is called "default"."""
        return dict(self._adapters)

    @property
    def single(self) -> Adapter | None:
        """The adapter of all rows, where there is only one and it was attached by itself."""
        alone = self._single and len(self._adapters) == 1
        return next(iter(self._adapters.values())) if alone else None

    @property
    def enabled(self) -> bool:
        return any(
            anchor.self_attn.config is config
            for anchor, config in zip(self.anchors, self._patched, strict=False)
        )

    def enable(self) -> None:
        """Switch the adapters on, as they are after :func:`attach`."""
        self._check_attached()
        self._set_configs(self._patched)

    def disable(self) -> None:
        """Switch the adapters off: the plain model, bit for bit, until :meth:`enable`."""
        self._check_attached()
        self._set_configs(self._original)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model within a ``with`` block, for all threads."""
        enabled = self.enabled
        self.disable()
        try:
            yield
        finally:
            if enabled and self._patched:
                self.enable()

    def detach(self) -> None:
        """Restore the model exactly. Detaching again does nothing."""
        if self._patched:
            self._set_configs(self._original)
            self._patched = []
            if _attached.get(self._key) is self:
                del _attached[self._key]

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextmanager
    def rows(self, names: str | None | Sequence[str | tuple[str, ...] | None]) -> Iterator[None]:
        """Say which adapter each batch row uses, within a ``with`` block.

        The choice is the handle's: threads that share a model must take turns.

        Args:
            names: one entry per row: an adapter's name, None for no shift, or a tuple of names with at
                most one of method MimIC. One name (or None) alone means all rows. Where ``generate``
                repeats rows (beams, ``num_return_sequences``) the entries are repeated with them.

        Raises:
            KeyError: an unknown name. ValueError: two MimIC adapters in one row, or no rows.
            TypeError: an entry that is none of these.
        """
        self._check_attached()
        entries = [names] if names is None or isinstance(names, str) else list(names)
        if not entries:
            raise ValueError("names is empty, expected one entry per batch row")
        ids = torch.tensor([self._slot(entry) for entry in entries], dtype=torch.int32)
        # Inference tensors could not be copied into again outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for config in self._patched:
                config.mmicl_layer.copy_parameters(self._slots)
            ids = ids.clone().to(self.anchors[0].self_attn.o_proj.weight.device)
        before, self.adapter_ids = self.adapter_ids, ids
        try:
            yield
        finally:
            self.adapter_ids = before

    def add(self, name: str, adapter: Adapter) -> None:
        """Put one more adapter into a free slot. Shapes stay, so nothing is compiled again.

        Raises:
            ValueError: the name is taken, or no slot is free. CheckpointError: another backbone.
        """
        self._check_attached()
        self._take_slot(name, adapter)

    def remove(self, name: str) -> None:
        """Free the slot of an adapter.

        Raises:
            KeyError: unknown name. ValueError: it is the last one, or :meth:`rows` is open.
        """
        if name not in self._adapters:
            raise KeyError(f"no adapter is named {name!r}, expected one of {sorted(self._adapters)}")
        if len(self._adapters) == 1:
            raise ValueError(f"{name!r} is the last adapter, expected another; use detach()")
        if self.adapter_ids is not None:
            raise ValueError(f"{name!r} may be in use, expected no open rows()")
        self._slots[self._slots.index(self._adapters.pop(name))] = None

    def _take_slot(self, name: str, adapter: Adapter) -> None:
        if name in self._adapters or adapter in self._slots:
            raise ValueError(f"name {name!r} or its adapter is attached already")
        if None not in self._slots:
            raise ValueError(f"all {len(self._slots)} slots are taken, expected a larger slots= at attach")
        self._check_fits(name, adapter)
        self._slots[self._slots.index(None)] = adapter
        self._adapters[name] = adapter
        self.normalizer = adapter.config.normalizer  # the same for all

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        if not isinstance(adapter, MimICAdapter):
            raise TypeError(f"adapter {name!r} is a {type(adapter).__name__}, expected a MimICAdapter")
        check_backbone(adapter, self._backbone)
        if adapter.config.ffn_shift:
            raise NotImplementedError(
                f"adapter {name!r} has an ffn_shift, which is loaded and saved but not applied yet"
            )
        if self._adapters and adapter.config.normalizer != self.normalizer:
            raise ValueError(
                f"adapter {name!r} has normalizer {adapter.config.normalizer!r}, "
                f"expected {self.normalizer!r} like the others"
            )
        for anchor in self.anchors:
            device = anchor.self_attn.o_proj.weight.device
            parameter = adapter.layers[str(anchor.index)].weight
            if parameter.device != device:
                raise ValueError(
                    f"adapter {name!r} has layer {anchor.index} on {parameter.device}, expected {device}"
                )

    def _slot(self, entry: str | tuple[str, ...] | None) -> int:
        if not isinstance(entry, str | tuple | None):
            raise TypeError(f"a row is {entry!r}, expected a name, a tuple of names or None")
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        if len(names) > 1:
            raise ValueError(f"a row names {names}, expected at most one MimIC adapter")
        for name in names:
            if name not in self._adapters:
                raise KeyError(
                    f"no adapter is named {name!r}, expected one of {sorted(self._adapters)} or None"
                )
            return self._slots.index(self._adapters[name])
        return -1

    def _set_configs(self, configs: list[PretrainedConfig]) -> None:
        for anchor, config in zip(self.anchors, configs, strict=True):
            anchor.self_attn.config = config

    def _check_attached(self) -> None:
        if not self._patched:
            raise RuntimeError("the handle is detached, expected an attached one")


class PatchedLayer:
    """What one patched attention reads at run time; it lives on the module's cloned config."""

    def __init__(self, handle: Handle, anchor: Anchor, base_config: PretrainedConfig) -> None:
        self.key = str(anchor.index)
        self._handle, self._base_config = handle, base_config
        self._stacks: list[Tensor] = []

    @property
    def base_implementation(self) -> str:
        """The decoder's own implementation, which made the masks we receive; users may change it."""
        return self._base_config._attn_implementation

    @property
    def normalizer(self) -> str:
        return self._handle.normalizer

    @property
    def impl(self) -> str:
        return self._handle.impl

    def parameters(self, B: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Weight, bias, shift and adapter ids for a batch of B rows."""
        ids = self._handle.adapter_ids
        if ids is None:
            single = self._handle.single
            if single is None:
                names = ", ".join(map(repr, self._handle.adapters))
                raise RuntimeError(
                    f"several adapters are attached ({names}): say which rows use which, "
                    "`with handle.rows([...]):`"
                )
            return *self._of(single), None
        if B % ids.shape[0] != 0:
            raise ValueError(f"rows() named {ids.shape[0]} rows, expected a divisor of the batch {B}")
        return *self._stacked(), ids.to(self._stacks[0].device).repeat_interleave(B // ids.shape[0])

    def copy_parameters(self, slots: list[Adapter | None]) -> None:
        """Copy the current parameters of all adapters into fixed ``[slots, ...]`` tensors."""
        attached = [self._of(adapter) for adapter in slots if adapter is not None]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x, *_ in attached), torch.float32)
        if not self._stacks or self._stacks[0].dtype != dtype:
            self._stacks = [x.new_zeros(len(slots), *x.shape, dtype=dtype) for x in attached[0]]
        for slot, adapter in enumerate(slots):
            if adapter is not None:
                for stack, parameter in zip(self._stacks, self._of(adapter), strict=True):
                    stack[slot].copy_(parameter.detach())

    def _stacked(self) -> list[Tensor]:
        """The copied parameters; while training, stacked anew so that gradients reach the adapters."""
        # Asked first: a graph compiled without gradients must not depend on which adapters there are.
        if not torch.is_grad_enabled():
            return self._stacks
        adapters = self._handle.adapters.values()
        if not any(x.requires_grad for adapter in adapters for x in self._of(adapter)):
            return self._stacks
        columns = [[*stack] for stack in self._stacks]
        for slot, adapter in enumerate(self._handle._slots):
            if adapter is not None:
                for column, parameter in zip(columns, self._of(adapter), strict=True):
                    column[slot] = parameter.to(column[slot].dtype)
        return [torch.stack(column) for column in columns]

    def _of(self, adapter: Adapter) -> list[Tensor]:
        layer = adapter.layers[self.key]
        return [getattr(layer, name) for name in PARAMETERS]


def check_backbone(adapter: Adapter, backbone: Backbone) -> None:
    """Raise CheckpointError unless ``adapter`` was made for ``backbone``."""
    differences = adapter.backbone.differences(backbone)
    if differences:
        raise CheckpointError("the adapter belongs to another backbone: " + "; ".join(differences))


def _patched_config(config: PretrainedConfig, layer: PatchedLayer) -> PretrainedConfig:
    """A clone for one attention module; the decoder's own config, which its masks follow, stays."""
    clone = copy.copy(config)
    clone._attn_implementation_internal = hf_attention.NAME
    clone.mmicl_layer = layer
    return clone
