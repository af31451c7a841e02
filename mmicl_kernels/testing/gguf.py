"""GGUF files: their metadata, and their tensors in fp32. The ``gguf`` package takes seconds for the former.

The format is llama.cpp's (``docs/gguf.md`` of ggml); of its kinds of tensors these are read: F32, F16, Q4_1
and Q8_0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Kinds of values, of numbers as ``struct`` has them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# What a tensor is made of: for Q4_1 and Q8_0 blocks of 32 weights, of which each has a scale.
BLOCKS = {
    0: np.dtype([("weights", "<f4", 1)]),
    1: np.dtype([("weights", "<f2", 1)]),
    3: np.dtype([("scale", "<f2"), ("least", "<f2"), ("pairs", "u1", 16)]),
    8: np.dtype([("scale", "<f2"), ("weights", "i1", 32)]),
}
Q4_1 = 3
VERSIONS = (2, 3)


def read_metadata(path: Path) -> dict[str, Any]:
    """Raises ValueError: ``path`` is no GGUF file."""
    with path.open("rb") as file:
        return _header(file, path)[0]


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors, fp32, with the dimensions in PyTorch's order.

    Raises ValueError: ``path`` is no GGUF file, or has a tensor of another kind.
    """
    with path.open("rb") as file:
        fields, described = _header(file, path)
        alignment = fields.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
        for name, shape, kind, offset in described:
            if kind not in BLOCKS:
                raise ValueError(f"{path}: {name} is of kind {kind}, expected one of {sorted(BLOCKS)}")
            block = BLOCKS[kind]
            size = int(np.prod(shape)) // (32 if "scale" in block.names else 1)
            file.seek(start + offset)
            blocks = np.fromfile(file, block, size)
            if len(blocks) < size:
                raise ValueError(f"{path} ends within the tensor {name}")
            yield name, _weights(blocks, kind).reshape(shape)


def _weights(blocks: np.ndarray, kind: int) -> np.ndarray:
    if kind == Q4_1:  # the low halves of the bytes are the first 16 weights
        pairs = blocks["pairs"]
        whole = np.concatenate([pairs & 15, pairs >> 4], 1).astype(np.float32)
        return whole * blocks["scale"][:, None].astype(np.float32) + blocks["least"][:, None].astype(
            np.float32
        )
    weights = blocks["weights"].astype(np.float32)
    return weights * blocks["scale"][:, None].astype(np.float32) if "scale" in blocks.dtype.names else weights


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[tuple]]:
    """The metadata, and what describes each tensor."""
    if (found := file.read(4)) != b"GGUF":
        raise ValueError(f"{path} begins with {found!r}, expected b'GGUF'")
    try:
        version, tensors, fields = _number(file, "I"), _number(file, "Q"), _number(file, "Q")
        if version not in VERSIONS:
            raise ValueError(f"{path} is of version {version}, expected one of {VERSIONS}")
        metadata = {_text(file): _value(file, _number(file, "I")) for _ in range(fields)}
        return metadata, [_tensor(file) for _ in range(tensors)]
    except struct.error as error:
        raise ValueError(f"{path} ends within its metadata") from error


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """Its name, shape, kind, and where it begins."""
    name = _text(file)
    shape = [_number(file, "Q") for _ in range(_number(file, "I"))]
    return name, tuple(reversed(shape)), _number(file, "I"), _number(file, "Q")


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    if kind == ARRAY:
        kind, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, kind) for _ in range(count)]
    return _number(file, NUMBERS[kind])
