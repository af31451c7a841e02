"""Queries of a large VLibrary: ``python -m benchmarks.library_search --entries 100000 --json FILE``.

The index is that of all entries. Files have those alone that the queries find: no query opens others.
The queries take turns with each other and with a plain fp32 product, so that all meet the same load.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import mmicl_kernels as mk
from benchmarks.harness.timing import machine
from mmicl_kernels.methods import Backbone, LIVEAdapter, LIVEConfig
from mmicl_kernels.store.entry_file import Entry, file_name, pack
from mmicl_kernels.store.index import COLUMNS, row_of

TAGS, LIMIT, REPEATS = 100, 10, 15
BACKBONE = Backbone("M", "m", "t", 8, "org/model", "main", {0: (2, 4)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a library of random embeddings, check and time its queries, print milliseconds."""
    parser = argparse.ArgumentParser(prog="benchmarks.library_search", description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000, help="at least 10,000")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    embeddings, query = torch.randn(options.entries, options.dimension), torch.randn(options.dimension)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(mk.VLibrary(folder), embeddings, query)
    for name, row in rows.items():
        print(f"{name:<42}{row['milliseconds']:>10.2f} ms, best {row['best']:.2f}, worst {row['worst']:.2f}")
    result = {"benchmark": "library_search", "entries": options.entries, "dimension": options.dimension,
              "machine": machine("cpu"), "rows": rows}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _measure(library: mk.VLibrary, embeddings: Tensor, query: Tensor) -> dict[str, dict]:
    count = len(embeddings)
    cosines = torch.nn.functional.cosine_similarity(embeddings.double(), query.double()[None])
    best = cosines.topk(LIMIT).indices.tolist()
    tagged = (cosines[7::TAGS].topk(LIMIT).indices * TAGS + 7).tolist()
    last, lowest = [count - 1], [99 + TAGS * i for i in range(LIMIT)]
    _fill(library, embeddings, {*best, *tagged, *last, *lowest})
    queries = {
        "embedding": (best, lambda x: x.search(embedding=query)),
        "embedding, one tag of 100": (tagged, lambda x: x.search(embedding=query, tags=["tag7"])),
        "embedding, text of every entry": (best, lambda x: x.search("entry", embedding=query)),
        "text": (last, lambda x: x.search(_name(count - 1))),
        "tag": (lowest, lambda x: x.search(tags=["tag99"])),
    }
    for name, (expected, function) in queries.items():
        found = [entry.name for entry in function(library)]
        if found != [_name(number) for number in expected]:
            raise AssertionError(f"{name}: found {found}, expected {expected}")
    first = {"first query of a process": lambda: mk.VLibrary(library.folder).search(embedding=query)}
    taking_turns = {
        **{name: functools.partial(function, library) for name, (_, function) in queries.items()},
        "list": library.list,
        "get": lambda: library.get(_name(count - 1)),
        "plain fp32 matrix times vector": lambda: embeddings @ query,
    }
    return _timed(first, 3) | _timed(taking_turns, REPEATS)


def _name(number: int) -> str:
    return f"entry {number:06}"


def _fill(library: mk.VLibrary, embeddings: Tensor, with_files: set[int]) -> None:
    """Past ``put``, which waits for the disk at every entry."""
    adapter = LIVEAdapter(LIVEConfig(), BACKBONE)
    marks = ", ".join("?" * len(COLUMNS.split(", ")))
    with library._writing() as writer, writer._transaction("IMMEDIATE") as index:
        for number in range(len(embeddings)):
            entry, digest = Entry(_name(number), "live", vars(adapter.config), BACKBONE, f"task {number % 7}",
                                  (f"tag{number % TAGS}",), {}, None, "2026-01-01"), ""  # fmt: skip
            if number in with_files:
                entry, digest, data = pack(entry, adapter.state_dict(), embeddings[number])
                (library.folder / "entries" / file_name(entry.name)).write_bytes(data)
            *columns, vector = row_of(entry, digest, embeddings[number])
            id = index.execute(f"INSERT INTO entries ({COLUMNS}) VALUES ({marks})", columns).lastrowid
            index.execute("INSERT INTO vectors VALUES (?, ?)", (id, vector))


def _timed(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    kept = {name: all_times[1:] for name, all_times in times.items()}  # the first warms up
    return {
        name: {"milliseconds": statistics.median(x), "best": min(x), "worst": max(x)}
        for name, x in kept.items()
    }


if __name__ == "__main__":
    sys.exit(main())
