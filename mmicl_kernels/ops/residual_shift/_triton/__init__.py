"""The residual shift in Triton: one read of every operand per pass, deterministic gradients.

The functions of :mod:`.._torch` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``).
``[B, T, C]`` operands have any strides with a contiguous last dimension.
"""

from mmicl_kernels.ops.residual_shift._triton.gradients import adapter_sums, entry_grads, entry_products
from mmicl_kernels.ops.residual_shift._triton.shift import residual_shift_bwd, residual_shift_fwd

__all__ = ["adapter_sums", "entry_grads", "entry_products", "residual_shift_bwd", "residual_shift_fwd"]
