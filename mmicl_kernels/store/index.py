"""The index of a VLibrary: a log beside a memory-mapped matrix, both derived from the entries' files.

Every operation is a line of the log, written before the file is touched; a second line says that the file
followed. After a crash the last operation may lack that second line: whether it happened is then asked of
the file. So readers need no lock, and what a crash interrupted either happened or did not.
"""

import json
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmicl_kernels.durable import append, clear_away, flush, is_file, is_folder, sync_folder
from mmicl_kernels.methods import CheckpointError
from mmicl_kernels.store.entry_file import (
    BAD_VALUES,
    MAX_DIMENSION,
    SUFFIX,
    Entry,
    file_name,
    parse_json,
    read_embedding,
    read_entry,
)  # fmt: skip
from mmicl_kernels.store.mapped import Mapped

LOG = "log.jsonl"
FORMAT_VERSION = 2
MAX_LINE_BYTES = 2**18
RETRIES = 3  # a writer may replace log and matrix between a reader's looks at the two
ROWS_AT_ONCE = 2**13  # copied
NUMBERS_AT_ONCE = 2**15 - 1  # scored in fp64: torch divides more among threads, see ``Index.nearest``
CROWD = 2**10  # rows that fp16 cannot tell apart: with more, fp32 looks at them before fp64 does
SPARE_OPERATIONS = 256  # before a log is written anew, beside twice its live rows


@dataclass(frozen=True)
class Row:
    """What the index has of an entry: what is searched, where its vector lies, and what it described."""

    name: str
    method: str
    task: str | None
    tags: tuple[str, ...]
    digest: str
    slot: int | None

    @classmethod
    def of(cls, entry: Entry, digest: str, slot: int | None) -> "Row":
        return cls(entry.name, entry.method, entry.task, entry.tags, digest, slot)

    @property
    def text(self) -> str:
        # Kept by hand: a cached_property has a lock until Python 3.12, which a forked child may find held.
        kept = self.__dict__
        if "_text" not in kept:
            kept["_text"] = "\n".join([self.name, self.task or "", *self.tags]).casefold()
        return kept["_text"]


@dataclass(frozen=True)
class Operation:
    """A line of the log that changes it: ``row`` is put, or without one ``name`` is removed."""

    name: str
    row: Row | None

    def happened(self, entries: Path) -> bool:
        """Whether the file says so."""
        try:
            digest = read_entry(entries / file_name(self.name))[1]
        except FileNotFoundError:
            return self.row is None
        except CheckpointError:
            return False
        return self.row is not None and digest == self.row.digest


