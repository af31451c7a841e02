"""The emulator and the instructions of csrc/cuda, held against CuTe, the headers of nvidia-cutlass."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulated

CUDA = emulated.ROOT / "csrc" / "cuda"
# Not instructions: indices, an address, a hint to the compiler; bf16 is unpacked by shifts.
PLAIN = {"thread_index", "block_x", "block_y", "block_z", "shared_base", "pin"}


@pytest.fixture(scope="session")
def includes(nvcc):
    """Of CuTe, CUDA, csrc/cuda and the emulator."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("there is no CuTe: the package nvidia-cutlass is not installed")
    cute = Path(package.submodule_search_locations[0]) / "source" / "include"
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"TOP=(\S+)", dry_run).group(1)) / "include"
    return [f"-I{path}" for path in (cute, toolkit, toolkit / "cccl", CUDA, Path(__file__).parent)]


def host_program(source, includes, target):
    """What a program says, and whether it found nothing wrong."""
    command = [*emulated.COMPILER, "-std=c++17", "-O1", "-w", *includes, str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    done = subprocess.run([target], capture_output=True, text=True)
    return done.returncode == 0, done.stdout


def test_layouts(includes, tmp_path):
    """Fragments, operands in shared memory, swizzle and descriptors."""
    is_right, said = host_program(
        Path(__file__).with_name("cute_layouts.cpp"), includes, tmp_path / "layouts"
    )
    assert is_right, said
    assert re.search(r"^0 of 18434 differ$", said, re.MULTILINE), said


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new",
    [
        ("hopper.h", "(chunk ^ (row & 7))", "(chunk ^ (row & 3))"),
        ("hopper.h", "static_cast<uint64_t>(1024 >> 4) << 32", "static_cast<uint64_t>(512 >> 4) << 32"),
        ("hopper.h", "leading >> 4) << 16", "leading >> 3) << 16"),
        ("emulated_hopper.h", "8 * (i / 2 % 2); }", "8 * (i % 2); }"),
        ("emulated_hopper.h", "chunk / 8 * leading", "chunk / 4 * leading"),
        ("emulated_hopper.h", "address ^ (address >> 3 & 0x70)", "address ^ (address >> 4 & 0x70)"),
    ],
)
def test_a_wrong_layout_is_noticed(file, old, new, includes, tmp_path):
    for path in (*CUDA.glob("*.h"), *Path(__file__).parent.glob("*.[ch]*")):
        shutil.copy(path, tmp_path)
    changed = tmp_path / file
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    is_right, _ = host_program(
        tmp_path / "cute_layouts.cpp", [f"-I{tmp_path}", *includes], tmp_path / "layouts"
    )
    assert not is_right


@pytest.fixture(scope="module")
def machine_code(nvcc, includes, tmp_path_factory):
    """The instructions of every kernel in wrappers.cu."""
    cross_compile = pytest.importorskip("mmicl_kernels.testing.cross_compile")
    codes, _ = cross_compile.compile_cuda(
        nvcc, [Path(__file__).with_name("wrappers.cu")], ["-use_fast_math", "-w", *includes], CUDA
    )
    return {name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*;)", code.sass) for name, code in codes.items()}


def wrappers():
    """Names of the functions in the parts of the headers that nvcc compiles."""
    names = set()
    for header in ("device.h", "hopper.h"):
        text = (CUDA / header).read_text().split("#ifdef __CUDACC__", 1)[1]
        names |= set(re.findall(r"DEVICE \w+ (\w+)\(", text))
    return names


@pytest.mark.slow
def test_machine_code_of_every_wrapper(machine_code):
    ours = {name.removeprefix("ours_"): x for name, x in machine_code.items() if name.startswith("ours_")}
    theirs = {
        name.removeprefix("theirs_"): x for name, x in machine_code.items() if name.startswith("theirs_")
    }
    assert ours.keys() == theirs.keys()
    for name, instructions in ours.items():
        assert len(instructions) >= 16 and instructions == theirs[name], name


def test_every_wrapper_is_compared():
    text = Path(__file__).with_name("wrappers.cu").read_text()
    compared = "".join(re.findall(r"OURS\([\s\S]*?(?=THEIRS)", text))
    missing = {name for name in wrappers() - PLAIN if not re.search(rf"\b{name}\b[<(]", compared)}
    assert wrappers() > PLAIN and not missing
