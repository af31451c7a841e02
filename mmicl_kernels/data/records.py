"""Records: examples of a task, from a file of JSON lines or from whatever has such rows."""

from __future__ import annotations

import operator
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

from mmicl_kernels.data import lines
from mmicl_kernels.data.images import ImageFile, ImageSource, image_bytes, image_path, image_source
from mmicl_kernels.data.lines import BadRecord, parse_line, read_lines

BUCKETS = 256  # what is sorted out at a time when ids are compared is one of so many parts


@dataclass(frozen=True)
class Demonstration:
    """One example of a task, as a bank names it.

    Attributes:
        images: the bytes of the image files, in order; a bank hashes them and does not keep them.
        text: what precedes the answer. answer: what follows. Either may be empty; both are Unicode.
    """

    images: tuple[bytes, ...] = field(repr=False)
    text: str
    answer: str

    def __post_init__(self) -> None:
        if not isinstance(self.images, tuple) or not all(isinstance(x, bytes) for x in self.images):
            raise TypeError(f"images is a {type(self.images).__name__}, expected a tuple of bytes")
        for name in ("text", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} is {value!r:.80}, expected a string")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} is {value!r:.80}, expected Unicode: {error}") from error


@dataclass(frozen=True)
class Record:
    """One example of a task: to be learnt from, shown as a demonstration, or asked.

    Attributes:
        id: a name that no other record of the set has.
        images: in order, each a file's bytes, an :class:`ImageFile`, which is read when asked for, or a
            Pillow image.
        text: what precedes the answer; empty for a caption. If it has ``{image}``, once for each image, they
            stand there; ``{{image}}`` is the text "{image}".
        answer: what is learnt and shown; empty where it is not known.
        answers: all right answers, in the order of the source, for metrics. choices: what to choose from.
        place: where the record was read, ``train.jsonl:17``, for messages.

    Raises:
        BadRecord: a field is not as above. It is a ValueError.
    """

    id: str
    images: tuple[ImageSource, ...] = field(repr=False)
    text: str
    answer: str
    answers: tuple[str, ...] | None = None
    choices: tuple[str, ...] | None = None
    place: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.images, tuple):
            raise BadRecord("bad field", f"images is {self.images!r:.80}, expected a tuple")
        if self.id == "":
            raise BadRecord("bad field", "id is '', expected a name")
        for name in ("id", "text", "answer"):
            _check_text(name, getattr(self, name))
        for name in ("answers", "choices"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, tuple) or not values:
                expected = "expected a list of at least one string, or none"
                raise BadRecord("bad field", f"{name} is {values!r:.80}, {expected}")
            for i, value in enumerate(values):
                _check_text(f"{name}[{i}]", value)
        places = len(text_pieces(self.text)) - 1
        if places not in (0, len(self.images)):
            raise BadRecord(
                "bad field",
                f"text {self.text!r:.80} has {{image}} {places} times, expected never or once for each of "
                f"its {len(self.images)} images",
            )

    def image_bytes(self) -> tuple[bytes, ...]:
        """The bytes of its image files, read now. Raises BadRecord: one cannot be read."""
        try:
            return tuple(map(image_bytes, self.images))
        except BadRecord as error:
            raise error.at(self.place) from error

    def demonstration(self) -> Demonstration:
        """The record with its images read. Raises BadRecord: one cannot be read."""
        return Demonstration(self.image_bytes(), self.text, self.answer)


