"""Regular files, opened with care and mapped into memory."""

import math
import mmap
import os
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mmicl_kernels.methods import CheckpointError


class Mapped:
    """The first numbers of a file as a tensor of ``shape`` on the CPU; none is read before it is used.

    Writing into the tensor changes this process's copy of it, never the file. ``scattered`` says that what
    is used lies far apart, so that the disk is not asked for the neighbourhood of every page.

    Raises:
        CheckpointError: the file is shorter, missing, or not a regular one.
    """

    @torch.inference_mode(False)
    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, scattered: bool = False
    ) -> None:
        self._path, self._memory, count = path, None, math.prod(shape)
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < count * dtype.itemsize:
                raise CheckpointError(f"{path} has {size} bytes, expected at least {count * dtype.itemsize}")
            if count == 0:  # nothing can be mapped
                self._tensor = torch.empty(shape, dtype=dtype, device="cpu")
                return
            self._memory = mmap.mmap(file.fileno(), count * dtype.itemsize, **_COPY_ON_WRITE)
        if scattered and hasattr(mmap, "MADV_RANDOM"):
            self._memory.madvise(mmap.MADV_RANDOM)
        self._tensor = torch.frombuffer(self._memory, dtype=dtype, count=count).view(shape)

    @property
    def tensor(self) -> Tensor:
        """Raises CheckpointError if the file is shorter by now: to touch what is gone ends the process."""
        if self._memory is not None and self._memory.size() < len(self._memory):
            raise CheckpointError(
                f"{self._path} has {self._memory.size()} bytes, expected at least {len(self._memory)}: "
                "it was shortened while it was open"
            )
        return self._tensor

    def prefetch(self, begin: int, end: int) -> None:
        """Have the disk read ``tensor[begin:end]`` in one piece, without waiting for it."""
        if begin < end and hasattr(mmap, "MADV_WILLNEED"):
            size = len(self._memory) // len(self._tensor)
            start = begin * size // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_WILLNEED, start, end * size - start)


_COPY_ON_WRITE: dict[str, Any] = {"access": mmap.ACCESS_COPY}
if sys.platform == "linux":
    # Without MAP_NORESERVE, which Python has not always had, no bank larger than the memory could be mapped.
    _COPY_ON_WRITE = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)}


def opened(path: Path, mode: str = "rb") -> BinaryIO:
    """Open a regular file. Raises as ``check_regular``."""
    check_regular(path, mode == "rb")
    return open(path, mode)


def check_regular(path: Path, reading: bool = True) -> os.stat_result:
    """What is known of a regular file; for reading also of one behind a link of the hub's cache.

    Raises:
        CheckpointError: there is none. A pipe would block, any other link lead elsewhere.
    """
    try:
        found = path.lstat()
        if reading and stat.S_ISLNK(found.st_mode) and is_hub_link(path):
            found = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist, expected a regular file") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return found


def is_hub_link(path: Path) -> bool:
    """Whether the link ``path`` leads from ``snapshots`` into the ``blobs`` beside, as in the hub's cache."""
    folder, blobs = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent
    return any(x.name == "snapshots" and x.parent / "blobs" == blobs for x in folder.parents)
