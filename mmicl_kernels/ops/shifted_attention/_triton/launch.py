"""How kernels are launched: by a table per generation of device; how a decode is split; what they take."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmicl_kernels.ops._core._triton_keys import id_strides
from mmicl_kernels.ops._core.checks import overlaps
from mmicl_kernels.ops._core.virtual_keys import is_one_key
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys
from mmicl_kernels.ops.shifted_attention.options import SMALLEST_SCALE, Options

# Generations differ in what a program may use: sm_80 has 163 KiB of shared memory, sm_86, sm_89 and sm_120
# have 99, sm_90 and sm_100 have 227 and copy tiles by descriptor (TMA). The interpreter takes small tiles, so
# that small sizes have many.
INTERPRETER, SM_80, SM_89, SM_90 = 0, 80, 89, 90

DECODE_ROWS = 64  # (query, head) pairs of a key head, up to which the heads of a group share one tile
MAX_SPLITS = 64
MIN_SPLIT_KEYS = 256  # a part of fewer keys costs more to combine than it saves
PROGRAMS_PER_SM = 2  # of a decode: so many fit, by registers and shared memory
COMBINE_WARPS = 4
MAX_REGISTERS = 255  # without it ptxas may spill rather than lower an occupancy it has chosen


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of queries and of keys in a tile, warps of a program, stages of its loads, TMA or pointers."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    TMA: bool = False


INTERPRETED = LaunchConfig(BM=16, BN=32, num_warps=4, num_stages=1)

# Kernel; whether it is general (a mask, softcap, second normaliser, or keys that end before the tensor does:
# they need registers); bytes of an element; BD, the head dim rounded up to a power of two, 64 for less; the
# launch on sm_80, sm_89 and sm_90. Chosen so that none spills (tests/ops/registers.json); sm_90 is the one
# whose speed was thought about.
_ROWS = (
    ("fwd", False, 2, 64, (128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3, True)),
    ("fwd", False, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), (128, 128, 8, 2, True)),
    ("fwd", False, 2, 256, (64, 32, 8, 1), (64, 32, 8, 1), (64, 64, 8, 2, True)),
    ("fwd", False, 4, 64, (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("fwd", False, 4, 128, (32, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    ("fwd", False, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("fwd", True, 2, 64, (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3, True)),
    ("fwd", True, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 3, True)),
    ("fwd", True, 2, 256, (32, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 1, True)),
    ("fwd", True, 4, 64, (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("fwd", True, 4, 128, (32, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    ("fwd", True, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("decode", False, 2, 64, (16, 128, 4, 4), (16, 128, 4, 3), (16, 128, 4, 4)),
    ("decode", False, 2, 128, (16, 64, 4, 4), (16, 64, 4, 3), (16, 64, 4, 4)),
    ("decode", False, 2, 256, (16, 64, 4, 3), (16, 64, 4, 2), (16, 64, 4, 3)),
    ("decode", False, 4, 64, (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
    ("decode", False, 4, 128, (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    ("decode", False, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("decode", True, 2, 64, (16, 64, 4, 3), (16, 64, 4, 3), (16, 128, 4, 4)),
    ("decode", True, 2, 128, (16, 64, 4, 4), (16, 64, 4, 3), (16, 64, 4, 4)),
    ("decode", True, 2, 256, (16, 32, 4, 3), (16, 32, 4, 3), (16, 32, 4, 3)),
    ("decode", True, 4, 64, (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    ("decode", True, 4, 128, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("decode", True, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("chunk", False, 2, 64, (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 4)),
    ("chunk", False, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3)),
    ("chunk", False, 2, 256, (64, 32, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
    ("chunk", False, 4, 64, (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("chunk", False, 4, 128, (32, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    ("chunk", False, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("chunk", True, 2, 64, (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 4)),
    ("chunk", True, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    ("chunk", True, 2, 256, (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("chunk", True, 4, 64, (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("chunk", True, 4, 128, (32, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    ("chunk", True, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dq", False, 2, 64, (128, 64, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2, True)),
    ("dq", False, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), (128, 128, 8, 2, True)),
    ("dq", False, 2, 256, (32, 32, 8, 2), (32, 32, 8, 2), (64, 64, 8, 2, True)),
    ("dq", False, 4, 64, (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("dq", False, 4, 128, (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("dq", False, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dq", True, 2, 64, (64, 32, 8, 2), (64, 32, 8, 2), (128, 64, 8, 3, True)),
    ("dq", True, 2, 128, (64, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2, True)),
    ("dq", True, 2, 256, (64, 32, 8, 2), (32, 32, 8, 2), (64, 16, 8, 2)),
    ("dq", True, 4, 64, (32, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    ("dq", True, 4, 128, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dq", True, 4, 256, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dkdv", False, 2, 64, (32, 32, 4, 1), (32, 32, 4, 1), (128, 64, 8, 2, True)),
    ("dkdv", False, 2, 128, (32, 64, 8, 2), (32, 64, 8, 2), (128, 64, 8, 2, True)),
    ("dkdv", False, 2, 256, (32, 64, 8, 1), (32, 32, 8, 1), (32, 64, 8, 1, True)),
    ("dkdv", False, 4, 64, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dkdv", False, 4, 128, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dkdv", False, 4, 256, (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    ("dkdv", True, 2, 64, (32, 32, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2, True)),
    ("dkdv", True, 2, 128, (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2, True)),
    ("dkdv", True, 2, 256, (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1, True)),
    ("dkdv", True, 4, 64, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dkdv", True, 4, 128, (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("dkdv", True, 4, 256, (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
)
CONFIGS = {
    (kernel, is_general, generation, itemsize, BD): LaunchConfig(*launch)
    for kernel, is_general, itemsize, BD, *launches in _ROWS
    for generation, launch in zip((SM_80, SM_89, SM_90), launches, strict=True)
}


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


def config(kernel: str, is_general: bool, BD: int, *operands: Tensor) -> LaunchConfig:
    """The launch of ``kernel``, which loads tiles of ``operands``; no TMA where one has no descriptor."""
    x = operands[0]
    current = generation(x.device)
    if current == INTERPRETER:
        return INTERPRETED
    row = CONFIGS[kernel, is_general, current, x.itemsize, max(BD, 64)]
    if row.TMA and not all(map(has_descriptor, operands)):
        row = CONFIGS[kernel, is_general, SM_80, x.itemsize, max(BD, 64)]
    return row


def options(config: LaunchConfig) -> dict[str, int]:
    """What Triton's launcher takes beside a kernel's arguments."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}


