"""The patch of one self-attention: a clone of its config that names our attention function."""

import copy

from torch import Tensor

from mmicl_kernels.methods import Adapter
from mmicl_kernels.models.anchors import Anchor
from mmicl_kernels.models.parallel import local_heads
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.patch.slots import SlotStack, for_batch
from mmicl_kernels.patch.state import State


class PatchedLayer(SlotStack):
    """What one patched attention reads at run time; the module has it as an attribute."""

    def __init__(self, state: State, anchor: Anchor) -> None:
        super().__init__(state.slots, anchor.device)
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

    def parameters(self, B: int, H: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Weight, bias, shift and adapter ids for a batch of B rows and the H heads of this process."""
        self._state.check_recomputation(self._anchor)
        ids = self._state.adapter_ids
        if ids is None:
            return *self._local(self._of(self._state.require_single()), H), None
        return *self._local(self.stacked(), H), for_batch(ids.to(self._device), B)

    def _local(self, parameters: list[Tensor], H: int) -> list[Tensor]:
        """The rows of H consecutive heads: with tensor parallelism an attention sees its share alone."""
        return local_heads(parameters, H, self._anchor.num_heads, self._anchor.projection)

    def _of(self, adapter: Adapter) -> list[Tensor] | None:
        return None if adapter.attention_site is None else [*adapter.attention_shift(self._key)]
