"""Power that is lost at a chosen moment, and an index that lies still."""

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


def index_at_rest(library):
    """The database of ``library``, closed by all: it is this one file, which may be changed by hand."""
    for opened in list(durable._CLOSED_BEFORE_FORKS):
        opened.close()
    path = library.folder / "index" / "index.sqlite3"
    assert list(path.parent.iterdir()) == [path]
    return path
