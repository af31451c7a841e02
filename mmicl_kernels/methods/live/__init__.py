from mmicl_kernels.methods.live.adapter import LIVEAdapter
from mmicl_kernels.methods.live.config import LIVEConfig

__all__ = ["LIVEAdapter", "LIVEConfig"]
