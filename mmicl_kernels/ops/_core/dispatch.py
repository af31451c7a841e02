"""From a public op to its kernels: which run, and what autograd, autocast and vmap are told of them.

The implementation is what a caller names: it runs or raises, and only ``auto`` chooses. The backend is whose
kernels it runs: Triton's, C++ on CPU, or PyTorch's.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmicl_kernels import _extension
from mmicl_kernels.ops._core.checks import check_choice

# Whether Triton can be imported, asked once and without importing it: a search takes longer than a launch.
HAS_TRITON = importlib.util.find_spec("triton") is not None

IMPLS = ("reference", "composed", "triton", "cuda")


def has_cpu_kernels() -> bool:
    """Whether the C++ kernels were built; it is no part of a graph."""
    return _extension.load()


# All that torch.compiler.assume_constant_result does, which would import all of torch's compiler.
has_cpu_kernels._dynamo_marked_constant = True


def calls_cpp(x: Tensor) -> bool:
    """Whether an op that needs no gradients is C++'s own operator for ``x``, which graphs call by its name.

    Not in an exported program, which may run where there are no C++ kernels, or they are not loaded yet.
    """
    return x.device.type == "cpu" and not torch.compiler.is_exporting() and has_cpu_kernels()


def backend(impl: str, device: torch.device) -> str:
    """Whose kernels ``impl`` runs on ``device``: "triton", "cpp" or "torch".

    Triton's where it is named, and on CUDA if it can be had; C++ on CPU if it was built.
    """
    if impl == "triton" or (device.type == "cuda" and HAS_TRITON):
        return "triton"
    return "cpp" if device.type == "cpu" and has_cpu_kernels() else "torch"


def kernels_of(package: str, stock: ModuleType) -> Callable[[str, torch.device], ModuleType]:
    """What says whose kernels ``impl`` runs on a device: ``package._triton``, C++'s, or those of ``stock``.

    Triton's are imported where they are first run.
    """

    def kernels(impl: str, device: torch.device) -> ModuleType:
        name = backend(impl, device)
        if name == "triton":
            return importlib.import_module(f"{package}._triton")
        return torch.ops.mmicl_cpu if name == "cpp" else stock

    return kernels


def require_triton(device: torch.device) -> None:
    """Raise RuntimeError unless a Triton kernel can run on ``device``."""
    if not HAS_TRITON:
        raise RuntimeError("impl='triton' needs the package triton: pip install triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "impl='triton' runs on CPU tensors only under the environment variable "
            "TRITON_INTERPRET=1; use impl='composed' there"
        )


def require_cuda(device: torch.device) -> None:
    """Raise RuntimeError unless the kernels of ``csrc/cuda`` can run on ``device``.

    On CPU they can where ``tests/cuda`` emulates a GPU.
    """
    reason = _missing_cuda(device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"impl='cuda' cannot run on {device}: {reason}")


def _missing_cuda(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return None if hasattr(torch.ops.mmicl_cuda, "emulate") else "it needs CUDA tensors"
    reason = _extension.missing_cuda()
    if reason is None and (capability := torch.cuda.get_device_capability(index))[0] != 9:
        reason = f"it needs compute capability 9 (Hopper), this is {capability[0]}.{capability[1]}"
    return reason


_missing_cuda._dynamo_marked_constant = True  # as above


def resolve(impl: str, available: tuple[str, ...], auto: str, op: str) -> str:
    """Return the name of the implementation to run.

    Args:
        impl: what the caller asked for. available: what the op has. auto: what ``auto`` means here.

    Raises:
        ValueError: unknown name. NotImplementedError: known, but ``op`` does not have it.
    """
    if impl in IMPLS and impl not in available:
        raise NotImplementedError(f"{op} has no impl={impl!r}, only {', '.join(available)}")
    check_choice("impl", impl, ("auto", *available))
    return auto if impl == "auto" else impl


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, a kernel computes in the dtypes it chose. Entering autocast for nothing would cost 10 us."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd must see the op. Without, it costs a third of the time of a small call."""
    # Forward-mode derivatives must reach the function too, which refuses them; the op would drop them.
    forward_mode = forward_ad._current_level >= 0
    return forward_mode or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def distinct(*inputs: Any) -> tuple[Any, ...]:
    """``inputs`` of an autograd.Function, each tensor once and then as a view: Dynamo refuses it twice."""
    if not torch.compiler.is_compiling():
        return inputs
    once: list[Any] = []
    for x in inputs:
        is_used = isinstance(x, Tensor) and any(x is y for y in once)
        once.append(x.view_as(x) if is_used else x)
    return tuple(once)


def refuse_vmap(op: str) -> Callable[..., NoReturn]:
    """A vmap rule that says why there is none."""

    def refuse(info: object, in_dims: object, *inputs: object) -> NoReturn:
        raise NotImplementedError(
            f"{op} does not support torch.func.vmap: it is batched already; "
            "fold the mapped dimension into B, or use impl='reference'"
        )

    return refuse


def refuse_double_backward(op: str) -> Callable[[Callable], Callable]:
    """Decorate the backward of an autograd.Function that has no derivative of its own.

    torch's ``once_differentiable`` lets a second backward pass in silence where the gradient of the
    output is a constant; the second derivative would come out without this op's part.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *douts):
            with torch.no_grad():
                grads = backward(ctx, *douts)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return grads
            inputs = (*douts, *ctx.saved_tensors)
            sources = [x for x in inputs if x is not None and x.requires_grad]
            return tuple(x if x is None else _Undifferentiable.apply(x, op, *sources) for x in grads)

        return once

    return decorate


class _Undifferentiable(torch.autograd.Function):
    """The gradient itself, as a function of its sources that cannot be differentiated."""

    @staticmethod
    def forward(grad, op, *sources):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[1]

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.op} cannot be differentiated twice; use impl='reference'")

    @staticmethod
    def vmap(info, in_dims, grad, op, *sources):
        refuse_vmap(op)(info, in_dims)
