from mmicl_kernels.ops.row_projection.api import row_projection

__all__ = ["row_projection"]
