from mmicl_kernels.ops.residual_shift_rms_norm.api import residual_shift_rms_norm

__all__ = ["residual_shift_rms_norm"]
