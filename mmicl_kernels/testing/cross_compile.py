"""Compile Triton kernels for a GPU that is not there, exactly as a launcher would launch them.

Not in a process with ``TRITON_INTERPRET=1``, whose kernels are interpreted.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory that one program may use (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel, per program or thread."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        """How often a machine instruction that begins so occurs."""
        return len(re.findall(rf"\b{re.escape(instruction)}", self.sass))


class _Target:
    """Stands in for a driver: says what to compile for, and has nothing to launch on."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # the key of Triton's caches

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling_for(
    capability: int, kernels: Sequence[triton.JITFunction], skipped: Sequence[triton.JITFunction] = ()
) -> Iterator[list]:
    """Inside, launching one of ``kernels`` compiles it for ``capability`` (80 for sm_80) and runs nothing.

    Launching one of ``skipped`` does nothing at all. Yields the list of compiled kernels, in the order of
    their launches; see :func:`machine_code`.
    """
    compiled = []

    def compile_only(run):
        def launch(*args, grid, warmup, **options):
            compiled.append(run(*args, grid=grid, warmup=True, **options))

        return launch

    runs = {kernel: kernel.run for kernel in (*kernels, *skipped)}
    # not driver.set_active: its undoing, reset_active, raises where there is no GPU
    with mock.patch.object(driver, "_active", _Target(capability)):
        for kernel, run in runs.items():
            kernel.run = compile_only(run) if kernel in kernels else lambda *args, **options: None
        try:
            yield compiled
        finally:
            for kernel, run in runs.items():
                kernel.run = run


def machine_code(kernel) -> MachineCode:
    """Registers and spills as ``cuobjdump`` reads them from the cubin, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _output("cuobjdump", "-res-usage", cubin)))
        sass = _output("nvdisasm", cubin)
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return MachineCode(
        kernel.name, int(usage["REG"]), spilled, kernel.metadata.shared, kernel.asm["ptx"], sass
    )


def _output(tool: str, *arguments: object) -> str:
    command = [TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
