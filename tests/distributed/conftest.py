"""The distributed tests attach the adapters of the patches, on batches of training's."""

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / room) for room in ("patch", "training")]


@pytest.fixture
def records(tmp_path):
    """Ten: of the third batch of four only two are left, which one process takes and the other none of."""
    from records_of_colours import write_records

    return write_records(tmp_path, count=10)
