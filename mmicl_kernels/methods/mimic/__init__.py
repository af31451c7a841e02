from mmicl_kernels.methods.mimic.adapter import MimICAdapter
from mmicl_kernels.methods.mimic.config import MimICConfig

__all__ = ["MimICAdapter", "MimICConfig"]