class Records(Sequence[Record]):
    """The records of a file of JSON lines, each read when it is asked for.

    A line is an object with ``image``, a file's name or a list of them, or ``images``, a list, ``text`` and
    ``answer``, strings; there may be ``id``, a string or an integer, ``answers`` and ``choices``, lists of
    strings. ``null`` is as good as nothing; fields of other names, and blank lines, are passed by. Without an
    id the line's number, from 1, is the record's.

    Opening reads the file once and checks every line. 16 bytes are kept for each record (24 while it opens),
    nothing of its text; images are read by the record's ``demonstration()``. One object may be shared by
    threads, forked and pickled.

    Attributes:
        file, images: as given, absolute. skipped: how many lines were skipped, by reason.

    Args:
        images: the folder of the images, out of which no name may lead; by default the file's own.
        skip_bad: leave out lines that are bad, whose id an earlier one has, or whose images do not exist; of
            good ones this asks for the files' existence, which otherwise is not looked at.

    Raises:
        FileNotFoundError: the file or the folder does not exist. BadRecord: the first bad line, by file,
        number, field, value and what was expected; from an index: the line's image cannot be read.
        ValueError: from an index: the file is another one than when it was opened.
    """

    def __init__(
        self, file: str | os.PathLike, images: str | os.PathLike | None = None, skip_bad: bool = False
    ) -> None:
        self.file = Path(file).absolute()
        self.images = self.file.parent if images is None else Path(images).absolute()
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} does not exist, expected a file of JSON lines")
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images} does not exist, expected the folder of the images")
        self.skipped: Counter[str] = Counter()
        self._offsets, self._numbers = array("Q"), array("Q")
        with open(self.file, "rb") as file:
            self._version = _version(file)
            repeated = self._index(file, skip_bad)
            if repeated:  # so are ids, or, rarely, hashes of different ids: a second pass tells
                file.seek(0)
                self._index(file, skip_bad, repeated)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = _checked(index, len(self))
        with open(self.file, "rb") as file:  # a handle of its own: nothing is shared by threads or processes
            if _version(file) != self._version:
                raise ValueError(f"{self.file} has changed since it was opened, expected it as it was")
            file.seek(self._offsets[i])
            return self._record(self._numbers[i], file.readline(lines.MAX_LINE_BYTES + 1))

    def __repr__(self) -> str:
        return f"Records({str(self.file)!r}, {len(self)} records)"

    def _record(self, number: int, line: bytes) -> Record:
        place = f"{self.file}:{number}"
        try:
            return record_of(parse_line(line), self.images, number, place)
        except BadRecord as error:
            raise error.at(place) from error

    def _index(self, file: BinaryIO, skip_bad: bool, repeated: Set[int] = frozenset()) -> Set[int]:
        """Fill the index, and return the hashes of ids that are there more than once.

        With ``repeated``, which a first call returned, a line whose id an earlier one has is bad.
        """
        self.skipped.clear()
        del self._offsets[:], self._numbers[:]
        hashes = [array("Q") for _ in range(BUCKETS)]
        first: dict[str, int] = {}
        for number, line in read_lines(file):
            try:
                record = self._record(number, line)
                if skip_bad:
                    check_images(record)
                key = hash(record.id) & (2**64 - 1)
                if key in repeated and first.setdefault(record.id, number) != number:
                    detail = f"id is {record.id!r:.80}, which line {first[record.id]} has already"
                    raise BadRecord("duplicate id", detail, record.place)
            except BadRecord as error:
                if not skip_bad:
                    raise
                self.skipped[error.reason] += 1
                continue
            self._offsets.append(file.tell() - len(line))
            self._numbers.append(number)
            hashes[key % BUCKETS].append(key)
        return {x for bucket in hashes for x in _repeated(bucket)}


class _Rows(Sequence[Record]):
    """The records of rows that are made when they are asked for."""

    def __init__(self, rows: Any, images: Path | None) -> None:
        self._rows, self._images = rows, images

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = _checked(index, len(self))
        return _record_of_row(self._rows[i], self._images, i)


def as_records(source: Any, images: str | os.PathLike | None = None) -> Sequence[Record]:
    """The records of ``source``: a path of JSON lines, :class:`Records`, or rows.

    Rows are a ``Sequence``, or what has ``len`` and integer indices as a HuggingFace ``Dataset`` has, of
    records or of dicts with a line's fields. Their images may also be bytes, Pillow images or {"bytes",
    "path"}; names of files are as in :class:`Records` if there are ``images``, else the system's. A row
    without an id has its index, from 0. A list or tuple is checked as a whole, of a Dataset the ids are; else
    a row is looked at when it is asked for.

    Raises:
        TypeError: another source, a row that is no dict, ``images`` with Records, which have theirs.
        FileNotFoundError, BadRecord: as :class:`Records`.
    """
    if isinstance(source, Records):
        if images is not None:
            raise TypeError(f"images is {str(images)!r}, expected None: these records have {source.images}")
        return source
    if isinstance(source, str | os.PathLike):
        return Records(source, images)
    sequence = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not sequence or isinstance(source, Mapping | bytes | bytearray):
        keys = f" of {', '.join(map(repr, source))}" if isinstance(source, Mapping) else ""
        expected = "expected a path, Records, or a sequence of rows"
        raise TypeError(f"source is a {type(source).__name__}{keys}, {expected}")
    folder = None if images is None else Path(images).absolute()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, expected the folder of the images")
    if isinstance(source, list | tuple):
        records = [_record_of_row(row, folder, i) for i, row in enumerate(source)]
        _refuse_repeated(record.id for record in records)
        return records
    if "id" in (getattr(source, "column_names", None) or ()):
        _refuse_repeated(_id(x, i) for i, x in enumerate(source["id"]))
    return _Rows(source, folder)


