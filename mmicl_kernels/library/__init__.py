"""What is stored: adapters on disk."""

from mmicl_kernels.library.checkpoint import read_adapter, read_official, save_official

__all__ = ["read_adapter", "read_official", "save_official"]
