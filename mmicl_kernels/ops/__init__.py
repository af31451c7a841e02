"""Pure functions of tensors. Needs torch alone; Triton is imported when a kernel of it first runs."""

from mmicl_kernels.ops.alignment_loss import alignment_loss
from mmicl_kernels.ops.attention_shift import attention_shift
from mmicl_kernels.ops.prefix_splice import prefix_splice, prefix_splice_
from mmicl_kernels.ops.residual_shift import residual_shift
from mmicl_kernels.ops.residual_shift_rms_norm import residual_shift_rms_norm
from mmicl_kernels.ops.row_projection import row_projection
from mmicl_kernels.ops.shifted_attention import shifted_attention

__all__ = [
    "alignment_loss",
    "attention_shift",
    "prefix_splice",
    "prefix_splice_",
    "residual_shift",
    "residual_shift_rms_norm",
    "row_projection",
    "shifted_attention",
]
