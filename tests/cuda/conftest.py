import shutil

import pytest


@pytest.fixture(scope="session")
def nvcc():
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("there is no nvcc")
    return found
