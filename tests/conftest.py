"""What every test shares: seeds, poisoned allocations, devices, implementations."""

import pytest
import torch

from mmicl_kernels import _extension

torch.set_num_threads(1)  # sizes are small: threads cost more than they save


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fill uninitialised memory with NaN, the C++ kernels' included: PyTorch does it in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


_CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *_CUDA])
def device(request):
    return request.param


@pytest.fixture(params=["composed", "composed_without_extension"])
def composed(request, monkeypatch):
    """The name "composed", with the C++ kernels and with the ones in plain PyTorch."""
    if request.param == "composed_without_extension":
        monkeypatch.setattr(_extension, "load", lambda: False)
    elif not _extension.load():
        pytest.skip("the C++ extension is not built")
    return "composed"


@pytest.fixture(params=["reference", "composed", "composed_without_extension"])
def impl(request, monkeypatch):
    """The implementations of every op that run on any device."""
    if request.param == "reference":
        return "reference"
    if request.param == "composed_without_extension":
        monkeypatch.setattr(_extension, "load", lambda: False)
    elif not _extension.load():
        pytest.skip("the C++ extension is not built")
    return "composed"
