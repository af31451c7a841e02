"""Triton kernels in tests: on what they run, what is launched, and what only a GPU shows.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process either interprets or compiles. Value
tests have one device: the CPU in an interpreting process, which another test starts; CUDA in any other.
"""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = pytest.param("cpu") if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)
on_device = pytest.mark.parametrize("device", [DEVICE])
slow_if_interpreted = pytest.mark.slow if INTERPRETED else lambda test: test
# The interpreter rounds bf16 towards zero, everything else to nearest; and fp32 takes the way of fp64.
FLOATS = (torch.float32, torch.float16)
if not INTERPRETED:
    FLOATS += (torch.bfloat16, torch.float64)
HALVES = tuple(x for x in FLOATS if x.itemsize == 2)
# What is compiled for: Hopper is the one whose speed was thought about.
CAPABILITIES = (90, pytest.param(80, marks=pytest.mark.slow))
compiles = pytest.mark.skipif(INTERPRETED, reason="this process interprets its kernels")


def on_gpu_alone(test):
    return pytest.mark.gpu(compiles(test))


def interpreted(*arguments):
    """A pytest process that interprets its kernels; it stops at the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:warnings"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_all_pass(*processes, at_least):
    """Every process ends well, having passed so many tests."""
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-8000:]
        assert int(re.search(r"(\d+) passed", output).group(1)) >= at_least, output[-2000:]


def far_rows(x):
    """``x``, whose rows lie along one dimension, with 2^29 elements from each to the next.

    From row 4 on the product of row and stride passes int32.
    """
    *sizes, m = x.shape
    n, stride = max(sizes), 2**29
    storage = np.zeros((n - 1) * stride + m, {2: np.float16, 1: np.uint8}[x.element_size()])
    flat = torch.from_numpy(storage).to(x.device).view(x.dtype)
    far = flat.as_strided(x.shape, (*(stride if size > 1 else n * stride for size in sizes), 1))
    return far.copy_(x)


def assert_passes_interpreted(selection, *names, at_least):
    """Of the tests of these files those that ``-k selection`` selects."""
    files = (Path(__file__).with_name(f"test_{name}.py") for name in names)
    assert_all_pass(interpreted("-k", selection, "-m", "not gpu", *files), at_least=at_least)


def assert_machine_code(codes, kernels, registers, *, reads_nothing=None, writes_nothing=None):
    """Of each kernel: no spills, few registers, and rows touched 16 bytes at a time."""
    assert [code.name for code in codes] == [kernel.__name__ for kernel in kernels]
    for code, kernel in zip(codes, kernels, strict=True):
        assert code.spilled_bytes == 0, code.name
        assert code.registers <= registers, (code.name, code.registers)
        assert "ld.global.v4.b32" in code.ptx or kernel is reads_nothing, code.name
        assert "st.global.v4.b32" in code.ptx or kernel is writes_nothing, code.name
        assert not re.search(r"(ld|st)\.global\.b16", code.ptx), code.name


@contextmanager
def launches(*kernels):
    """Yields the list of those of ``kernels`` that are launched inside, in order."""
    launched = []

    def counting(kernel, run):
        return lambda *a, **k: (launched.append(kernel), run(*a, **k))

    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(mock.patch.object(kernel, "run", counting(kernel, kernel.run)))
        yield launched


def captured(step):
    """A CUDA graph of ``step``, which ran once before, and what it returns at every replay."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_replays(step, *data):
    """``step`` never waits for the GPU, and a graph of it reads ``data`` anew: other values need no other."""
    assert_no_synchronisation(step)
    graph, replayed = captured(step)
    for x in data:
        x.copy_(x.roll(1))
    graph.replay()
    for a, b in zip(replayed, step(), strict=True):
        assert torch.equal(a, b)


def assert_no_synchronisation(step):
    """Once it compiled and asked for the device's properties, ``step`` never waits for the GPU."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
