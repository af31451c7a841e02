from mmicl_kernels.ops.attention_shift.api import attention_shift

__all__ = ["attention_shift"]
