"""`mmicl library`: look into a folder of stored adapters, and change it."""

import argparse
import json
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmicl_kernels.cli.printing import FAILED, USAGE, backbone_name, complain, print_table, printable

if TYPE_CHECKING:  # torch is imported when a command runs
    from mmicl_kernels.store import Entry, VLibrary

VARIABLE = "MMICL_LIBRARY"
MAX_RECORD_BYTES = 2**20
COLUMNS = ("name", "method", "task", "tags", "metrics", "backbone", "created")


def add_parser(commands: Any) -> None:
    """Add `library` and its commands to the subparsers of `mmicl`."""
    parser = commands.add_parser("library", help="list, search and change a library of adapters (VLibrary)")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--library", metavar="FOLDER", help=f"the library (default: ${VARIABLE})")
    common.add_argument("--json", action="store_true", help="print JSON, for scripts")
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=help, parents=[common])

    action("list", "all entries")
    action("show", "all about one entry").add_argument("name")

    add = action("add", "store the adapter of a folder that save_pretrained wrote")
    add.add_argument("name")
    add.add_argument("folder")
    _add_labels(add)
    add.add_argument("--metric", action="append", default=[], metavar="LABEL=NUMBER", help="repeatable")
    add.add_argument("--record", metavar="FILE", help="JSON of the training")
    add.add_argument("--embedding", metavar="FILE", help="JSON list of numbers, for `search --like`")

    action("remove", "remove entries").add_argument("names", nargs="+", metavar="name")

    search = action("search", "entries that meet every condition")
    search.add_argument("text", nargs="?", help="words that occur in name, task or tags")
    search.add_argument("--tag", action="append", default=[], help="repeatable: all of them")
    search.add_argument("--task")
    search.add_argument("--method")
    search.add_argument("--like", metavar="NAME", help="by cosine with the embedding of this entry")
    search.add_argument("--limit", type=int, default=10, help="at most so many (default: 10)")

    combine = action("combine", "store the weighted sum of entries: combine new a=1 b=-0.5")
    combine.add_argument("name")
    combine.add_argument("weights", nargs="+", metavar="name=weight")
    _add_labels(combine)

    verify = action("verify", "check every byte; exit code 1 if anything is damaged")
    verify.add_argument("--repair", action="store_true", help="write the index anew first")

    export = action("export", "write one entry as a single file")
    export.add_argument("name")
    export.add_argument("file")

    import_ = action("import", "store an entry that export wrote")
    import_.add_argument("file")
    import_.add_argument("--name", help="store it under another name")
    import_.add_argument("--overwrite", action="store_true", help="replace an entry of the same name")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task")
    parser.add_argument("--tag", action="append", default=[], help="repeatable")
    parser.add_argument("--overwrite", action="store_true", help="replace an entry of the same name")


def run(options: argparse.Namespace) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    folder = options.library or os.environ.get(VARIABLE)
    if not folder:
        return _fail(f"no library given: use --library FOLDER or set {VARIABLE}", USAGE)
    makes_one = options.action in ("add", "combine", "import")
    try:
        if not makes_one and not Path(folder).is_dir():
            return _fail(f"{folder} does not exist, expected the folder of a library", FAILED)
        from mmicl_kernels.store import VLibrary

        return _ACTIONS[options.action](VLibrary(folder), options)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        # The text of a KeyError is the repr of its argument.
        return _fail(error.args[0] if isinstance(error, KeyError) else str(error), FAILED)


def _fail(message: str, code: int) -> int:
    complain("mmicl library", message)
    return code


def _list(library: "VLibrary", options: argparse.Namespace) -> int:
    return _print_entries(library.search(limit=max(1, len(library))), options)


def _show(library: "VLibrary", options: argparse.Namespace) -> int:
    entry = library.entry(options.name)
    facts = _facts(entry)
    if options.json:
        print(json.dumps(facts))
        return 0
    facts["backbone"] = backbone_name(entry)
    facts["file"] = str(library.path(options.name))
    rows = [
        (name, printable(x) if isinstance(x, str) else json.dumps(x))
        for name, x in facts.items()
        if x is not None
    ]
    print_table(("", ""), rows)
    return 0


