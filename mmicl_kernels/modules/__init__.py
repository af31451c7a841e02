"""Parameters plus one op call. Needs torch alone."""

from mmicl_kernels.modules.attention_shift import AttentionShift, ShiftedAttention

__all__ = ["AttentionShift", "ShiftedAttention"]
