"""The shift in Triton: one read of every operand per pass, deterministic parameter gradients.

The four functions of :mod:`.._torch` on CUDA tensors (on CPU tensors under ``TRITON_INTERPRET=1``).
``[B, H, T, D]`` operands have any strides with a contiguous last dimension; new ones are stored so that
``transpose(1, 2)`` is contiguous. A program owns rows of one head of one batch row; neighbouring
programs own neighbouring heads, which lie side by side in that storage.
"""

from mmicl_kernels.ops.attention_shift._triton.bwd import add_gate_grad_, attention_delta, attention_shift_bwd
from mmicl_kernels.ops.attention_shift._triton.fwd import attention_shift_fwd, attention_shift_fwd_

__all__ = [
    "add_gate_grad_",
    "attention_delta",
    "attention_shift_bwd",
    "attention_shift_fwd",
    "attention_shift_fwd_",
]
