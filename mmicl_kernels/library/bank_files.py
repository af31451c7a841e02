"""The files of a DemonstrationBank: a description that never changes, data that only grow, and an index.

A demonstration is there when its record, of fixed size and with its own checksum, is in the index. Its data
are on the disk before the record is written, so a reader that believes sound records alone needs no lock.
What lies after the last sound record, in any file, is what a killed writer left; the next one cuts it off.
"""

import hashlib
import json
import math
import mmap
import os
import stat
import struct
import sys
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.library.entry_file import BAD_VALUES, MAX_DIMENSION, MAX_HEADER_BYTES, parse_json
from mmicl_kernels.library.index import RETRIES, append, flush, sync_folder
from mmicl_kernels.library.locking import locked
from mmicl_kernels.methods import Backbone, CheckpointError

FORMAT = "mmicl-demonstration-bank-1"
DESCRIPTION, INDEX, LOCK = "bank.json", "index.bin", "lock"
ROWS, SCALES, MEANS, TEXTS = "rows.bin", "scales.bin", "means.bin", "texts.bin"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
RECORD = struct.Struct("<4q32s4I")  # the fields of Record, and the CRC-32 of these bytes
RECORDS_AT_ONCE = 2**16  # read


class FusedTokens(NamedTuple):
    """What ``ops.prefix_splice`` takes as its bank: demonstration d is ``rows[offsets[d]:offsets[d + 1]]``.

    rows: ``[N, C]``, floating, or int8 beside ``scale``. offsets: int64 ``[M + 1]``. scale: fp32 ``[N]``, for
    rows that are ``rows[n] * scale[n]``; None beside floating rows.
    """

    rows: Tensor
    offsets: Tensor
    scale: Tensor | None


class Record(NamedTuple):
    """One demonstration in the index.

    end_row: rows of all demonstrations up to this one. text_end, answer_end: where its text and its answer
    end in ``texts.bin``. call: the first id that the same ``add`` wrote. digest: SHA-256 of its content.
    CRC-32s: of its rows and their scales, of its mean, of its text and answer.
    """

    end_row: int
    text_end: int
    answer_end: int
    call: int
    digest: bytes
    rows_crc: int
    mean_crc: int
    text_crc: int

    def pack(self) -> bytes:
        fields = RECORD.pack(*self, 0)[:-4]
        return fields + zlib.crc32(fields).to_bytes(4, "little")


@dataclass(frozen=True)
class Description:
    """``bank.json``: what a bank is for. ``key`` is random: a bank made anew in the folder has another.

    ``prompt`` says how demonstrations became prompts, in the words of who made the bank.
    """

    key: str
    dtype: torch.dtype
    digest: str
    backbone: Backbone
    prompt: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype is {self.dtype}, expected one of {', '.join(DTYPES)}")
        for name, value, length in (("key", self.key, 32), ("digest", self.digest, 64)):
            if not isinstance(value, str) or len(value) != length or set(value) - set("0123456789abcdef"):
                raise ValueError(f"{name} is {value!r:.80}, expected {length} hexadecimal digits")
        if not isinstance(self.prompt, str):
            raise TypeError(f"prompt is a {type(self.prompt).__name__}, expected a string")
        if self.hidden_size > MAX_DIMENSION:
            raise ValueError(f"hidden_size is {self.hidden_size}, expected at most {MAX_DIMENSION}")

    @property
    def hidden_size(self) -> int:
        return self.backbone.hidden_size

    @property
    def files(self) -> dict[str, tuple[torch.dtype, int]]:
        """The files with numbers of every row or demonstration: their dtype, and how many for each."""
        files = {ROWS: (self.dtype, self.hidden_size), MEANS: (torch.float32, self.hidden_size)}
        return files | ({SCALES: (torch.float32, 1)} if self.dtype == torch.int8 else {})

    @property
    def row_bytes(self) -> int:
        """Of one row, with its scale if it has one."""
        return sum(dtype.itemsize * n for name, (dtype, n) in self.files.items() if name != MEANS)


