from mmicl_kernels.ops.alignment_loss.api import alignment_loss

__all__ = ["alignment_loss"]
