from mmicl_kernels.ops.alignment_loss.api import alignment_loss, alignment_squares

__all__ = ["alignment_loss", "alignment_squares"]
