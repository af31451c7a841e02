from mmicl_kernels.methods.m2iv.adapter import M2IVAdapter
from mmicl_kernels.methods.m2iv.config import M2IVConfig

__all__ = ["M2IVAdapter", "M2IVConfig"]
