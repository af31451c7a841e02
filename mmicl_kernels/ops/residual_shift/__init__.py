from mmicl_kernels.ops.residual_shift.api import residual_shift

__all__ = ["residual_shift"]
