"""Examples for two processes."""

import pytest

from tests.support.records_of_colours import write_records


@pytest.fixture
def records(tmp_path):
    """Ten: of the third batch of four only two are left, which one process takes and the other none of."""
    return write_records(tmp_path, count=10)
