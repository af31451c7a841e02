"""One folder per paper: what is chosen (config) and what is learned (adapter)."""

from mmicl_kernels.methods.base import Adapter, Backbone, CheckpointError
from mmicl_kernels.methods.mimic import MimICAdapter, MimICConfig

ADAPTERS: dict[str, type[Adapter]] = {adapter.method: adapter for adapter in (MimICAdapter,)}

__all__ = ["ADAPTERS", "Adapter", "Backbone", "CheckpointError", "MimICAdapter", "MimICConfig"]
