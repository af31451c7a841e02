"""HuggingFace models: where things are (anchors), how they are patched (attach)."""

from mmicl_kernels.integration.anchors import UnsupportedModelError
from mmicl_kernels.integration.attach import Handle, attach
from mmicl_kernels.integration.create import create, load, load_official

__all__ = ["Handle", "UnsupportedModelError", "attach", "create", "load", "load_official"]
