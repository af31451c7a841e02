"""The patch of one self-attention: a clone of its config that names our attention function."""

import copy
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.methods import Adapter
from mmicl_kernels.models.anchors import Anchor
from mmicl_kernels.models.parallel import local_heads
from mmicl_kernels.ops.attention_shift.kernels import virtual_keys as kernel_keys
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.patch.slots import SlotStack, for_batch
from mmicl_kernels.patch.state import State


class VirtualKeys(NamedTuple):
    """What ``ops.shifted_attention`` is told of adapters."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    adapter_ids: Tensor | None
    prefix: bool | Tensor


class PatchedLayer(SlotStack):
    """What one patched attention reads at run time; the module has it as an attribute."""

    def __init__(self, state: State, anchor: Anchor) -> None:
        super().__init__(state.slots, anchor.device)
        self._num_keys = 1  # of the slots; it never shrinks, so that nothing is compiled again
        self._state, self._anchor, self._key = state, anchor, str(anchor.index)
        self._module = anchor.mixer
        self._base_config = self._module.config
        hf_attention.mask_kind(self.base_implementation)  # refused before anything is patched
        # The decoder's own config, which its masks follow, stays.
        self._config = copy.copy(self._base_config)
        self._config._attn_implementation_internal = hf_attention.NAME

    def __setstate__(self, state: dict[str, object]) -> None:
        hf_attention.register()  # a model unpickled in another process names it
        self.__dict__.update(state)

    def install(self) -> None:
        self._module.config, self._module.mmicl_layer = self._config, self

    def remove(self) -> None:
        if getattr(self._module, "mmicl_layer", None) is self:
            self._module.config = self._base_config
            del self._module.mmicl_layer

    @property
    def base_implementation(self) -> str:
        """The decoder's own implementation, which made the masks we receive; users may change it."""
        return self._base_config._attn_implementation

    @property
    def normalizer(self) -> str:
        return self._state.normalizer

    @property
    def impl(self) -> str:
        return self._state.impl

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, scale: float | None,
        softcap: float | None, window: int | None,
    ) -> Tensor | None:  # fmt: skip
        """One token's attention ``[B, 1, H, D]`` by the operator itself; None: it is the public op's."""
        adapter = self._state.direct_adapter(query, self._anchor)
        if adapter is None or torch.is_autocast_enabled("cpu"):
            return None
        # Not by its property: a config's attributes are looked up by a function of Python.
        implementation = object.__getattribute__(self._base_config, "_attn_implementation_internal")
        masks, all_keys = hf_attention.known_masks(implementation), self._state.normalizer == "all_keys"
        fits = mask is None or (type(mask) is Tensor and mask.dim() == 4 and mask.shape[3] == key.shape[2])
        if masks not in ("sdpa", "eager") or not fits:
            return None
        if all_keys and mask is not None and mask.dtype != torch.bool:
            return None
        parts = adapter.attention_parts(self._key)
        prepared = self.prepared(parts, (query.dtype, query.shape[1]), self._kernel_keys, query, adapter)
        if prepared is None:
            return None
        return torch.ops.mmicl.shifted_attention_step.default(
            query, key, value, *prepared, query.shape[3] ** -0.5 if scale is None else scale, softcap,
            window if mask is None and masks == "sdpa" else None, mask, all_keys,
        )  # fmt: skip

    def _kernel_keys(self, query: Tensor, adapter: Adapter) -> tuple[Tensor | None, ...]:
        parameters = self._local([*adapter.attention_shift(self._key)], 0, query.shape[1])
        return kernel_keys(query, *parameters, None, adapter.attention_site.prefix, None)

    def warn_of_padding(self, kind: str, mask: object) -> None:
        """Once for a handle, where tokens see no key: the official gate, which counts theirs, knew others.

        ``mask``: of sdpa. One layer looks, before the first warning alone: on GPU the host waits for it.
        """
        state = self._state
        if state.normalizer != "all_keys" or kind != "sdpa" or state.warned_of_padding:
            return
        if type(mask) is not Tensor or mask.dtype != torch.bool or mask.is_meta or _is_recorded():
            return
        if self._anchor is not state.first_attention or mask.any(-1).all():
            return
        state.warned_of_padding = True
        warnings.warn(
            "normalizer is 'all_keys' and the batch is padded on the left: the gate counts padding, whose "
            "states under attn_implementation='sdpa' are not those of the official code, expected 'eager' "
            "for that code's numbers (mmicl_kernels/methods/mimic/README.md)",
            stacklevel=2,
        )

    def virtual_keys(self, query: Tensor) -> VirtualKeys:
        """For the batch and the heads of ``query [B, H, T, D]``, which are those of this process."""
        state, (B, H) = self._state, query.shape[:2]
        state.check_recomputation(self._anchor)
        self.note_training()
        chosen = state.selection.of(query[:, 0])
        if state.adapter_ids is None:
            adapter = state.require_single()
            parameters, ids = self._local([*adapter.attention_shift(self._key)], 0, H), None
            if chosen is not None:
                parameters, ids = [x[None] for x in parameters], chosen.int() - 1
            return VirtualKeys(*parameters, ids, adapter.attention_site.prefix)
        ids = for_batch(state.adapter_ids.to(self._device), B)
        if chosen is not None:
            ids = ids[:, None].where(chosen, -1)
        prefix = state.prefixes if state.prefixes is None else state.prefixes.to(self._device)
        return VirtualKeys(*self._local(self.stacked(), 1, H), ids, False if prefix is None else prefix)

    def _local(self, parameters: list[Tensor], dim: int, H: int) -> list[Tensor]:
        """The rows of H consecutive heads: with tensor parallelism an attention sees its share alone."""
        return local_heads(parameters, dim, H, self._anchor.num_heads, self._anchor.projection)

    def _fitted(self, used: list[tuple[int, list[Tensor]]]) -> list[tuple[int, list[Tensor]]]:
        """All with as many virtual keys as that which has most; a key with a bias of -inf is none."""
        self._num_keys = max([self._num_keys, *(_num_keys(tensors) for _, tensors in used)])
        if all(tensors[1].dim() == 1 for _, tensors in used) and self._num_keys == 1:
            return used
        return [(slot, _padded(tensors, self._num_keys)) for slot, tensors in used]

    def _of(self, adapter: Adapter) -> list[Tensor] | None:
        return None if adapter.attention_site is None else [*adapter.attention_shift(self._key)]


def _is_recorded() -> bool:
    """In a graph, where nothing can be read."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def _num_keys(tensors: list[Tensor]) -> int:
    return tensors[1].shape[1] if tensors[1].dim() == 2 else 1


def _padded(tensors: list[Tensor], N: int) -> list[Tensor]:
    """Weight, bias and shift ``[H, N, ...]``."""
    if tensors[1].dim() == 1:
        tensors = [x.unsqueeze(1) for x in tensors]
    weight, bias, shift = tensors
    more = N - bias.shape[1]
    if more == 0:
        return tensors
    rows = (0, 0, 0, more)
    return [F.pad(weight, rows), F.pad(bias, (0, more), value=-torch.inf), F.pad(shift, rows)]