class Index:
    """The rows of one library's entries, and their embeddings ``[slots, D]`` fp32, as ``scaled`` has them.

    The vectors lie in a mapped file; the first search by embedding keeps unit vectors in fp16 beside them.

    ``refresh`` reads what was written since. The methods below ``recover`` are for who holds the lock.
    ``damage`` says why the log could not be used; the rows are then those of a scan of all entries.
    ``unreadable`` is the error with which an entry could not be read that is needed to know all rows.
    """

    def __init__(self, folder: Path) -> None:
        self.entries, self.folder, self.temporary = folder / "entries", folder / "index", folder / "tmp"
        self.clear()

    def clear(self) -> None:
        """Know nothing, so that the next ``refresh`` reads all."""
        self.rows: dict[str, Row] = {}
        # "cpu", here and below: a caller may have set another default device.
        self.vectors = torch.empty(0, 0, dtype=torch.float32, device="cpu")
        self._norms = torch.empty(0, dtype=torch.float32, device="cpu")  # of ``vectors``, with room for more
        self._halves = torch.empty(0, 0, dtype=torch.float16, device="cpu")  # ``vectors`` over ``_norms``
        self._rounded = 0
        self.damage: str | None = None
        self.unreadable: OSError | None = None
        self._generation: str | None = None
        self._offset = self._operations = self._slots = 0
        self.dimension: int | None = None
        self._pending: Operation | None = None
        self._sorted: list[Row] | None = None
        self._sorted_embedded: tuple[list[Row], Tensor] | None = None

    @property
    def logged(self) -> bool:
        """Whether there is a log that must follow what is done. Without one, all ask the entries' files."""
        return self._generation is not None

    def refresh(self) -> None:
        """Bring the rows up to date. Raises OSError: an entry that may be one of them could not be read."""
        self.look()
        if self.unreadable is not None:
            raise self.unreadable

    def look(self) -> None:
        """As ``refresh``, without the rows that are not known because of an error, which is kept.

        Scans the entries' files where the log is missing or damaged.
        """
        reason, self.unreadable = "", None
        for _ in range(RETRIES):
            try:
                self._read_log()
                return
            except (CheckpointError, FileNotFoundError, IsADirectoryError) as error:
                reason = str(error)
                self.clear()
        self._scan(reason)

    def sorted_rows(self) -> list[Row]:
        """All rows by name."""
        if self._sorted is None:
            self._sorted = sorted(self.rows.values(), key=lambda row: row.name)
        return self._sorted

    def nearest(self, rows: list[Row], query: Tensor, limit: int) -> list[tuple[float, str]]:
        """``(cosine, name)`` of the best of ``rows``, best first, ties by name.

        fp16 finds who may be among the best, fp32 too where these are many, and fp64 decides. ``query`` is
        a unit vector ``[D]`` fp64.

        On a busy machine every step that torch divides among threads waits until each of them had its turn,
        milliseconds. Of the usual steps for all rows only the product is divided; comparisons would be.
        """
        rows, slots = self._embedded(rows)
        if not rows:
            return []
        limit = min(limit, len(rows))
        chosen = _within(self._scores(query).index_select(0, slots), limit, query.numel())
        if len(chosen) > CROWD:
            lengths = self._norms[: len(self.vectors)]
            scores = (self.vectors.mv(query.float()) / lengths).index_select(0, slots)
            # No cosine is above 2, nor is NaN one: the row is damaged, and nowhere near.
            chosen = _within(scores.where(scores < 2, -torch.inf), limit, query.numel())
        cosines = self._cosines(slots[chosen], query)
        near = cosines >= cosines.topk(limit).values[-1]
        names = (rows[i].name for i in chosen[near].tolist())
        best = zip(cosines[near].tolist(), names, strict=True)
        return sorted(best, key=lambda pair: (-pair[0], pair[1]))[:limit]

    @torch.inference_mode(False)  # what was made in that mode could not be changed outside
    def _scores(self, query: Tensor) -> Tensor:
        """Cosines with all ``vectors``, ``[slots]`` fp16, within ``score_error``: half the bytes to read.

        ``mv``, because ``@`` would follow the caller's autocast to bf16.
        """
        known, count = self._rounded, len(self.vectors)
        if count > len(self._halves):
            known, room = 0, count + count // 4
            self._norms = self.vectors.new_empty(room)
            self._halves = self.vectors.new_empty(room, self.vectors.shape[1], dtype=torch.float16)
        for start in range(known, count, ROWS_AT_ONCE):
            part = slice(start, min(start + ROWS_AT_ONCE, count))
            vectors = self.vectors[part]
            self._norms[part] = vectors.double().norm(dim=-1)
            self._halves[part] = vectors / self._norms[part, None]
            # What is not finite is damage: that it not hide the others.
            self._halves[part].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self._rounded = count
        return self._halves[:count].mv(query.half())

    def _embedded(self, rows: list[Row]) -> tuple[list[Row], Tensor]:
        """Those of ``rows`` that have a vector, and where; kept for all rows, because that takes as long."""
        if rows is self._sorted and self._sorted_embedded is not None:
            return self._sorted_embedded
        embedded = [row for row in rows if row.slot is not None]
        found = embedded, _slots(embedded)
        if rows is self._sorted:
            self._sorted_embedded = found
        return found

    def _cosines(self, slots: Tensor, query: Tensor) -> Tensor:
        """Cosines with the vectors in ``slots``, fp64; -inf with NaN, which only damage can bring about."""
        cosines = []
        for part in slots.split(max(1, NUMBERS_AT_ONCE // query.numel())):
            vectors = self.vectors[part].double()
            cosines.append((vectors * query).sum(-1) / vectors.norm(dim=-1))
        return torch.cat(cosines).nan_to_num(nan=-torch.inf)

    def recover(self) -> None:
        """Clear away what a crash left, and settle what it interrupted. Before every write."""
        clear_away(self.temporary.iterdir())
        self.look()
        if self.damage or self.unreadable or not self.logged:
            self.restore()
        if not self.logged:
            return
        with open(self.folder / LOG, "r+b") as log:
            log.truncate(self._offset)
        if self._pending is not None:
            self.settle(self._pending.happened(self.entries))
            self.refresh()
        if self._operations > 2 * len(self.rows) + SPARE_OPERATIONS:
            self._write_anew(self.sorted_rows())
        self._truncate_matrix()
        keep = {LOG, self._matrix().name}
        clear_away(path for path in self.folder.iterdir() if path.name not in keep)

    def rebuild(self) -> None:
        """Write log and matrix anew from the entries' files. Raises OSError: one could not be read."""
        self._scan("")
        if self.unreadable is not None:
            raise self.unreadable
        self._write_anew(self.sorted_rows())

    def restore(self) -> None:
        """As ``rebuild``; where an entry cannot be read, by who writes at least, there is no log then."""
        self._scan("")
        if self.unreadable is None:
            self._write_anew(self.sorted_rows())
        else:
            self.forget()

    def takes(self, name: str, dimension: int) -> bool:
        """Whether an embedding of ``dimension`` can be put beside the others; if not, only ``name`` has one.

        Raises:
            ValueError: other entries have embeddings of another dimension.
        """
        if self.dimension in (None, dimension):
            return True
        embedded = {row.name for row in self.rows.values() if row.slot is not None}
        if embedded - {name}:
            raise ValueError(f"embedding has dimension {dimension}, the library has {self.dimension}")
        if not embedded and self.logged:
            self._write_anew(self.sorted_rows())
        return not embedded

    def forget(self) -> None:
        """Remove the log. Until ``restore`` makes another, readers and writers ask the entries' files."""
        (self.folder / LOG).unlink(missing_ok=True)
        sync_folder(self.folder)

    def announce_put(self, entry: Entry, digest: str, embedding: Tensor | None) -> None:
        """Write down that the entry's file is about to be put into place."""
        slot = None
        if embedding is not None:
            slot = self._slots
            append(self._matrix(), scaled(embedding).numpy().tobytes())
        append(self.folder / LOG, _line(_put(Row.of(entry, digest, slot), entry.embedding_dim)))

    def announce_remove(self, name: str) -> None:
        """Write down that the entry's file is about to be removed."""
        append(self.folder / LOG, _line({"op": "remove", "name": name}))

    def settle(self, happened: bool = True) -> None:
        """Write down whether the last operation happened. If this is lost, the file tells as much."""
        with open(self.folder / LOG, "ab") as log:
            log.write(_line({"op": "done" if happened else "dropped"}))

    def _matrix(self) -> Path:
        return self.folder / f"vectors-{self._generation}.f32"

    def _truncate_matrix(self) -> None:
        """Cut what was appended for an operation that never reached the log."""
        size = self._slots * (self.dimension or 0) * 4
        if is_file(self._matrix()) and self._matrix().stat().st_size > size:
            os.truncate(self._matrix(), size)

    def _read_log(self) -> None:
        path = self.folder / LOG
        if not is_file(path):
            if not any(_entry_files(self.entries)):
                return self.clear()
            # Opened, a pipe would wait for ever.
            raise CheckpointError(f"{path} does not exist, or is no regular file")
        with open(path, "rb") as log:
            first = log.readline(MAX_LINE_BYTES)
            generation = _generation(first)
            if generation != self._generation:
                self.clear()
                self._generation, self._offset = generation, len(first)
            log.seek(self._offset)
            new = log.read()
        # A line without its end is being written, or a crash ended it.
        end = new.rfind(b"\n") + 1
        for line in new[:end].split(b"\n")[:-1]:
            self._follow(_parsed(line))
        self._offset += end
        try:
            if self._pending is not None and self._pending.happened(self.entries):
                self._apply(self._pending)
        except OSError as error:
            self.unreadable = error
        self._map()

    def _follow(self, data: dict[str, Any]) -> None:
        """One line of the log."""
        try:
            kind = data["op"]
            if kind in ("done", "dropped"):
                if self._pending is None:
                    raise ValueError("it settles nothing")
                if kind == "done":
                    self._apply(self._pending)
                self._pending = None
                return
            if self._pending is not None:
                raise ValueError("the operation before it was not settled")
            operation = Operation(_text(data["name"]), self._row(data) if kind == "put" else None)
            if kind not in ("put", "remove"):
                raise ValueError(f"unknown operation {kind!r:.80}")
        except BAD_VALUES as error:
            raise CheckpointError(f"{self.folder / LOG} has a bad line: {error!r:.200}") from error
        self._operations += 1
        if data.get("settled"):
            self._apply(operation)
        else:
            self._pending = operation

    def _row(self, data: dict[str, Any]) -> Row:
        slot, dimension = data["slot"], data["dimension"]
        if slot is not None:
            if type(slot) is not int or slot != self._slots:
                raise ValueError(f"slot is {slot!r:.80}, expected {self._slots}")
            if type(dimension) is not int or not 1 <= dimension <= MAX_DIMENSION:
                raise ValueError(f"dimension is {dimension!r:.80}, expected a size")
            if dimension != (self.dimension or dimension):
                raise ValueError(f"dimension is {dimension}, expected {self.dimension}")
            self._slots, self.dimension = slot + 1, dimension
        task = data["task"]
        return Row(
            name=_text(data["name"]),
            method=_text(data["method"]),
            task=None if task is None else _text(task),
            tags=tuple(_text(tag) for tag in data["tags"]),
            digest=_text(data["digest"]),
            slot=slot,
        )

    def _apply(self, operation: Operation) -> None:
        if operation.row is None:
            self.rows.pop(operation.name, None)
        else:
            self.rows[operation.name] = operation.row
        self._sorted = self._sorted_embedded = None

    def _map(self) -> None:
        """Map the matrix as far as the log speaks of it. Rows are only ever appended to a mapped file."""
        if self._slots == len(self.vectors):
            return
        self.vectors = Mapped(self._matrix(), (self._slots, self.dimension), torch.float32).tensor

    def _scan(self, reason: str) -> None:
        """Rows and vectors from the entries' files, all in memory. What is no entry is passed by."""
        self.clear()
        self.damage = reason
        vectors = []
        for path in _entry_files(self.entries):
            try:
                entry, digest, embedding = read_embedding(path)
            except (CheckpointError, FileNotFoundError):
                continue  # damaged, which `verify` tells, or removed meanwhile
            except OSError as error:  # of another user, or on a disk that fails: none the less an entry
                self.unreadable = error
                continue
            if path.name != file_name(entry.name):
                continue
            slot = None
            if embedding is not None and self.dimension in (None, entry.embedding_dim):
                slot, self.dimension = len(vectors), entry.embedding_dim
                vectors.append(scaled(embedding))
            self.rows[entry.name] = Row.of(entry, digest, slot)
        if vectors:
            self.vectors, self._slots = torch.stack(vectors), len(vectors)

    def _write_anew(self, rows: list[Row]) -> None:
        """Another generation of log and matrix, holding ``rows`` alone; the log's rename makes it valid."""
        generation, vectors, dimension = uuid.uuid4().hex, self.vectors, self.dimension
        slots = _slots([row for row in rows if row.slot is not None])
        numbers = iter(range(len(slots)))
        lines = [_line({"generation": generation, "format_version": FORMAT_VERSION})]
        for row in rows:
            fresh = Row(row.name, row.method, row.task, row.tags, row.digest,
                        None if row.slot is None else next(numbers))  # fmt: skip
            lines.append(_line({**_put(fresh, dimension), "settled": True}))
        with open(self.folder / f"vectors-{generation}.f32", "wb") as matrix:
            for part in slots.split(ROWS_AT_ONCE):
                matrix.write(vectors[part].numpy().tobytes())
            flush(matrix)
        temporary = self.temporary / uuid.uuid4().hex
        append(temporary, b"".join(lines))
        if is_folder(self.folder / LOG):  # somebody's: nothing takes a folder's place
            (self.folder / LOG).rename(self.temporary / uuid.uuid4().hex)
        temporary.replace(self.folder / LOG)
        sync_folder(self.folder)
        self.refresh()


def unit(embedding: Tensor) -> Tensor:
    """``embedding`` in fp64, with length one."""
    embedding = embedding.double()
    embedding = embedding / embedding.abs().max()  # or the squares of the largest overflow
    return embedding / embedding.norm()


def scaled(embedding: Tensor) -> Tensor:
    """``embedding`` fp32 times the power of two that brings its length to between 1/2 and 1.

    No bit is lost but in elements below 2^-126 of the length, which change no cosine by 2^-126.
    """
    exponent = math.frexp(float(embedding.double().norm()))[1]
    return (embedding.double() * 2.0**-exponent).float()


def score_error(dtype: torch.dtype, dimension: int) -> float:
    """Bound on the error of a cosine of vectors rounded to ``dtype``, summed in fp32.

    Each rounding to ``dtype``, of either vector and of the sum, costs half an eps; another half covers what
    these do to each other. A sum of D products in fp32 costs at most D halves of its eps, in any order. As
    many cover numbers below the normal range of fp16, which are rounded by up to 2^-25 each.
    """
    return 2 * torch.finfo(dtype).eps + (dimension + 2) * torch.finfo(torch.float32).eps


def _slots(rows: list[Row]) -> Tensor:
    return torch.tensor([row.slot for row in rows], dtype=torch.int64, device="cpu")


def _within(scores: Tensor, limit: int, dimension: int) -> Tensor:
    """Where the ``scores`` are that may be among the best ``limit``, for all their errors."""
    found = scores.topk(min(limit + CROWD, len(scores)))
    bound = float(found.values[limit - 1]) - 2 * score_error(scores.dtype, dimension)
    if float(found.values[-1]) >= bound:  # there may be more
        return (scores.float() >= bound).nonzero().view(-1)
    return found.indices[found.values.float() >= bound]


def _entry_files(entries: Path) -> Iterable[Path]:
    if is_folder(entries):
        yield from (path for path in sorted(entries.iterdir()) if path.name.endswith(SUFFIX))


def _put(row: Row, dimension: int | None) -> dict[str, Any]:
    return {"op": "put", "name": row.name, "method": row.method, "task": row.task, "tags": row.tags,
            "digest": row.digest, "slot": row.slot, "dimension": dimension}  # fmt: skip


def _line(data: dict[str, Any]) -> bytes:
    text = json.dumps(data).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES or line[:9] != b"%08x " % zlib.crc32(line[9:]):
        raise CheckpointError(f"the index has a damaged line: {line[:40]!r}")
    data = parse_json(line[9:], "a line of the index")
    if not isinstance(data, dict):
        raise CheckpointError(f"the index has a bad line: {line[:40]!r}")
    return data


def _generation(first: bytes) -> str:
    data = _parsed(first.removesuffix(b"\n")) if first.endswith(b"\n") else {}
    generation = str(data.get("generation"))
    # It is part of a file's name.
    if data.get("format_version") != FORMAT_VERSION or not re.fullmatch("[0-9a-f]{32}", generation):
        raise CheckpointError(f"the index starts with {first[:40]!r}, expected format {FORMAT_VERSION}")
    return generation


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{value!r:.80} is not a printable text")
    return value