def record_of(row: Mapping[str, Any], images: Path | None, number: int, place: str = "") -> Record:
    """The record of a line's object, whose id is ``number`` if it has none. Raises BadRecord: it is bad."""
    return Record(
        _id(row.get("id"), number),
        tuple(image_source(x, images) for x in _images(row)),
        _required(row, "text"),
        _required(row, "answer"),
        _listed(row.get("answers")),
        _listed(row.get("choices")),
        place,
    )


def check_images(record: Record) -> None:
    """Raise BadRecord if an image file of the record does not exist."""
    for image in record.images:
        if isinstance(image, ImageFile):
            try:
                image_path(image.folder, image.name)
            except BadRecord as error:
                raise error.at(record.place) from error


def text_pieces(text: str) -> list[str]:
    """What is before, between and after the ``{image}`` of a text, with ``{image}`` for ``{{image}}``."""
    pieces = [""]
    for part in re.split(r"(\{\{image\}\}|\{image\})", text):
        if part == "{image}":
            pieces.append("")
        else:
            pieces[-1] += "{image}" if part == "{{image}}" else part
    return pieces


def _record_of_row(row: Any, images: Path | None, index: int) -> Record:
    if isinstance(row, Record):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"row {index} is a {type(row).__name__}, expected a dict or a Record")
    try:
        return record_of(row, images, index, f"row {index}")
    except BadRecord as error:
        raise error.at(f"row {index}") from error


def _images(row: Mapping[str, Any]) -> list[Any]:
    """What ``image`` or ``images`` has, as a list."""
    given = [(name, row[name]) for name in ("image", "images") if row.get(name) is not None]
    if not given:
        raise BadRecord("missing field", "image and images are missing, expected one; [] for no image")
    if len(given) == 2:
        raise BadRecord("bad field", "image and images are both there, expected one of them")
    name, value = given[0]
    if isinstance(value, list | tuple):
        return list(value)
    if name == "images":
        raise BadRecord("bad field", f"images is {value!r:.80}, expected a list")
    return [value]


def _required(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise BadRecord("missing field", f"{name} is missing, expected a string, which may be empty")
    return value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _id(value: Any, number: int) -> str:
    if value is None:
        return str(number)
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return str(operator.index(value))
    except TypeError:
        raise BadRecord("bad field", f"id is {value!r:.80}, expected a string or an integer") from None


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise BadRecord("bad field", f"{name} is {value!r:.80}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("not Unicode", f"{name} is {value!r:.80}: {error}") from error


def _refuse_repeated(ids: Iterable[str]) -> None:
    first: dict[str, int] = {}
    for i, id in enumerate(ids):
        if first.setdefault(id, i) != i:
            detail = f"id is {id!r:.80}, which row {first[id]} has already"
            raise BadRecord("duplicate id", detail, f"row {i}")


def _repeated(bucket: array) -> list[int]:
    if len(set(bucket)) == len(bucket):
        return []
    return [x for x, count in Counter(bucket).items() if count > 1]


def _checked(index: int, length: int) -> int:
    try:
        return range(length)[index]
    except IndexError:
        raise IndexError(f"index is {index}, expected {-length} to {length - 1}") from None


def _version(file: BinaryIO) -> tuple[int, int]:
    """What changes when another file takes the place of this one, or it is written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
