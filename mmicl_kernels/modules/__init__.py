"""Parameters plus one op call. Needs torch alone."""

from mmicl_kernels.modules.attention_shift import AttentionShift, ShiftedAttention
from mmicl_kernels.modules.residual_shift import ResidualShift

__all__ = ["AttentionShift", "ResidualShift", "ShiftedAttention"]
