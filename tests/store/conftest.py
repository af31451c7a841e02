"""A library of three entries and a bank, for what happens to them."""

import pytest

import mmicl_kernels as mk
from tests.store.banks import filled
from tests.store.vectors import live


@pytest.fixture
def library(tmp_path):
    library = mk.VLibrary(tmp_path / "library")
    for value, name in enumerate("abc", 1):
        library.put(name, live(float(value)), embedding=[1.0, value])
    return library


@pytest.fixture
def bank(tmp_path):
    return filled(tmp_path / "bank")
