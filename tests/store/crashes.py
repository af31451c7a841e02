"""Power that is lost at a chosen moment, processes that end, and an index that lies still."""

import json
import os

import pytest

from mmicl_kernels import durable


class Crash(BaseException):
    """Power is lost."""


class Steps:
    """Counts what touches the disk, and crashes at step ``at``: before it, in its middle, or after it.

    Tests put what :meth:`crashing` makes in the place of functions that touch the disk.
    """

    def __init__(self, at):
        self.at, self.step = at, 0

    def crashing(self, function, half=None):
        """``function``; ``half`` does half of its work."""

        def wrapped(*arguments, **named):
            self.stop()
            if half is not None and self.step + 1 == self.at:
                half(*arguments)
            self.stop()
            result = function(*arguments, **named)
            self.stop()
            return result

        return wrapped

    def stop(self):
        self.step += 1
        if self.step == self.at:
            raise Crash


def crashes(steps, at, work):
    """Whether ``work`` is cut off by ``steps(monkeypatch, at)``."""
    with pytest.MonkeyPatch.context() as patch:
        steps(patch, at)
        try:
            work()
        except Crash:
            return True
    return False


def in_child(work):
    """Run ``work`` in a forked process; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)  # no fixture, no report: those are the parent's
    return child


def told_by_child(work):
    """What ``work`` returns in a process of its own, by way of JSON."""
    ends = os.pipe()
    child = in_child(lambda: os.write(ends[1], json.dumps(work()).encode()))
    os.close(ends[1])
    with open(ends[0]) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def index_at_rest(library):
    """The database of ``library``, closed by all: it is this one file, which may be changed by hand."""
    for opened in list(durable._CLOSED_BEFORE_FORKS):
        opened.close()
    path = library.folder / "index" / "index.sqlite3"
    assert list(path.parent.iterdir()) == [path]
    return path
