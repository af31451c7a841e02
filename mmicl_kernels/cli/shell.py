"""What a shell expects of a program: silence when nobody reads on, one line for an error, any terminal."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from mmicl_kernels.cli.printing import FAILED, complain

CLOSED_PIPE, INTERRUPTED = 128 + 13, 128 + 2  # exit codes of who dies of SIGPIPE and of SIGINT


def guarded(command: Callable[[], int], is_program: bool) -> int:
    """The exit code of ``command``, whatever becomes of its output, and of Ctrl-C if it is the program."""
    code = FAILED
    try:
        for stream in _streams():
            if hasattr(stream, "reconfigure"):  # é on a terminal of ASCII is \xe9, not an error
                stream.reconfigure(errors="backslashreplace")
        try:
            return command()
        finally:
            for stream in _streams():
                stream.flush()  # or the interpreter would, when nobody can catch the error any more
    except KeyboardInterrupt:
        if not is_program:
            raise
        code = INTERRUPTED
    except BrokenPipeError:
        code = CLOSED_PIPE
    except OSError as error:
        with suppress(OSError):
            complain("mmicl", str(error))
    _give_up_broken_streams()
    return code


def reported(who: str, command: Callable[[], int], expected: tuple[type[Exception], ...]) -> int:
    """The exit code of ``command``; one of the ``expected`` errors is one line on stderr."""
    try:
        return command()
    except BrokenPipeError:
        raise
    except expected as error:
        complain(who, str(error))
        return FAILED


def _streams() -> list:
    """Those that were not closed before the start."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _give_up_broken_streams() -> None:
    """What they still hold goes nowhere; the interpreter would complain that it cannot write it."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