def _add(library: "VLibrary", options: argparse.Namespace) -> int:
    from mmicl_kernels.store import read_adapter

    entry = library.put(
        options.name,
        read_adapter(options.folder),
        task=options.task,
        tags=options.tag,
        metrics=_numbers("--metric", options.metric),
        record=_json(options.record),
        embedding=_json(options.embedding),
        overwrite=options.overwrite,
    )
    return _print_stored(entry, options)


def _remove(library: "VLibrary", options: argparse.Namespace) -> int:
    names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in options.names))
    known = library.list()
    for name in names:
        if name not in library and name not in known:
            raise KeyError(f"no entry {name!r} in {library.folder}; nothing was removed")
    for name in names:
        library.remove(name)
    if options.json:
        print(json.dumps(names))
    return 0


def _search(library: "VLibrary", options: argparse.Namespace) -> int:
    embedding = None
    if options.like is not None:
        embedding = library.embedding(options.like)
        if embedding is None:
            raise ValueError(f"{options.like!r} has no embedding, so nothing is like it")
    found = library.search(options.text, options.tag, embedding, options.task, options.method, options.limit)
    return _print_entries(found, options)


def _combine(library: "VLibrary", options: argparse.Namespace) -> int:
    weights = _numbers("weights", options.weights)
    entry = library.put(
        options.name,
        library.combine(weights),
        task=options.task,
        tags=options.tag,
        record={"combined": weights},
        overwrite=options.overwrite,
    )
    return _print_stored(entry, options)


def _verify(library: "VLibrary", options: argparse.Namespace) -> int:
    if options.repair:
        library.rebuild()
    problems = library.verify()
    if options.json:
        print(json.dumps(problems))
    else:
        print("\n".join(map(printable, problems)) or f"{len(library)} entries, nothing damaged")
    return FAILED if problems else 0


def _export(library: "VLibrary", options: argparse.Namespace) -> int:
    library.export(options.name, options.file)
    return _print_stored(library.entry(options.name), options)


def _import(library: "VLibrary", options: argparse.Namespace) -> int:
    entry = library.import_file(options.file, name=options.name, overwrite=options.overwrite)
    return _print_stored(entry, options)


_ACTIONS = {
    "list": _list,
    "show": _show,
    "add": _add,
    "remove": _remove,
    "search": _search,
    "combine": _combine,
    "verify": _verify,
    "export": _export,
    "import": _import,
}


def _numbers(what: str, words: Iterable[str]) -> dict[str, float]:
    """``{"a": 0.5}`` of ``["a=0.5"]``; a name may have "=" in it."""
    numbers = {}
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if not name or value is None or name in numbers:
            raise ValueError(f"{what} has {word!r}, expected name=number, each name once")
        numbers[name] = value
    return numbers


def _json(file: str | None) -> Any:
    from mmicl_kernels.store.entry_file import parse_json

    if file is None:
        return None
    if os.path.exists(file) and not os.path.isfile(file):  # a device or a pipe may never end
        raise ValueError(f"{file} is not a regular file")
    if os.path.getsize(file) > MAX_RECORD_BYTES:
        raise ValueError(f"{file} is longer than {MAX_RECORD_BYTES} bytes")
    return parse_json(Path(file).read_bytes(), file)


def _facts(entry: "Entry") -> dict[str, Any]:
    facts = asdict(entry)
    if entry.score is None:
        del facts["score"]
    return facts


def _print_stored(entry: "Entry", options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(_facts(entry)))
    else:
        print(f"{entry.name}: {entry.method}, {entry.num_parameters:,} parameters")
    return 0


def _print_entries(entries: Iterable["Entry"], options: argparse.Namespace) -> int:
    entries = list(entries)
    if options.json:
        print(json.dumps([_facts(entry) for entry in entries]))
        return 0
    scored = any(entry.score is not None for entry in entries)
    rows = []
    for entry in entries:
        metrics = ", ".join(f"{label} {value:.4g}" for label, value in entry.metrics.items())
        labels = (entry.name, entry.method, entry.task or "", ", ".join(entry.tags))
        row = (*labels, metrics, backbone_name(entry), entry.created)
        rows.append((f"{entry.score:.4f}", *row) if scored else row)
    print_table(("cosine", *COLUMNS) if scored else COLUMNS, rows)
    return 0
