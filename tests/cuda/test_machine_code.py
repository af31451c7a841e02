"""What nvcc makes of csrc/cuda: no spills, products that run beside other work, the instructions it is about.

``machine_code.json`` holds what release 13.0 made of each kernel. To renew it:
``UPDATE_REGISTERS=1 pytest tests/cuda/test_machine_code.py -m "slow or not slow"``.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulated

pytestmark = pytest.mark.slow
cross_compile = pytest.importorskip("mmicl_kernels.testing.cross_compile")

TABLE = Path(__file__).with_name("machine_code.json")
COUNTED = ("HGMMA", "UTMALDG", "USETMAXREG", "BAR", "SYNCS")
THREADS_REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def compiled(nvcc):
    sources = sorted((emulated.ROOT / "csrc" / "cuda").glob("*.cu"))
    return cross_compile.compile_cuda(nvcc, sources, ["-Xptxas=-v"])


def test_no_spills(compiled):
    kernels, log = compiled
    assert len(kernels) == log.count("Compiling entry function")
    for name, code in kernels.items():
        assert code.spilled_bytes == 0, name
        assert code.count("STL") == code.count("LDL") == 0, name
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", log), log


def test_no_serialised_products(compiled):
    _, log = compiled
    assert not re.search(r"C75\d\d|warning", log), log


def test_products_and_copies(compiled):
    """A product is 16 of its sums: of a tile's scores D / 16, of its values 128 / 16; thrice each."""
    kernels, _ = compiled
    found = 0
    for name, code in kernels.items():
        if name.startswith("shifted_attention_kernel"):
            D = int(re.search(r", (\d+)>", name).group(1))
            assert code.count("HGMMA") == 3 * (D // 16) + 3 * (128 // 16), name
            assert code.count("UTMALDG.4D") == code.count("UTMALDG") > 0, name
            assert code.count("USETMAXREG") == 2, name
            found += 1
    assert found == 4


def test_registers_fit(compiled):
    """What the warpgroups hold after they have shared registers out, as the launch gave them out."""
    kernels, _ = compiled
    for name, code in kernels.items():
        if name.startswith("shifted_attention_kernel"):
            groups, computing, copying = (2, 240, 24) if ", 128>" in name else (3, 160, 32)
            threads = 128 * (1 + groups)
            assert threads * code.registers <= THREADS_REGISTERS, name
            assert 128 * (groups * computing + copying) <= THREADS_REGISTERS, name
            counts = re.findall(r"USETMAXREG[^;]* (0x[0-9a-f]+) ;", code.sass)
            assert {int(x, 16) for x in counts} == {computing, copying}, name


def test_table(compiled, nvcc):
    kernels, _ = compiled
    found = {
        name: {"registers": code.registers, **{x: code.count(x) for x in COUNTED}}
        for name, code in sorted(kernels.items())
    }
    release = re.search(
        r"release ([\d.]+)", subprocess.run([nvcc, "-V"], capture_output=True, text=True).stdout
    )
    if os.environ.get("UPDATE_REGISTERS") == "1":
        TABLE.write_text(json.dumps({"nvcc": release.group(1), "kernels": found}, indent=1) + "\n")
    known = json.loads(TABLE.read_text())
    if release.group(1) != known["nvcc"]:
        pytest.skip(f"the table is of nvcc {known['nvcc']}, this is {release.group(1)}")
    assert found == known["kernels"]
