"""One writer at a time among processes, one thread at a time within one; forked children hold neither."""

import errno
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what is stored can be read there, not written
    fcntl = None

_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
_MUTEXES: "weakref.WeakSet[Mutex]" = weakref.WeakSet()
_HANDLES: set[int] = set()  # descriptors of lock files
_HANDLES_CHANGE = threading.RLock()  # held by who forks, so that a child knows all of them


class Mutex:
    """A reentrant lock of threads that a forked child finds free, whoever held it in the parent.

    ``forget`` is called in a child that was forked while it was held: what it guards may be half changed.
    """

    def __init__(self, forget: Callable[[], None] | None = None) -> None:
        self._lock, self._depth = threading.RLock(), 0
        self._taken = threading.local()  # the locks a thread took: after a fork not all of them are ``_lock``
        self._forget = forget
        _watch_forks()
        _MUTEXES.add(self)

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._depth += 1
        self._taken.__dict__.setdefault("locks", []).append(lock)

    def __exit__(self, *_: object) -> None:
        lock = self._taken.locks.pop()
        if lock is self._lock:
            self._depth -= 1
        lock.release()

    def renew(self) -> None:
        """In a forked child, whose other threads are gone and never give back what they held."""
        held, self._lock, self._depth = self._depth > 0, threading.RLock(), 0
        if held and self._forget is not None:
            self._forget()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The one writer's turn, by an advisory lock that the kernel takes from a process that dies."""
    if fcntl is None:
        raise OSError("writing needs flock, which this platform lacks; reading does not")
    _watch_forks()
    owner = os.getpid()
    with _HANDLES_CHANGE:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
        _HANDLES.add(handle)
    try:
        _flock(handle, path)
        try:
            yield
        finally:
            # Closing alone would leave it locked while a process lives that C code forked meanwhile. To a
            # child that comes by here neither the lock nor, any more, the descriptor belongs.
            if os.getpid() == owner:
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        if os.getpid() == owner:
            with _HANDLES_CHANGE:
                _HANDLES.discard(handle)
                os.close(handle)


def _flock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        reason = "writing needs flock, which this file system lacks; reading does not"
        raise OSError(error.errno, reason, str(path)) from error


@functools.cache
def _watch_forks() -> None:
    """Once, when the first lock is made."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_HANDLES_CHANGE.acquire,
            after_in_parent=_HANDLES_CHANGE.release,
            after_in_child=_in_child,
        )


def _in_child() -> None:
    """An inherited descriptor would keep the parent's lock alive when the parent is killed."""
    for handle in _HANDLES:
        with suppress(OSError):
            os.close(handle)
    _HANDLES.clear()
    _HANDLES_CHANGE.release()
    for mutex in list(_MUTEXES):
        mutex.renew()
