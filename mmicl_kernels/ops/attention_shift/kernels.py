"""Whose kernels compute the shift, here and in ``shifted_attention``, and the parameters they take."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mmicl_kernels.ops._core.dispatch import kernels_of
from mmicl_kernels.ops._core.layout import accumulated
from mmicl_kernels.ops._core.virtual_keys import stacked_keys
from mmicl_kernels.ops.attention_shift import _torch

# What ``_torch.py`` has, of the backend that ``impl`` runs; Triton's has ``attention_delta`` too.
backend_kernels = kernels_of(__package__, _torch)


class VirtualKeys(NamedTuple):
    """In the order in which kernels take them: ``_torch.py`` says of which shapes."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    adapter_ids: Tensor | None
    prefix: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]


def virtual_keys(
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: bool,
    prefixes: Tensor | None,
) -> VirtualKeys:
    """An op's arguments as the kernels take them; ``prefix`` says whether all are, or ``prefixes`` which."""
    parameters = accumulated(q, *stacked_keys(weight, bias, shift, adapter_ids is not None))
    if prefixes is not None:
        which = prefixes.contiguous()
    else:
        which = _all_true(q.device).expand(parameters[0].shape[0]) if prefix else None
    return VirtualKeys(*parameters, adapter_ids, which)


def _all_true(device: torch.device) -> Tensor:
    """True, ``[1]``: kept, but for those of graphs and of modes in which it only stands for a tensor."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return torch.ones(1, dtype=torch.bool, device=device)
    return _kept_true(device)


@functools.cache
def _kept_true(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, dtype=torch.bool, device=device)


def logit_grad(dg: Tensor, total: Tensor) -> Tensor:
    """The sum ``[B, H, T]`` of ``dg [B, H, T, N]``: the gradient of minus lse."""
    return dg[..., 0] if dg.shape[-1] == 1 else total


def parameter_grads(grads: list[Tensor], weight: Tensor, bias: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the stacked parameters in the shapes and dtypes of the given ones."""
    pairs = zip(grads, (weight, bias, shift), strict=True)
    return tuple(grad.reshape(x.shape).to(x.dtype) for grad, x in pairs)
