"""What is stored: adapters on disk, libraries of them, and banks of demonstrations' fused tokens."""

from mmicl_kernels.data import Demonstration
from mmicl_kernels.library.bank_files import FusedTokens
from mmicl_kernels.library.checkpoint import read_adapter, read_official, save_official
from mmicl_kernels.library.demo_bank import DemonstrationBank
from mmicl_kernels.library.entry_file import Entry
from mmicl_kernels.library.hub import adapter_folder
from mmicl_kernels.library.vector_library import VLibrary

__all__ = [
    "Demonstration",
    "DemonstrationBank",
    "Entry",
    "FusedTokens",
    "VLibrary",
    "adapter_folder",
    "read_adapter",
    "read_official",
    "save_official",
]
