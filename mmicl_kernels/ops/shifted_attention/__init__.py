from mmicl_kernels.ops.shifted_attention.api import shifted_attention

__all__ = ["shifted_attention"]
