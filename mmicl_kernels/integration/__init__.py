"""HuggingFace models: where things are (anchors), how they are patched (attention, residual, attach)."""

from mmicl_kernels.integration.adapted_model import AdaptedModel
from mmicl_kernels.integration.anchors import UnsupportedModelError
from mmicl_kernels.integration.attach import attach, detach, handle_of
from mmicl_kernels.integration.create import create, load, load_official
from mmicl_kernels.integration.handle import Handle
from mmicl_kernels.integration.pretrained import load_model, load_processor
from mmicl_kernels.integration.prompts import PromptBuilder

__all__ = [
    "AdaptedModel",
    "Handle",
    "PromptBuilder",
    "UnsupportedModelError",
    "attach",
    "create",
    "detach",
    "handle_of",
    "load",
    "load_model",
    "load_official",
    "load_processor",
]
