"""The files of a DemonstrationBank: a description that never changes, data that only grow, and an index.

A demonstration is there when its record, of fixed size and with its own checksum, is in the index. Its data
are on the disk before the record is written, so a reader that believes sound records alone needs no lock.
What lies after the last sound record, in any file, is what a killed writer left; the next one cuts it off.
"""

import hashlib
import json
import os
import stat
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.durable import append, clear_away, flush, locked, sync_folder
from mmicl_kernels.methods import Backbone, CheckpointError
from mmicl_kernels.store.entry_file import BAD_VALUES, MAX_DIMENSION, MAX_HEADER_BYTES, parse_json
from mmicl_kernels.store.mapped import opened

FORMAT = "mmicl-demonstration-bank-1"
DESCRIPTION, INDEX, LOCK = "bank.json", "index.bin", "lock"
ROWS, SCALES, MEANS, TEXTS = "rows.bin", "scales.bin", "means.bin", "texts.bin"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
RECORD = struct.Struct("<4q32s4I")  # the fields of Record, and the CRC-32 of these bytes
RETRIES = 3  # of a look that a writer may have come between
RECORDS_AT_ONCE = 2**16  # read
RECORDS_OF_A_PAGE = 2**10  # in memory
MAX_EXPECTED = 2**24  # records that room is made for because a file is so long


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


