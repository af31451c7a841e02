"""The map in docs/house.md is that of the imports, and its ways are short."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_layering import FILES, LAYERS, imports, inside, layer_of, name_of, parsed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "house.md").read_text()
# A third less than it took before there was a map.
LONGEST = {
    "An op is called": 10,
    "A token is decoded": 10,
    "An adapter is trained": 8,
    "Fused tokens are spliced into a prompt": 6,
    "A GPU is there": 9,
}


def rooms() -> dict[str, set[str]]:
    """The rows of the table: a room, and what it imports."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", PAGE, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", imported)) for room, imported in rows}


def ways() -> dict[str, list[Path]]:
    """By heading, the files in their order."""
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    found = {}
    for text in sections:
        names = re.findall(r"^\d+\. `([^`]+)`", text, re.MULTILINE)
        found[text.partition("\n")[0]] = [ROOT / name for name in names]
    return found


def reached(path: Path) -> set[str]:
    """What a file imports, also by way of a package's ``__init__``; what a Makefile runs."""
    if path.suffix != ".py":
        return set(re.findall(r"-m ([\w.]+)", path.read_text()))
    names, seen = imported(path), set()
    while new := (names | {name.rpartition(".")[0] for name in names}) - seen:
        seen |= new
        inits = [ROOT / name.replace(".", "/") / "__init__.py" for name in new if name]
        found = set().union(*(imported(init) for init in inits if init.is_file()))
        if found <= names:
            return names
        names |= found
    return names


def imported(path: Path) -> set[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "mmicl_kernels":
        return parsed(path)
    own = ".".join(parts[:-1])  # relative imports are of its own folder
    return {x.replace("mmicl_kernels", own, 1) for x in imports(ast.parse(path.read_text()), "x", False)}


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def test_the_table_is_that_of_the_imports():
    found = {room: set() for room in LAYERS}
    for path in FILES:
        room = layer_of(name_of(path))
        if room in found:
            found[room] |= {layer_of(name) for name in inside(parsed(path))} & set(LAYERS)
            found[room].discard(room)
    assert list(rooms()) == list(LAYERS)
    assert rooms() == found


@pytest.mark.parametrize("way", ways())
def test_each_file_on_a_way_is_imported_by_one_before_it(way):
    files = ways()[way]
    assert len(files) <= LONGEST.get(way, 10) and len(set(files)) == len(files)
    for i, path in enumerate(files):
        assert path.is_file(), path
        name = dotted(path)
        before = {x for earlier in files[:i] for x in reached(earlier)}
        known = any(x == name or x.startswith(f"{name}.") for x in before)
        assert i == 0 or known, f"{name} is imported by none of {[x.name for x in files[:i]]}"


def test_every_way_that_was_too_long_is_on_the_map():
    assert set(LONGEST) <= set(ways())
