"""The compiled CPU kernels, `torch.ops.mmicl_cpu.*`: found and loaded on first use, absent without harm.

The library registers its operators through libtorch's stable ABI (csrc/bindings*.cpp) and contains no
Python. Beside it lies `_build_info`, which says how it was built and needs no torch.
MMICL_DISABLE_EXTENSION=1 leaves the library alone; MMICL_CPU_ISA=baseline or avx2 makes it use less
than the processor offers.
"""

import functools
import importlib
import os
from pathlib import Path

_FOLDER = Path(__file__).parent
_NOT_BUILT = "not built: `pip install -v --no-build-isolation -e .` builds it, or says why not"


def _library():
    """The library's path, or None and the reason there is none."""
    if os.environ.get("MMICL_DISABLE_EXTENSION") == "1":
        return None, "turned off by MMICL_DISABLE_EXTENSION=1"
    path = next(iter(sorted(_FOLDER.glob("_C.*so"))), None)
    return path, None if path else _NOT_BUILT


@functools.cache
def load() -> bool:
    """Load the library, once a process. False when it was not built or is turned off.

    Raises:
        RuntimeError: the library is there but cannot be loaded, for instance with an older torch.
    """
    path, _ = _library()
    if path is None:
        return False
    import torch

    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"mmicl_kernels: {path} does not load with torch {torch.__version__}: {error}\n"
            "Rebuild it (pip install --no-build-isolation -e .) or set MMICL_DISABLE_EXTENSION=1."
        ) from error
    return True


def status() -> dict:
    """What `mmicl env` prints; never raises.

    Returns:
        built: the library is there and not turned off. loaded: it also loads.
        reason: why either is False, else None.
        isa: the instruction set in use, None unless loaded.
        build: compiler, compiler_version, flags, torch_version, isas; empty if unknown.
    """
    path, reason = _library()
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
