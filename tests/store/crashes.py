"""Power that is lost at a chosen moment."""


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