def combine_options(keys: int) -> dict[str, int]:
    """The same of the combine."""
    return {"num_warps": COMBINE_WARPS} | ({"maxnreg": MAX_REGISTERS} if keys else {})


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
    """Whether the copy engine takes ``x``: 16-byte aligned rows that share no memory."""
    strides = [s * x.itemsize for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in strides)
    return aligned and x.numel() > 0 and not overlaps(x)


def descriptor(x: Tensor, rows: int, BD: int) -> TensorDescriptor:
    """Of tiles ``[1, 1, rows, BD]``. A dimension of one element has any stride, so it gets an allowed one."""
    strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape, strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, BD])


class Problem(NamedTuple):
    """Sizes and visibility of one call, as all kernels take them.

    B sequences of up to T queries and S keys, in storages of N and N_K rows; they differ where packed.
    """

    B: int
    H: int
    G: int
    T: int
    S: int
    N: int
    N_K: int
    D: int
    causal: bool
    window: int | None
    q_start: int | None
    mask: Tensor | None
    mask_strides: tuple[int, ...]
    fold: bool
    is_general: bool
    precision: str

    @staticmethod
    def of(q: Tensor, k: Tensor, options: Options) -> "Problem":
        (B, H, N, D), (G, N_K) = q.shape, k.shape[1:3]
        T, S = N, N_K
        if options.cu_seqlens_q is not None:
            B, T, S = options.cu_seqlens_q.numel() - 1, options.max_seqlen_q, options.max_seqlen_k
        visibility = options.visibility
        if options.cu_seqlens_q is None:
            visibility = visibility.simplified(T, S)
        q_start = visibility.q_start
        mask, strides = options.mask, (0, 0, 0, 0)
        if mask is not None:
            strides = mask.expand(q.shape[0], H, N, N_K).stride()
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        is_bounded = options.cu_seqlens_q is not None or options.kv_end is not None
        is_special = mask is not None or options.softcap is not None or options.all_keys
        exact = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        return Problem(
            *(B, H, G, T, S, N, N_K, D),
            causal=visibility.causal,
            window=visibility.window,
            q_start=q_start if isinstance(q_start, int) else None,
            mask=mask,
            mask_strides=strides,
            fold=options.scale > SMALLEST_SCALE and options.softcap is None and not options.is_mask_added,
            is_general=is_bounded or is_special,
            precision="ieee" if exact else "tf32",
        )


def visibility(problem: Problem, options: Options) -> tuple[Tensor | None, ...]:
    """The tensors of what queries see, in the kernels' order."""
    bounds = (options.q_starts, options.kv_start, options.kv_end)
    bounds = (None if x is None else x.contiguous() for x in bounds)
    return *bounds, problem.mask, options.cu_seqlens_q, options.cu_seqlens_k


def tiles(config: LaunchConfig, BD: int, *operands: tuple[Tensor, int]) -> tuple[list, bool]:
    """The tensors, or descriptors of their tiles ``[rows, BD]`` where the config and all strides allow it."""
    if not (config.TMA and all(has_descriptor(x) for x, _ in operands)):
        return [x for x, _ in operands], False
    return [descriptor(x, rows, BD) for x, rows in operands], True


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of B, heads and rows; that of D is 1."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def key_strides(H: int, keys: VirtualKeys) -> tuple[int | None, ...]:
    """Of ids over batch rows and queries, and of ``prefix``; None for one key of each of H heads, whose
    kernels so have no such arguments."""
    if is_one_key(H, keys.weight, keys.adapter_ids, keys.prefix):
        return None, None, None
    return *id_strides(keys.adapter_ids), 0 if keys.prefix is None else keys.prefix.stride(0)


def or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None or x.numel() == 0 else x
