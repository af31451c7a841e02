"""Attention and shift in one pass over the keys, in Triton: the kernels of ``impl="triton"``.

Tensors have any strides with a contiguous last dimension; ``[B, H, T, D]`` results are stored so that
``transpose(1, 2)`` is contiguous. Nothing is read on the host.
"""

from mmicl_kernels.ops.shifted_attention._triton.bwd import backward
from mmicl_kernels.ops.shifted_attention._triton.fwd import forward

__all__ = ["backward", "forward"]
