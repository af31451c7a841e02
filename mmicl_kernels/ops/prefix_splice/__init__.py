from mmicl_kernels.ops.prefix_splice.api import Splice, prefix_splice, prefix_splice_

__all__ = ["Splice", "prefix_splice", "prefix_splice_"]
