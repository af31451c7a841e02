"""A library of three entries and a bank, for what happens to them."""

import pytest

from tests.store.banks import filled
from tests.store.vectors import library_of_three


@pytest.fixture
def library(tmp_path):
    return library_of_three(tmp_path / "library")


@pytest.fixture
def bank(tmp_path):
    return filled(tmp_path / "bank")
