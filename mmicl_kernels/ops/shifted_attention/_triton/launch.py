"""How the kernels are launched: a table per generation of device, and how far a decode is split."""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Generations differ in what a program may use: sm_80 has 163 KiB of shared memory, sm_86, sm_89 and sm_120
# have 99, sm_90 and sm_100 have 227 and copy tiles by descriptor (TMA). The interpreter takes small tiles, so
# that small sizes have many.
INTERPRETER, SM_80, SM_89, SM_90 = 0, 80, 89, 90

DECODE_ROWS = 64  # (query, head) pairs of a key head, up to which the heads of a group share one tile
MAX_SPLITS = 64
MIN_SPLIT_KEYS = 256  # a part of fewer keys costs more to combine than it saves
PROGRAMS_PER_SM = 2  # of a decode: so many fit, by registers and shared memory
COMBINE_WARPS = 4
FAR = 2**29  # beyond every position; sums of two of them fit into int32
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of queries and of keys in a tile, warps of a program, stages of its loads, TMA or pointers."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    TMA: bool = False


INTERPRETED = LaunchConfig(BM=16, BN=32, num_warps=4, num_stages=1)

# By kernel; whether it is general (a mask, a softcap or a second normaliser, which need registers);
# generation; bytes of an element; and BD, the head dim rounded up to a power of two, 64 for less.
CONFIGS: dict[tuple[str, bool, int, int, int], LaunchConfig] = {}


@functools.cache
def generation(device: torch.device) -> int:
    """The row of the table for ``device``."""
    if device.type == "cpu":
        return INTERPRETER
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return SM_89
    return SM_80 if capability < (9, 0) else SM_90


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def block_head_dim(D: int) -> int:
    """Columns of a tile: a power of two of at least 16, which tensor cores need."""
    return max(16, triton.next_power_of_2(D))


def config(kernel: str, is_general: bool, BD: int, q: Tensor) -> LaunchConfig:
    """The launch of ``kernel`` for tensors like ``q``."""
    current = generation(q.device)
    if current == INTERPRETER:
        return INTERPRETED
    return CONFIGS[kernel, is_general, current, q.itemsize, max(BD, 64)]


def forward_kernel(rows: int) -> str:
    """The forward's name in the table, by the rows that share keys."""
    if rows > DECODE_ROWS:
        return "fwd"
    return "decode" if rows <= 16 else "chunk"


def splits(programs: int, S: int, device: torch.device) -> int:
    """Into how many parts the keys are split so that ``programs`` fill the device once."""
    wanted = PROGRAMS_PER_SM * multiprocessors(device) // programs
    return max(1, min(wanted, MAX_SPLITS, S // MIN_SPLIT_KEYS))


def has_descriptor(x: Tensor) -> bool:
    """Whether the copy engine takes ``x``: 16-byte aligned rows, none of them twice."""
    strides = [s * x.itemsize for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)
    return aligned and x.numel() > 0


def descriptor(x: Tensor, rows: int, BD: int) -> TensorDescriptor:
    """Of tiles ``[1, 1, rows, BD]``. A dimension of one element has any stride, so it gets an allowed one."""
    strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape, strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, BD])
