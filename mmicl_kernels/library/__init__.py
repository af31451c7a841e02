"""What is stored: adapters on disk, and libraries of them."""

from mmicl_kernels.library.checkpoint import read_adapter, read_official, save_official
from mmicl_kernels.library.entry_file import Entry
from mmicl_kernels.library.vector_library import VLibrary

__all__ = ["Entry", "VLibrary", "read_adapter", "read_official", "save_official"]
