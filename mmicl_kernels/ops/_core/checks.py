"""Readable errors for bad arguments. Every message names the argument, its value and what was expected."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FP32_MAX, FP32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(dict):
    """Letters of the shape legend (B, T, H, ...) bound by the first tensor that shows them."""

    def bind(self, name: str, tensor: Tensor, pattern: str) -> None:
        """Bind each letter of ``pattern`` to the size of ``tensor``, or check it if already bound.

        Raises:
            TypeError: not a tensor. ValueError: the rank or a size differs.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        letters, shape = pattern.split(), tensor.shape
        if len(letters) == len(shape):
            for letter, size in zip(letters, shape, strict=True):
                if self.setdefault(letter, size) != size:
                    break
            else:
                return
        wrong = zip(letters, shape, strict=False)
        bound = ", ".join(f"{x} = {self[x]}" for x, size in wrong if self.get(x, size) != size)
        raise ValueError(
            f"{name} has shape {list(shape)}, expected [{', '.join(letters)}]"
            + (f" with {bound}" if bound else "")
        )


def check_float(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise TypeError unless ``tensor`` is floating point (and of ``dtype`` when one is given)."""
    allowed = FLOAT_DTYPES if dtype is None else (dtype,)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {_names(allowed)}")


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_fits(name: str, value: float) -> None:
    """Raise ValueError if ``value`` is a finite number that fp32, in which kernels have it, does not hold."""
    if FP32_MAX < abs(value) < math.inf:
        raise ValueError(f"{name} is {value!r:.40}, expected a number of fp32, at most {FP32_MAX:.4g}")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is int32 or int64."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.int32 or torch.int64")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on the device of the first."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device} like {first}")


def check_last_stride(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension of ``tensor`` is contiguous."""
    if tensor.numel() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {list(tensor.stride())}, expected a contiguous last dimension")


def overlaps(x: Tensor) -> bool:
    """Whether elements of ``x`` may share memory: rows seen twice, or windows that overlap."""
    steps = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(steps):
        # What the dimensions of smaller steps reach together must stay below a step of this one.
        inner = (s * (n - 1) for j, (s, n) in enumerate(steps) if s < stride or (s == stride and j != i))
        if stride <= sum(inner):
            return True
    return False


def is_readable(values: Tensor) -> bool:
    """Whether a check may read them: a CUDA tensor would synchronise, a traced or fake one has no values."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(values, FakeTensor):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless ``low <= values <= high``, where they can be read."""
    if not is_readable(values) or values.numel() == 0:
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest > high:
        raise ValueError(f"{name} has values from {smallest} to {largest}, expected {low} to {high}")


def is_whole(value: object) -> bool:
    """Whether ``value`` is an int of any kind, NumPy's and a traced one included; a bool is none."""
    return type(value) in (int, torch.SymInt) or (isinstance(value, Integral) and not isinstance(value, bool))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))
