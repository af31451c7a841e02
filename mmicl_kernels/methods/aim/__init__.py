from mmicl_kernels.methods.aim.adapter import AIMAdapter
from mmicl_kernels.methods.aim.config import AIMConfig

__all__ = ["AIMAdapter", "AIMConfig"]
