"""The compiled kernels, found and loaded on first use, absent without harm.

`torch.ops.mmicl_cpu.*` are the library `_C` (csrc/bindings*.cpp), `torch.ops.mmicl_cuda.*` are `_C_cuda`
(csrc/cuda). Both register operators through libtorch's stable ABI and contain no Python. Beside them lies
`_build_info`, which says how the first was built and needs no torch.
MMICL_DISABLE_EXTENSION=1 leaves the library alone; MMICL_CPU_ISA=baseline or avx2 makes it use less
than the processor offers.
"""

import functools
import importlib
import os
from pathlib import Path

_FOLDER = Path(__file__).parent
_NOT_BUILT = "not built: `pip install -v --no-build-isolation -e .` builds it, or says why not"


def _library(name):
    """The library's path, or None and the reason there is none."""
    if os.environ.get("MMICL_DISABLE_EXTENSION") == "1":
        return None, "turned off by MMICL_DISABLE_EXTENSION=1"
    path = next(iter(sorted(_FOLDER.glob(f"{name}.*so"))), None)
    return path, None if path else _NOT_BUILT


def _load(path):
    import torch

    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"mmicl_kernels: {path} does not load with torch {torch.__version__}: {error}\n"
            "Rebuild it (pip install --no-build-isolation -e .) or set MMICL_DISABLE_EXTENSION=1."
        ) from error


@functools.cache
def load() -> bool:
    """Load the C++ kernels, once a process. False when they were not built or are turned off.

    Raises:
        RuntimeError: the library is there but cannot be loaded, for instance with an older torch.
    """
    path, _ = _library("_C")
    if path is not None:
        _load(path)
    return path is not None


@functools.cache
def missing_cuda() -> str | None:
    """Load the CUDA kernels, once a process. Why there are none, or None.

    Raises:
        RuntimeError: as :func:`load`.
    """
    import torch

    path, reason = _library("_C_cuda")
    if reason is None and torch.version.cuda is None:
        reason = "torch was built for CPU"
    if reason is None:
        _load(path)
    return reason


def status() -> dict:
    """What `mmicl env` prints; never raises.

    Returns:
        built: the library is there and not turned off. loaded: it also loads.
        reason: why either is False, else None.
        isa: the instruction set in use, None unless loaded.
        build: compiler, compiler_version, flags, torch_version, isas; empty if unknown.
    """
    path, reason = _library("_C")
    report = {"built": path is not None, "loaded": False, "reason": reason, "isa": None, "build": {}}
    try:
        info = importlib.import_module("mmicl_kernels._build_info")
        report["build"] = {name: value for name, value in vars(info).items() if name[0] != "_"}
    except ImportError:
        report["build"] = {}
    try:
        report["loaded"] = load()
        if report["loaded"]:
            import torch

            report["isa"] = torch.ops.mmicl_cpu.isa()
    except Exception as error:  # a report must come even from a broken installation
        report["reason"] = str(error)
    return report
