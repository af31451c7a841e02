"""The splice in Triton: one launch forward, one backward (after a sort of the ids), no host sync.

The functions of :mod:`.._torch` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``). Rows have
any stride with contiguous columns. Every program works out by itself where its rows come from: a request's
demonstrations are walked from the last to the first, so that what fits is what is seen before the budget is
used up, and a token is found by its distance from the end of the fused tokens.

Ids and bounds are clamped, never trusted: wrong ones give wrong rows, not an access out of bounds.
"""

from mmicl_kernels.ops.prefix_splice._triton.bwd import prefix_splice_bwd
from mmicl_kernels.ops.prefix_splice._triton.fwd import prefix_splice_fwd, prefix_splice_place_

__all__ = ["prefix_splice_bwd", "prefix_splice_fwd", "prefix_splice_place_"]
