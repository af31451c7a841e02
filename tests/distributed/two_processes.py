"""A check in two processes that are joined by gloo."""

import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing import ProcessContext

WORLD_SIZE = 2
# Only stops what hangs: a check takes seconds.
HANGS_AFTER = 120.0
# Forked from one server without threads, which imports these once for all checks of a pytest process.
PRELOADED = ["mmicl_kernels.testing.tiny_models", "mmicl_kernels.patch", "torch.distributed.fsdp"]


def two_processes(check: Callable[..., None]) -> Callable[..., None]:
    """A test that is ``check(rank, ...)`` in two processes; what follows ``rank`` are pytest's arguments."""
    _, *parameters = inspect.signature(check).parameters.values()

    def test(**given):
        in_two_processes(test, *(given[x.name] for x in parameters))

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(test, name, getattr(check, name))
    test.check, test.__signature__ = check, inspect.Signature(parameters)
    return test


def in_two_processes(check: Callable[..., None], *args: object) -> None:
    """Call ``check(rank, *args)``, a function of a module, in two processes; what one raises is raised here.

    Both have a process group, the same seed and one thread. A process that waits for one that raised is
    ended.
    """
    forkserver.set_forkserver_preload(PRELOADED)
    # Until Python 3.13 the server is not told where this process imports from.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run,
            args=(Path(folder) / "store", check, args),
            nprocs=WORLD_SIZE,
            join=False,
            start_method="forkserver",
        )
        _join(context)


def _join(context: ProcessContext) -> None:
    end = time.monotonic() + HANGS_AFTER
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"the processes are running after {HANGS_AFTER} s, expected an end")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _run(rank: int, store: Path, check: Callable[..., None], args: tuple[object, ...]) -> None:
    # transformers and accelerate read these, and gloo would look up the machine's name.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    try:
        getattr(check, "check", check)(rank, *args)
    finally:
        dist.destroy_process_group()
