import pytest
import torch


@pytest.fixture
def same_threads():
    """What a benchmark sets stays its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
