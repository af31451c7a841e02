"""One writer at a time, among processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what is stored can be read there, not written
    fcntl = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The one writer's turn, by an advisory lock that the kernel takes from a process that dies."""
    if fcntl is None:
        raise OSError("writing needs flock, which this platform lacks; reading does not")
    handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone would leave it locked while a process forked meanwhile lives.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
