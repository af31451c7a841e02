"""Parameters plus one op call. Needs torch alone."""

from mmicl_kernels.modules.attention_shift import AttentionShift, ShiftedAttention
from mmicl_kernels.modules.residual_shift import ResidualShift
from mmicl_kernels.modules.token_fuser import TokenFuser

__all__ = ["AttentionShift", "ResidualShift", "ShiftedAttention", "TokenFuser"]
