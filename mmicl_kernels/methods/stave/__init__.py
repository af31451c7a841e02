from mmicl_kernels.methods.stave.adapter import STAVEAdapter
from mmicl_kernels.methods.stave.config import STAVEConfig

__all__ = ["STAVEAdapter", "STAVEConfig"]
