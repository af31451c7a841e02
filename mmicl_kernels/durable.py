"""Files that survive a crash: what saving an adapter, libraries and banks have in common.

They are written, waited for and put in place. One process writes at a time, and one thread of it; a forked
child holds no lock. An error of the file system is never taken for something else: what could not be
read is not damaged, what could not be looked at is not missing.
"""

import errno
import os
import secrets
import shutil
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what is stored can be read there, not written
    fcntl = None

# What is answered where a folder cannot be opened, or not be waited for: by CIFS, FUSE, Windows.
NO_FOLDER_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,
    errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR,
}  # fmt: skip
NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


def append(path: Path, data: bytes) -> None:
    """Append ``data`` to the file, and wait until the disk has it."""
    with open(path, "ab") as file:
        file.write(data)
        flush(file)


def flush(file: Any) -> None:
    """Wait until the disk has what was written to ``file``."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in ``folder``, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Files beside ``paths``, of one folder, that take their places when the disk has all of them, at the end
    of the block. After an error they vanish and what was in their places is there, all of it.
    """
    temporaries = [path.parent / f"{path.name}.{secrets.token_hex(8)}" for path in paths]
    try:
        for temporary in temporaries:
            temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporaries[0].stat().st_mode)  # 0666 less the umask
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "r+b") as file:
                flush(file)
            temporary.chmod(mode)  # safetensors puts a file of mode 0600 in its place
        _exchange(temporaries, paths)
        sync_folder(paths[0].parent)
    except BaseException:
        clear_away(temporaries)
        raise


def _exchange(temporaries: Sequence[Path], paths: Sequence[Path]) -> None:
    """Each temporary file in the place of its path; where one cannot be, all are as they were."""
    before = [path.parent / f"{path.name}.{secrets.token_hex(8)}" for path in paths[:-1]]
    moved: list[tuple[Path, Path]] = []
    try:
        for kept, path in zip(before, paths, strict=False):
            _keep(path, kept)
        for i, (temporary, path) in enumerate(zip(temporaries, paths, strict=True)):
            temporary.replace(path)
            moved += [(before[i], path)] if i < len(before) else []
    except BaseException:
        for kept, path in moved:
            kept.replace(path) if is_file(kept) else path.unlink()
        raise
    finally:
        clear_away(kept for kept in before if is_file(kept))


def _keep(path: Path, kept: Path) -> None:
    """``kept`` is the file at ``path`` under another name, if there is one."""
    if is_file(path):
        try:
            os.link(path, kept)
        except OSError:  # a file system without links
            shutil.copy2(path, kept)


def clear_away(leftovers: Iterable[Path]) -> None:
    """Remove what an interrupted writer left. What cannot be removed stays, and is in nobody's way."""
    for path in leftovers:
        with suppress(OSError):
            path.unlink()


def is_file(path: Path) -> bool:
    """Whether ``path`` leads to a regular file. Raises OSError where that cannot be told."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether ``path`` leads to a folder. Raises OSError where that cannot be told."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """0 where nothing is. Not ``Path.exists``: which errors it hides depends on Python's version."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in NOTHING_THERE:
            return 0
        raise


# Held by who forks, and by who changes or opens what a child must not get half changed, or not get at all.
no_fork = threading.RLock()
_LOCK_FILES: set[int] = set()  # descriptors
_CLOSED_BEFORE_FORKS: "weakref.WeakSet[Any]" = weakref.WeakSet()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """The one writer's turn, by an advisory lock that the kernel takes from a process that dies.

    Raises:
        BlockingIOError: another has it, and this one does not ``wait``. OSError: there are no locks here.
    """
    if fcntl is None:
        raise OSError("writing needs flock, which this platform lacks; reading does not")
    owner = os.getpid()
    with no_fork:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
        _LOCK_FILES.add(handle)
    try:
        _flock(handle, path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            # Closing alone would leave it locked while a process lives that C code forked meanwhile. To a
            # child that comes by here neither the lock nor, any more, the descriptor belongs.
            if os.getpid() == owner:
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        if os.getpid() == owner:
            with no_fork:
                _LOCK_FILES.discard(handle)
                os.close(handle)


def _flock(handle: int, path: Path, operation: int) -> None:
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        reason = "writing needs flock, which this file system lacks; reading does not"
        raise OSError(error.errno, reason, str(path)) from error


def close_before_forks(opened: Any) -> None:
    """Have ``opened.close()`` called before this process forks, not while another thread has ``no_fork``."""
    with no_fork:
        _CLOSED_BEFORE_FORKS.add(opened)


def _before_fork() -> None:
    no_fork.acquire()
    for opened in _CLOSED_BEFORE_FORKS:
        opened.close()


def _in_child() -> None:
    """An inherited descriptor would keep the parent's lock alive when the parent is killed."""
    for handle in _LOCK_FILES:
        with suppress(OSError):
            os.close(handle)
    _LOCK_FILES.clear()
    no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=no_fork.release, after_in_child=_in_child)
