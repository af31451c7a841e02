"""`mmicl support`: which model families every method was proven on."""

import argparse
import json
from pathlib import Path

from mmicl_kernels.cli.printing import USAGE, print_table

MATRIX = Path(__file__).parent.parent / "models" / "support.json"
METHODS = {"mimic": "MimIC", "m2iv": "M2IV", "live": "LIVE", "aim": "AIM"}
# In the order of the letters that stand for them.
CELLS = {
    "F": "forward",
    "G": "generate",
    "B": "beams",
    "S": "static cache",
    "P": "padding",
    "T": "training",
    "D": "detach",
}
EMPTY, FAILED, UNKNOWN = "·", "!", "?"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("support", help="the matrix of model families and methods that tests proved")
    parser.add_argument("--transformers", help="version the tests ran on (default: the newest)")
    parser.add_argument("--markdown", action="store_true", help="all versions, as committed in SUPPORT.md")


def run(parsed: argparse.Namespace) -> int:
    matrix = json.loads(MATRIX.read_text(encoding="utf-8"))
    if parsed.markdown:
        print(markdown(matrix), end="")
        return 0
    version = parsed.transformers or newest_first(matrix)[0]
    if version not in matrix:
        print(f"--transformers is {version!r}, expected one of {', '.join(sorted(matrix))}")
        return USAGE
    families, notes = rows(matrix[version])
    print_table(("family", "class", *METHODS.values()), families)
    print()
    print(f"transformers {version}: {green(matrix[version])} of {len(families)} models green.", legend())
    for note in notes:
        print(note)
    return 0


def newest_first(matrix: dict) -> list[str]:
    return sorted(matrix, key=lambda version: [int(x) for x in version.split(".")], reverse=True)


def rows(families: dict) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row of text per family, and a line per reason for empty cells."""
    table, reasons = [], {}
    for name, family in families.items():
        for method, cells in family["cells"].items():
            for cell, outcome in cells.items():
                if outcome not in ("passed", "failed"):
                    of_cells, of_methods = reasons.setdefault((name, outcome), ({}, {}))
                    of_cells[cell] = of_methods[METHODS[method]] = None
        letters = (letters_of(family["cells"].get(method, {})) for method in METHODS)
        table.append((name, family["class"], *letters))
    return table, [_note(*key, *of) for key, of in reasons.items()]


def _note(family: str, reason: str, cells: dict, methods: dict) -> str:
    """Which cells of a family are empty, all of them not listed one by one."""
    where = [family] if len(methods) == len(METHODS) else [family, *methods]
    return f"{', '.join([*where, *(cells if len(cells) < len(CELLS) else ())])}: {reason}"


def letters_of(cells: dict[str, str]) -> str:
    marks = {"passed": None, "failed": FAILED, UNKNOWN: UNKNOWN}
    return "".join(marks.get(cells.get(cell, UNKNOWN), EMPTY) or letter for letter, cell in CELLS.items())


def green(families: dict) -> int:
    """Tiny models every cell of which passed, or is empty for a reason that a test showed."""
    marks = [[letters_of(family["cells"].get(x, {})) for x in METHODS] for family in families.values()]
    return sum(not any(bad in letters for letters in of for bad in (FAILED, UNKNOWN)) for of in marks)


def legend() -> str:
    names = ", ".join(f"{letter} {cell}" for letter, cell in CELLS.items())
    return f"{names}; {EMPTY} empty, {FAILED} failed, {UNKNOWN} not run."


def markdown(matrix: dict) -> str:
    """``models/SUPPORT.md``."""
    lines = [
        "# Which models are supported",
        "",
        "Made by `make test-families`; do not edit. A letter is a test that compared a patched tiny model of",
        "the family, its real classes with random weights, with an independent plain computation (D: with",
        "itself before, bit for bit):",
        legend(),
        "",
    ]
    for version in newest_first(matrix):
        families, notes = rows(matrix[version])
        lines += [
            f"## transformers {version}: {green(matrix[version])} of {len(families)} models green",
            "",
        ]
        lines += ["| " + " | ".join(("family", "class", *METHODS.values())) + " |", "|" + " --- |" * 6]
        lines += ["| " + " | ".join(row) + " |" for row in families]
        lines += ["", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)
