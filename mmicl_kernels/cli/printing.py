"""What commands print for people."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported when a command runs
    from mmicl_kernels.store import DemonstrationBank, Entry

USAGE, FAILED = 2, 1  # exit codes


def printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(x if x.isprintable() else "?" for x in text)


def complain(who: str, message: str) -> None:
    """One line on stderr, if there is one: ``print`` would take stdout instead."""
    if sys.stderr is not None:
        print(f"{who}:", printable(" ".join(message.split())), file=sys.stderr)


def backbone_name(stored: "Entry | DemonstrationBank") -> str:
    backbone = stored.backbone
    revision = f"@{backbone.revision}" if backbone.revision else ""
    return printable(f"{backbone.name or backbone.model_class}{revision}")


def print_table(columns: Iterable[str], rows: list[tuple[str, ...]]) -> None:
    """A rich table on a terminal; lines of tabs in a pipe, or where rich is not installed."""
    rich = None
    if sys.stdout is not None and sys.stdout.isatty():
        try:
            import rich.console
            import rich.table
            import rich.text
        except ModuleNotFoundError:
            rich = None
    if rich is None:
        for row in rows:
            print("\t".join(row))
        return
    table = rich.table.Table(*columns, show_header=any(columns))
    for row in rows:
        table.add_row(*map(rich.text.Text, row))  # Text: a name may look like markup
    rich.console.Console().print(table)
