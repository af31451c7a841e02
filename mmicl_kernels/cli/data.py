"""`mmicl data`: the official files of data sets as records."""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from mmicl_kernels.cli.printing import complain, printable
from mmicl_kernels.cli.shell import reported
from mmicl_kernels.data import BadRecord, record_of
from mmicl_kernels.data.formats import FORMATS, Row, convert, official_files
from mmicl_kernels.data.records import check_images


def add_parser(commands: Any) -> None:
    """Add `data` and its formats to the subparsers of `mmicl`."""
    parser = commands.add_parser("data", help="convert the official files of a data set to records")
    formats = parser.add_subparsers(dest="format", required=True)
    for name, format in FORMATS.items():
        added = formats.add_parser(name, help=format.about, description=_description(format.splits))
        added.add_argument("source", help="the folder of the official files")
        added.add_argument("--split", required=True, choices=tuple(format.splits), help="which part of it")
        added.add_argument(
            "--out", required=True, metavar="FILE", help="JSON lines, replaced when all is well"
        )
        added.add_argument(
            "--images", metavar="FOLDER", help="what has the images' folders (default: source)"
        )
        added.add_argument("--skip-bad", action="store_true", help="leave out bad records, and count them")


def run(options: argparse.Namespace) -> int:
    """Convert and return the exit code; an error is one line on stderr."""
    return reported("mmicl data", lambda: _convert(options), (OSError, ValueError))


def _description(splits: dict[str, tuple[str, ...]]) -> str:
    return "Reads " + "; ".join(f"{split}: {', '.join(files)}" for split, files in splits.items())


def _convert(options: argparse.Namespace) -> int:
    from mmicl_kernels.durable import replacing

    source, out = Path(options.source), Path(options.out)
    images = source if options.images is None else Path(options.images)
    for name, folder in (("source", source), ("--images", images), ("--out", out.parent)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: {folder} is no folder, expected one")
    files = official_files(options.format, source, options.split)
    _refuse_to_replace(out, options.format, source)
    folder, prefix = _relative(images, out.parent)
    rows = list(convert(options.format, files, options.split))
    with replacing(out) as (temporary,), temporary.open("w", encoding="utf-8", newline="\n") as file:
        written, skipped = _write(file, rows, folder, prefix, options.skip_bad)
        if not written:
            reasons = _listed(skipped) or f"none of {len(rows)}"
            raise ValueError(f"{', '.join(map(str, files))}: no record of {options.split!r}: {reasons}")
    reasons = f": {_listed(skipped)}" if skipped else ""
    print(printable(f"{written} records in {out}, {skipped.total()} skipped{reasons}"))
    if not folder.samefile(out.parent):
        print(printable(f"names of images are relative to {folder}: give it as --images with this file"))
    return 0


def _refuse_to_replace(out: Path, format: str, source: Path) -> None:
    """Raise ValueError: the output would take the place of an official file, or of what is no file."""
    if not out.exists():
        return
    names = [Path(name) for files in FORMATS[format].splits.values() for name in files]
    official = [path for name in names for path in (source / name, source / name.name) if path.exists()]
    if not out.is_file() or any(out.samefile(path) for path in official):
        what = "an official file" if out.is_file() else "no regular file"
        raise ValueError(f"--out is {out}, {what}, expected a file that may be replaced, or none")


def _relative(images: Path, beside: Path) -> tuple[Path, str]:
    """What names of images are relative to, and what is before them: the output's folder, if the images are
    in it, because nobody reads one outside of that; else the images' own.
    """
    within, root = os.path.realpath(images), os.path.realpath(beside)
    if within == root or within.startswith(os.path.join(root, "")):
        return beside, os.path.relpath(within, root)
    return images, "."


def _listed(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items())


def _write(
    file: TextIO, rows: list[tuple[str, Row | BadRecord]], folder: Path, prefix: str, skip_bad: bool
) -> tuple[int, Counter[str]]:
    """How many were written, and skipped by reason; the first of each reason is named on stderr.

    Raises:
        BadRecord: the first bad one, unless ``skip_bad``.
    """
    from tqdm import tqdm

    written, skipped, ids = 0, Counter(), set()
    with tqdm(rows, desc="converting", unit=" records", disable=sys.stderr is None) as bar:
        for place, row in bar:
            try:
                file.write(_line(row, folder, prefix, ids))
                written += 1
            except BadRecord as error:
                if not skip_bad:
                    raise error.at(place) from error
                skipped[error.reason] += 1
                if skipped[error.reason] == 1:
                    with bar.external_write_mode(file=sys.stderr):
                        complain("mmicl data", f"skipped: {error.at(place)}")
    return written, skipped


def _line(row: Row | BadRecord, folder: Path, prefix: str, ids: set[str]) -> str:
    """A row as a line that whoever reads the file accepts. Raises BadRecord: it would be refused."""
    if isinstance(row, BadRecord):
        raise row
    row = {**row, "image": os.path.normpath(os.path.join(prefix, row["image"])).replace(os.sep, "/")}
    try:
        check_images(record_of(row, folder, 0))
        if row["id"] in ids:
            raise BadRecord("duplicate id", "an earlier record has it already")
    except BadRecord as error:
        raise error.at(f"id {row['id']:.80}") from error
    ids.add(row["id"])
    return json.dumps(row, ensure_ascii=False) + "\n"
