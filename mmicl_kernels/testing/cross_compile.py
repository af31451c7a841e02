"""Compile Triton and CUDA kernels for a GPU that is not there, and read what the assembler made of them.

Triton's as a launcher would launch them, and not in a process with ``TRITON_INTERPRET=1``, whose kernels are
interpreted; CUDA's as ``setup.py`` builds them.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
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
    shared_bytes: int  # static, of CUDA kernels
    ptx: str  # "" of CUDA kernels
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


def compile_cuda(
    nvcc: str, sources: Sequence[Path], options: Sequence[str] = (), kernels: Path | None = None
) -> tuple[dict[str, MachineCode], str]:
    """The kernels in ``sources`` by name, and what the compiler had to say.

    Args:
        nvcc: the compiler. sources: files; ``nvcc_options.txt`` beside them, or in the folder ``kernels``,
            says how they are built. options: more of the compiler's.

    Raises:
        subprocess.CalledProcessError: it failed; ``stderr`` says why.
    """
    torch_folder = Path(torch.__file__).parent / "include"
    includes = [f"-I{torch_folder}", f"-I{torch_folder / 'torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        told = ["--options-file", (kernels or sources[0].parent) / "nvcc_options.txt", "-o", library]
        command = [nvcc, *told, *includes, *options, *sources]
        log = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        usage = _output("cuobjdump", "-res-usage", library)
        sass = _output("cuobjdump", "-sass", library)
    codes = {}
    for text in re.split(r"\n\s*Function : ", sass)[1:]:
        symbol = text.split("\n", 1)[0].strip()
        of_kernel = usage.split(f"Function {symbol}:", 1)[1].split("Function", 1)[0]
        used = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", of_kernel))
        name = _demangled(symbol)
        spilled = int(used["STACK"]) + int(used["LOCAL"])
        codes[name] = MachineCode(name, int(used["REG"]), spilled, int(used["SHARED"]), "", text)
    return codes, log.stdout + log.stderr


def _demangled(symbol: str) -> str:
    """A kernel's name and template arguments, without its namespace and parameters."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^void |mmicl::cuda::|\(anonymous namespace\)::|\(mmicl.*|\(int\)", "", text.strip())


def _output(tool: str, *arguments: object) -> str:
    command = [TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
