"""Whose kernels compute the shift, here and in ``shifted_attention``, and the parameters they take."""

from collections.abc import Sequence

from torch import Tensor

from mmicl_kernels.ops._core.dispatch import kernels_of
from mmicl_kernels.ops._core.layout import accumulated
from mmicl_kernels.ops.attention_shift import _torch

# What ``_torch.py`` has, of the backend that ``impl`` runs; Triton's has ``attention_delta`` too.
backend_kernels = kernels_of(__package__, _torch)


def stacked_parameters(q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Sequence[Tensor]:
    """Parameters as the kernels take them: ``[A, H, D]``, ``[A, H]``, ``[A, H, D]``, contiguous."""
    if weight.dim() == 2:
        weight, bias, shift = weight[None], bias[None], shift[None]
    return accumulated(q, weight, bias, shift)


def parameter_grads(grads: list[Tensor], weight: Tensor, bias: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the stacked parameters in the shapes and dtypes of the given ones."""
    pairs = zip(grads, (weight, bias, shift), strict=True)
    return tuple(grad.reshape(x.shape).to(x.dtype) for grad, x in pairs)
