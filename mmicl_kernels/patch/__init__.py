"""Adapters in a model: how they get in (sites), and what the user holds (the handle)."""

from mmicl_kernels.patch.adapted_model import AdaptedModel
from mmicl_kernels.patch.attach import attach, detach, handle_of
from mmicl_kernels.patch.create import create, load, load_official
from mmicl_kernels.patch.handle import Handle

__all__ = [
    "AdaptedModel",
    "Handle",
    "attach",
    "create",
    "detach",
    "handle_of",
    "load",
    "load_official",
]
