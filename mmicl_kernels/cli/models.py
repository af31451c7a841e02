"""What commands that load a model have in common."""

import argparse
import importlib
import os
import sys


def add_import(parser: argparse.ArgumentParser) -> None:
    """For models whose classes transformers does not have, and methods that this package does not have."""
    parser.add_argument(
        "--import", action="append", default=[], dest="modules", metavar="MODULE",
        help="a Python module to import first, which registers the model's classes or a method",
    )  # fmt: skip


def import_modules(options: argparse.Namespace) -> None:
    """They are looked for in the current folder too, as ``python -m`` does.

    Raises ImportError: there is none of that name, or importing it fails.
    """
    if options.modules and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in options.modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError(f"--import is {name!r}, expected a module's name, such as package.module")
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module does
            raise ImportError(f"--import {name}: {type(error).__name__}: {error}") from error
