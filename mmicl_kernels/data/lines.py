"""Files of JSON lines: one line is in memory at a time, and a bad one has a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_LINE_BYTES = 2**24  # a line is held in memory; those of MMC4 have some kilobytes


class BadRecord(ValueError):
    """Why a record, or an image of it, is not used.

    Attributes:
        reason: a few words, what is counted. detail: the field, its value and what was expected.
        place: where it stands, ``train.jsonl:17``, if known.
    """

    def __init__(self, reason: str, detail: str = "", place: str = "") -> None:
        super().__init__(reason, detail, place)  # so that it may be pickled
        self.reason, self.detail, self.place = reason, detail, place

    def __str__(self) -> str:
        return ": ".join(x for x in (self.place, self.reason, self.detail) if x)

    def at(self, place: str) -> BadRecord:
        """The same, found at ``place``; a place that it has already is within that."""
        return BadRecord(self.reason, self.detail, ": ".join(x for x in (place, self.place) if x))


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of each line that is not blank; too long a one is cut off."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            pass
        if line.strip():
            yield number, line


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadRecord: it is none, or too long."""
    if len(line) > MAX_LINE_BYTES:
        raise BadRecord("line too long", f"expected at most {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecord("bad JSON", f"it is a {type(record).__name__}, expected an object")
    return record