class Records:
    """The first ``count`` records of an index, in order. ``offsets``: int64 ``[count + 1]``, see FusedTokens.

    Successors share their memory and write behind them. So to follow costs what is new, whatever is there;
    but ``offsets`` move to twice the room when there is none.
    """

    @torch.inference_mode(False)  # or autograd could not save ``offsets``
    def __init__(self, count: int, pages: list[bytearray], room: Tensor) -> None:
        self._count, self._pages, self._room = count, pages, room
        self.offsets = room[: count + 1]

    @classmethod
    @torch.inference_mode(False)
    def none(cls, expected: int) -> "Records":
        """No records yet, and room for twice as many as are ``expected``."""
        room = 2 * min(expected, MAX_EXPECTED) + RECORDS_OF_A_PAGE
        # "cpu", here and below: a caller may have set another default device.
        offsets = torch.empty(room, dtype=torch.int64, device="cpu")
        offsets[0] = 0
        return cls(0, [], offsets)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Record:
        page, place = divmod(number, RECORDS_OF_A_PAGE)
        return Record(*RECORD.unpack_from(self._pages[page], place * RECORD.size)[:-1])

    @torch.inference_mode(False)
    def followed_by(self, raw: bytearray, path: Path) -> "Records":
        """These and the sound records ``raw``, of which there is one at least.

        Raises:
            CheckpointError: their bounds decrease.
        """
        words = torch.frombuffer(raw, dtype=torch.int64).view(-1, RECORD.size // 8)
        ends, count = words[:, 0], self._count + len(words)
        for name, last, bounds in (
            ("rows", self.num_rows, ends),
            ("texts", self.num_text_bytes, words[:, 1:3].flatten()),
        ):
            if int(bounds[0]) < last or bool((bounds[1:] < bounds[:-1]).any()):
                raise CheckpointError(f"{path}: the bounds of {name} decrease")
        self._write_behind(raw)
        room = self._room
        if count >= len(room):
            more = torch.empty(2 * count - self._count, dtype=torch.int64, device="cpu")
            room = torch.cat([self.offsets, more])
        # Not by torch, or autograd would take offsets that it has saved for changed.
        room.numpy()[self._count + 1 : count + 1] = ends.numpy()
        return Records(count, self._pages, room)

    def _write_behind(self, raw: bytearray) -> None:
        rest, number = memoryview(raw), self._count
        while rest:
            page, place = divmod(number, RECORDS_OF_A_PAGE)
            if page == len(self._pages):
                self._pages.append(bytearray(RECORDS_OF_A_PAGE * RECORD.size))
            part = rest[: (RECORDS_OF_A_PAGE - place) * RECORD.size]
            begin = place * RECORD.size
            self._pages[page][begin : begin + len(part)] = part
            rest, number = rest[len(part) :], number + len(part) // RECORD.size

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_text_bytes(self) -> int:
        return self[self._count - 1].answer_end if self._count else 0

    def keys(self) -> Tensor:
        """The first 8 bytes of every digest, as ``key_of`` has them, int64 ``[count]``."""
        pages = [torch.frombuffer(x, dtype=torch.int64).view(-1, RECORD.size // 8)[:, 4] for x in self._pages]
        return torch.cat([self.offsets[:0], *pages])[: self._count]


class Contents:
    """Which demonstration has which content: a sorted table of the records that were there at first, a
    dictionary of those that came later. A dictionary of a million takes ten times the memory and the time.
    """

    def __init__(self, records: Records) -> None:
        self._count = len(records)
        self._keys, self._ids = records.keys().sort(stable=True)
        self._later: dict[bytes, int] = {}

    def follow(self, records: Records) -> None:
        """Know all of ``records``, the successors of those that are known."""
        for id in range(self._count, len(records)):
            self._later.setdefault(records[id].digest, id)
        self._count = len(records)

    def find(self, digest: bytes, records: Records) -> int | None:
        """The first id of this content."""
        key = int.from_bytes(digest[:8], "little", signed=True)
        for place in range(int(torch.searchsorted(self._keys, key)), len(self._keys)):
            if int(self._keys[place]) != key:
                break
            id = int(self._ids[place])
            if records[id].digest == digest:
                return id
        return self._later.get(digest)


@contextmanager
def created(folder: Path, description: Description) -> Iterator[None]:
    """An empty bank, whose ``bank.json`` comes last, in one step, and goes again if it or the block fails.

    Raises:
        FileExistsError: there is a bank, or what is left of one. ValueError: a description that could not be
        read back.
    """
    data = _described(description)
    _parsed(data, "description")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        for path in (folder / DESCRIPTION, folder / INDEX):
            if _is_taken(path):
                raise FileExistsError(f"{path} is there already, expected a folder without a bank")
        for name in (INDEX, TEXTS, *description.files):
            (folder / name).touch()
        clear_away(folder.glob(f"{DESCRIPTION}.*"))  # of a process killed here
        temporary = folder / f"{DESCRIPTION}.{uuid.uuid4().hex}"
        try:
            append(temporary, data)
            temporary.replace(folder / DESCRIPTION)
            sync_folder(folder)
            sync_folder(folder.parent)
            yield
        except BaseException:
            clear_away([folder / DESCRIPTION, temporary])
            raise


def _is_taken(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return path.name == DESCRIPTION or not stat.S_ISREG(found.st_mode) or found.st_size > 0


def _described(description: Description) -> bytes:
    data = {**asdict(description), "dtype": str(description.dtype).removeprefix("torch.")}
    text = json.dumps(data)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"format": FORMAT, "bank": text, "sha256": digest}, indent=2).encode()


def read_description(folder: Path) -> Description:
    """Raises FileNotFoundError, CheckpointError."""
    path = folder / DESCRIPTION
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{path} does not exist, expected the folder of a demonstration bank"
        raise FileNotFoundError(message) from error
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size  # to ask for more would take as much memory for a moment
        return _parsed(file.read(min(size, MAX_HEADER_BYTES)), str(path))


def _parsed(data: bytes, source: str) -> Description:
    """Raises CheckpointError."""
    if len(data) >= MAX_HEADER_BYTES:
        raise CheckpointError(f"{source} has {len(data)} bytes or more, expected less")
    outer = parse_json(data, source)
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        raise CheckpointError(f"{source} is not of a demonstration bank, expected the format {FORMAT!r}")
    text = outer.get("bank")
    if not isinstance(text, str) or outer.get("sha256") != (
        hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    ):
        raise CheckpointError(f"{source}: the description is not the one whose checksum the file has")
    fields = parse_json(text, source)
    try:
        backbone = Backbone.from_json(fields["backbone"])
        return Description(**{**fields, "backbone": backbone, "dtype": DTYPES[fields["dtype"]]})
    except BAD_VALUES as error:
        raise CheckpointError(f"{source} has a bad description: {error!r:.200}") from error


def read_records(folder: Path, known: Records | None = None) -> Records:
    """The records in the index; only those after ``known`` are read. Raises CheckpointError: damage."""
    for attempt in range(RETRIES):
        try:
            return _sound_records(folder / INDEX, known)
        except CheckpointError:  # a writer that cuts off a torn record between two looks makes it seem so
            if attempt + 1 == RETRIES:
                raise
    raise AssertionError("not reached")


def _sound_records(path: Path, known: Records | None) -> Records:
    """``known`` and the records after it, up to the first that is not sound.

    A call writes its records at once, and power may fail before all are on the disk: that one of them is
    not sound is the end of the index, unless a later call, which came after this one was safe, has some.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        records = Records.none(size // RECORD.size) if known is None else known
        start = number = len(records)
        if size < start * RECORD.size:
            raise CheckpointError(f"{path} has {size} bytes, expected the {start} records read before")
        end = None
        file.seek(start * RECORD.size)
        while part := file.read(min(RECORDS_AT_ONCE * RECORD.size, size - file.tell())):
            sound = _are_sound(part)
            if end is None:
                count = sound.index(False) if False in sound else len(sound)
                if count:
                    records = records.followed_by(bytearray(part[: count * RECORD.size]), path)
                end = number + count if count < len(sound) else None
            if end is not None:
                calls = [RECORD.unpack_from(part, i * RECORD.size)[3] for i, x in enumerate(sound) if x]
                if max(calls, default=0) > end:
                    raise CheckpointError(f"{path} is damaged: record {end} is not sound, later ones are")
            number += len(sound)
    return records


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
