"""Results to tables and plots: ``python -m benchmarks.report FILES --readme README.md --plots FOLDER``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import instructions, layers, training
from benchmarks.harness.tables import fill_tables, tables

# By the file's name; the others are of ops.
DECODERS = {"layers": layers, "training": training, "instructions": instructions}


def tables_of(path: Path) -> dict[str, str]:
    """The tables of a file of results, by name, in Markdown."""
    results = json.loads(path.read_text())
    if path.stem in DECODERS:
        return DECODERS[path.stem].tables(results)
    return {key: text for result in results for key, text in tables(result).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables that the README has markers for, and one plot per op's result or section of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="fill the tables in this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write FOLDER/NAME.png")
    options = parser.parse_args(arguments)
    if options.readme:
        filled = {key: text for path in options.results for key, text in tables_of(path).items()}
        options.readme.write_text(fill_tables(options.readme.read_text(), filled))
    if options.plots:
        from benchmarks.harness.plots import plot

        options.plots.mkdir(parents=True, exist_ok=True)
        for path in options.results:
            for result in json.loads(path.read_text()) if path.stem not in DECODERS else []:
                plot(result, options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
