"""``--support-matrix FILE``: what the cells of ``test_support_matrix.py`` showed, as JSON."""

import json
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
import transformers

from mmicl_kernels.cli.support import CELLS, METHODS
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available


def pytest_addoption(parser):
    parser.addoption("--support-matrix", type=Path, help="JSON file to write the support matrix into")


def pytest_configure(config):
    path = config.getoption("--support-matrix")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to this process
        config.pluginmanager.register(SupportMatrix(path))


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


class SupportMatrix:
    """Of the installed transformers; what the file has of other minor versions stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._families: dict[str, dict] = defaultdict(lambda: {"class": "", "cells": defaultdict(dict)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        if report.when != "call" or "cell" not in told:
            return
        family, class_name, method, cell = told["cell"]
        self._families[family]["class"] = class_name
        outcome = "passed" if report.passed else "failed"
        self._families[family]["cells"][method][cell] = told.get("empty") or outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        missing = [
            (family, method, cell)
            for family, method, cell in product(filter(is_available, ALL_MODELS), METHODS, CELLS.values())
            if cell not in self._families[family]["cells"][method]
        ]
        if missing:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
            print(f"\n{len(missing)} cells were not run, {missing[0]} first: {self._path} is as it was")
            return
        version = transformers.__version__
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        versions = {x: families for x, families in before.items() if minor(x) != minor(version)}
        versions[version] = self._families
        self._path.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n")
