"""One folder per paper: what is chosen (config), what is learned (adapter), what is minimised (objective)."""

from mmicl_kernels.methods.aim import AIMAdapter, AIMConfig
from mmicl_kernels.methods.base import Adapter, Backbone, CheckpointError
from mmicl_kernels.methods.hificl import HiFICLAdapter, HiFICLConfig
from mmicl_kernels.methods.live import LIVEAdapter, LIVEConfig
from mmicl_kernels.methods.m2iv import M2IVAdapter, M2IVConfig
from mmicl_kernels.methods.mimic import MimICAdapter, MimICConfig
from mmicl_kernels.methods.prompt_tuning import PromptTuningAdapter, PromptTuningConfig
from mmicl_kernels.methods.registry import Registry
from mmicl_kernels.methods.sites import AttentionSite, EmbeddingSite, ResidualSite
from mmicl_kernels.methods.stave import STAVEAdapter, STAVEConfig

ADAPTERS = Registry(
    MimICAdapter, M2IVAdapter, LIVEAdapter, AIMAdapter, HiFICLAdapter, PromptTuningAdapter, STAVEAdapter
)  # fmt: skip
register = ADAPTERS.register

__all__ = [
    "ADAPTERS",
    "AIMAdapter",
    "AIMConfig",
    "Adapter",
    "AttentionSite",
    "Backbone",
    "CheckpointError",
    "EmbeddingSite",
    "HiFICLAdapter",
    "HiFICLConfig",
    "LIVEAdapter",
    "LIVEConfig",
    "M2IVAdapter",
    "M2IVConfig",
    "MimICAdapter",
    "MimICConfig",
    "PromptTuningAdapter",
    "PromptTuningConfig",
    "ResidualSite",
    "STAVEAdapter",
    "STAVEConfig",
    "register",
]
