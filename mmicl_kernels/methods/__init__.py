"""One folder per paper: what is chosen (config) and what is learned (adapter)."""

from mmicl_kernels.methods.aim import AIMAdapter, AIMConfig
from mmicl_kernels.methods.base import Adapter, Backbone, CheckpointError
from mmicl_kernels.methods.live import LIVEAdapter, LIVEConfig
from mmicl_kernels.methods.m2iv import M2IVAdapter, M2IVConfig
from mmicl_kernels.methods.mimic import MimICAdapter, MimICConfig
from mmicl_kernels.methods.sites import ResidualSite

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.method: adapter for adapter in (MimICAdapter, M2IVAdapter, LIVEAdapter, AIMAdapter)
}

__all__ = [
    "ADAPTERS",
    "AIMAdapter",
    "AIMConfig",
    "Adapter",
    "Backbone",
    "CheckpointError",
    "LIVEAdapter",
    "LIVEConfig",
    "M2IVAdapter",
    "M2IVConfig",
    "MimICAdapter",
    "MimICConfig",
    "ResidualSite",
]