class Records:
    """The sound records of an index, ``raw``, in order.

    Raises:
        CheckpointError: their bounds decrease.
    """

    @torch.inference_mode(False)  # or autograd could not save ``offsets``
    def __init__(self, raw: bytearray, path: Path) -> None:
        self._raw = raw
        # "cpu", here and below: a caller may have set another default device.
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        words = torch.frombuffer(raw, dtype=torch.int64) if raw else zero[:0]
        words = words.view(-1, RECORD.size // 8)
        self.offsets = torch.cat([zero, words[:, 0]])
        self.text_bounds = torch.cat([zero, words[:, 1:3].flatten()])
        for name, bounds in (("rows", self.offsets), ("texts", self.text_bounds)):
            if bool((bounds[1:] < bounds[:-1]).any()):
                raise CheckpointError(f"{path}: the bounds of {name} decrease")

    def __len__(self) -> int:
        return len(self._raw) // RECORD.size

    def __getitem__(self, number: int) -> Record:
        return Record(*RECORD.unpack_from(self._raw, number * RECORD.size)[:-1])

    def followed_by(self, raw: bytearray, path: Path) -> "Records":
        return Records(self._raw + raw, path)

    @cached_property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def num_text_bytes(self) -> int:
        return int(self.text_bounds[-1])


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


def create_files(folder: Path, description: Description) -> None:
    """Make an empty bank; ``bank.json`` comes last, in one step.

    Raises:
        FileExistsError: there is a bank, or what is left of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        for name in (DESCRIPTION, INDEX):
            path = folder / name
            if path.is_symlink() or (path.exists() and (name == DESCRIPTION or path.stat().st_size > 0)):
                raise FileExistsError(f"{path} is there already, expected a folder without a bank")
        for name in (INDEX, TEXTS, *description.files):
            (folder / name).touch()
        temporary = folder / f"{DESCRIPTION}.tmp"
        temporary.unlink(missing_ok=True)  # of a process killed here
        append(temporary, _described(description))
        temporary.replace(folder / DESCRIPTION)
        sync_folder(folder)
    sync_folder(folder.parent)


def _described(description: Description) -> bytes:
    data = {**asdict(description), "dtype": str(description.dtype).removeprefix("torch.")}
    text = json.dumps(data)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"format": FORMAT, "bank": text, "sha256": digest}, indent=2).encode()


def read_description(folder: Path) -> Description:
    """Raises FileNotFoundError, CheckpointError."""
    path = folder / DESCRIPTION
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"{path} does not exist, expected the folder of a demonstration bank")
    with opened(path) as file:
        data = parse_json(file.read(MAX_HEADER_BYTES), str(path))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of a demonstration bank, expected the format {FORMAT!r}")
    text = data.get("bank")
    if not isinstance(text, str) or data.get("sha256") != (
        hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    ):
        raise CheckpointError(f"{path}: the description is not the one whose checksum the file has")
    fields = parse_json(text, str(path))
    try:
        backbone = Backbone.from_json(fields["backbone"])
        return Description(**{**fields, "backbone": backbone, "dtype": DTYPES[fields["dtype"]]})
    except BAD_VALUES as error:
        raise CheckpointError(f"{path} has a bad description: {error!r:.200}") from error


def read_records(folder: Path, known: Records | None = None) -> Records:
    """The records in the index; only those after ``known`` are read. Raises CheckpointError: damage."""
    path = folder / INDEX
    for attempt in range(RETRIES):
        try:
            raw = _sound_records(path, 0 if known is None else len(known))
            break
        except CheckpointError:  # a writer that cuts off a torn record between two looks makes it seem so
            if attempt + 1 == RETRIES:
                raise
    if known is None:
        return Records(raw, path)
    return known.followed_by(raw, path) if raw else known


def _sound_records(path: Path, start: int) -> bytearray:
    """The records from number ``start`` up to the first that is not sound.

    A call writes its records at once, and power may fail before all are on the disk: that one of them is
    not sound is the end of the index, unless a later call, which came after this one was safe, has some.
    """
    found, end, number = bytearray(), None, start
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < start * RECORD.size:
            raise CheckpointError(f"{path} has {size} bytes, expected the {start} records read before")
        file.seek(start * RECORD.size)
        while part := file.read(RECORDS_AT_ONCE * RECORD.size):
            sound = _are_sound(part)
            if end is None:
                count = sound.index(False) if False in sound else len(sound)
                found += part[: count * RECORD.size]
                end = number + count if count < len(sound) else None
            if end is not None:
                calls = [RECORD.unpack_from(part, i * RECORD.size)[3] for i, x in enumerate(sound) if x]
                if max(calls, default=0) > end:
                    raise CheckpointError(f"{path} is damaged: record {end} is not sound, later ones are")
            number += len(sound)
    return found


def _are_sound(part: bytes) -> list[bool]:
    """Of every whole record in ``part``, whether its checksum is right."""
    whole = memoryview(part)[: len(part) // RECORD.size * RECORD.size]
    sums = whole.cast("I")[RECORD.size // 4 - 1 :: RECORD.size // 4].tolist()
    starts = range(0, len(whole), RECORD.size)
    return [zlib.crc32(whole[i : i + RECORD.size - 4]) == x for i, x in zip(starts, sums, strict=True)]


def write_after(path: Path, size: int, parts: Iterable[Any]) -> None:
    """Write ``parts`` after the first ``size`` bytes of the file, and wait until the disk has them.

    What lay there is a killed writer's. For who holds the lock.
    """
    with opened(path, "r+b") as file:
        found = file.seek(0, os.SEEK_END)
        if found < size:
            raise CheckpointError(f"{path} has {found} bytes, expected at least {size}")
        if found > size:
            file.truncate(size)
            flush(file)  # or what is cut off could be there again, after what follows, when power fails
        file.seek(size)
        for part in parts:
            file.write(part)
        flush(file)


def opened(path: Path, mode: str = "rb") -> BinaryIO:
    """Raises CheckpointError unless it is a regular file: a pipe would block, a link lead elsewhere."""
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist, expected a file of a demonstration bank") from error
    if not regular:
        raise CheckpointError(f"{path} is not a regular file")
    return open(path, mode)
