"""What every test shares: seeds, poisoned allocations, devices, implementations."""

import os

import pytest
import torch

from mmicl_kernels import _extension

torch.set_num_threads(1)  # sizes are small: threads cost more than they save


def pytest_collection_modifyitems(items):
    # Few and long: at the end they would keep one of two workers waiting.
    items.sort(key=lambda item: not item.path.stem.endswith("_triton"))
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


# A process either interprets Triton's kernels, on CPU tensors, or compiles them, for CUDA.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.support import triton_interpreter

    triton_interpreter.install()

_IMPLS = ["triton"] if INTERPRETED else ["reference", "composed", "composed_without_extension"]
_IMPLS += ["triton"] if _CUDA and not INTERPRETED else []


@pytest.fixture(params=_IMPLS)
def impl(request, monkeypatch):
    """The implementations of every op that run in this process."""
    return _implementation(request, monkeypatch)


@pytest.fixture(params=[name for name in _IMPLS if name != "reference"])
def operator(request, monkeypatch):
    """Those that autograd sees as one operator with a backward of its own."""
    return _implementation(request, monkeypatch)


def _implementation(request, monkeypatch):
    on_cpu = "device" not in request.fixturenames or request.getfixturevalue("device") == "cpu"
    if request.param == "composed_without_extension":
        if not on_cpu:
            pytest.skip("the C++ extension is for CPU tensors")
        monkeypatch.setattr(_extension, "load", lambda: False)
    elif request.param == "composed" and on_cpu and not _extension.load():
        pytest.skip("the C++ extension is not built")
    elif request.param == "triton" and not INTERPRETED and on_cpu:
        pytest.skip("Triton's kernels run on CPU tensors in the interpreter alone")
    return request.param.removesuffix("_without_extension")
