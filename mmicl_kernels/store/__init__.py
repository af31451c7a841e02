"""What is stored: adapters on disk, libraries of them, and banks of demonstrations' fused tokens."""

from mmicl_kernels.store.checkpoint import read_adapter
from mmicl_kernels.store.demo_bank import DemonstrationBank
from mmicl_kernels.store.entry_file import Entry
from mmicl_kernels.store.hub import adapter_folder
from mmicl_kernels.store.vector_library import VLibrary

__all__ = [
    "DemonstrationBank",
    "Entry",
    "VLibrary",
    "adapter_folder",
    "read_adapter",
]
