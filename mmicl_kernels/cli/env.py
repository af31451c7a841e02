"""`mmicl env`: the block a bug report needs. Every probe is guarded, so that half a report is still one."""

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata

PACKAGES = ("torch", "triton", "transformers", "safetensors", "peft", "flash-attn", "numpy")


def report() -> str:
    """Versions, devices, and which implementations can run here; one fact a line."""
    facts: dict[str, Callable[[], str]] = {
        "mmicl_kernels": lambda: f"{metadata.version('mmicl-kernels')} in {_package_folder()}",
        "python": lambda: sys.version.split()[0],
        "platform": platform.platform,
        "processor": _processor,
        **{name: lambda name=name: metadata.version(name) for name in PACKAGES},
        "cuda": _cuda,
        "cpu kernels": _extension,
        "cuda kernels": _cuda_kernels,
        "triton kernels": _triton,
        "variables": _variables,
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {_guarded(probe)}" for name, probe in facts.items())


def _guarded(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except metadata.PackageNotFoundError:
        return "not installed"
    # A broken package can raise anything at import, and the report is for exactly that case.
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}"


def _package_folder() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.machine()}, {os.cpu_count()} cores"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none (torch built for {torch.version.cuda or 'CPU'})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


def _extension() -> str:
    from mmicl_kernels import _extension

    status = _extension.status()
    if not status["loaded"]:
        return f"plain torch ({status['reason']})"
    build = status["build"]
    return f"C++, {status['isa']} ({build.get('compiler')} {build.get('compiler_version')})"


def _cuda_kernels() -> str:
    import torch

    from mmicl_kernels import _extension
    from mmicl_kernels.ops._core.dispatch import require_cuda

    try:
        reason = _extension.missing_cuda()
        if reason is None:
            require_cuda(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        reason = str(error)
    names = sorted(x for x in torch._C._dispatch_get_all_op_names() if x.startswith("mmicl_cuda::"))
    return f"no: {reason}" if reason else ", ".join(names)


def _triton() -> str:
    import torch

    from mmicl_kernels.ops._core.dispatch import require_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        require_triton(device)
    except RuntimeError as error:
        return f"no: {error}"
    return f"yes, on {device.type}"


def _variables() -> str:
    prefixes = ("MMICL_", "TRITON_", "TORCH_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    return " ".join(found) or "none set"
