"""``csrc/cuda`` compiled by a C++ compiler beside the emulator in this folder: operators for CPU tensors."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "emulated"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "c++").split()
POLICIES = ("random", "early", "late")
# -fno-gnu-unique: the emulator's state is each library's own.
FLAGS = (
    "-std=c++17", "-O2", "-march=native", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique",
    "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000",
)  # fmt: skip


@functools.cache
def load() -> None:
    """Register ``torch.ops.mmicl_cuda`` for CPU tensors, once a process. Skips where nothing compiles C++."""
    torch.ops.load_library(compile_library(ROOT / "csrc"))


def compile_library(csrc: Path, namespace: str = "mmicl_cuda", flags: tuple[str, ...] = ()) -> Path:
    """The library of the sources under ``csrc``; compiled if no process has done so for these very files."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"there is no C++ compiler: {COMPILER[0]!r} was not found")
    emulator = Path(__file__).parent
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    include = [TORCH / "include", TORCH / "include/torch/csrc/api/include", emulator, csrc / "cuda"]
    link = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = [
        *COMPILER, *FLAGS, *flags, f"-DMMICL_LIBRARY={namespace}", *(f"-I{path}" for path in include),
        "-x", "c++", *kernels, emulator / "emulated_library.cpp", "-x", "none", *link,
    ]  # fmt: skip
    files = [*csrc.glob("*.h"), *(csrc / "cuda").iterdir(), *emulator.glob("*.h"), *emulator.glob("*.cpp")]
    key = hashlib.sha256(repr((torch.__version__, namespace, flags, COMPILER)).encode())
    for file in sorted(files):
        key.update(file.read_bytes())
    BUILT.mkdir(parents=True, exist_ok=True)
    path = BUILT / f"{key.hexdigest()[:16]}.so"
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            done = subprocess.run([*map(str, command), "-o", f"{path}.new"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            assert not done.stderr, f"warnings:\n{done.stderr[:4000]}"
            os.replace(f"{path}.new", path)
    return path
