"""The patch of one self-attention: a clone of its config that names our attention function."""

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from mmicl_kernels.integration import hf_attention
from mmicl_kernels.integration.anchors import Anchor
from mmicl_kernels.integration.parallel import local_heads
from mmicl_kernels.integration.slots import SlotStack, for_batch
from mmicl_kernels.methods import Adapter, MimICAdapter

if TYPE_CHECKING:
    from mmicl_kernels.integration.handle import Handle

PARAMETERS = ("weight", "bias", "shift")


class PatchedLayer(SlotStack):
    """What one patched attention reads at run time; the module has it as an attribute."""

    def __init__(self, handle: "Handle", anchor: Anchor, slots: list[Adapter | None]) -> None:
        super().__init__(slots, anchor.device)
        self._handle, self._anchor, self._key = handle, anchor, str(anchor.index)
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
        self._module.config = self._base_config
        vars(self._module).pop("mmicl_layer", None)

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

    def parameters(self, B: int, H: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Weight, bias, shift and adapter ids for a batch of B rows and the H heads of this process."""
        self._handle.check_recomputation(self._anchor)
        ids = self._handle.adapter_ids
        if ids is None:
            return *self._local(self._of(self._handle.require_single()), H), None
        return *self._local(self.stacked(), H), for_batch(ids.to(self._device), B)

    def _local(self, parameters: list[Tensor], H: int) -> list[Tensor]:
        """The rows of H consecutive heads: with tensor parallelism an attention sees its share alone."""
        return local_heads(parameters, H, self._anchor.num_heads, self._anchor.projection)

    def _of(self, adapter: Adapter) -> list[Tensor] | None:
        if not isinstance(adapter, MimICAdapter):
            return None
        layer = adapter.layers[self._key]
        return [getattr(layer, name) for name in PARAMETERS]
