from mmicl_kernels.methods.hificl.adapter import HiFICLAdapter
from mmicl_kernels.methods.hificl.config import HiFICLConfig

__all__ = ["HiFICLAdapter", "HiFICLConfig"]
