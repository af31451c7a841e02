"""Every command beside a shell: closed pipes and streams, ASCII, folders of others, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels import cli
from mmicl_kernels.cli import main, support
from mmicl_kernels.methods import AIMAdapter, AIMConfig, Backbone, LIVEAdapter, LIVEConfig

BACKBONE = Backbone("M", "m", "t", 4, "org/model", "r1", {0: (2, 2)}, (1.0, 2.0))
PLACES = {"LIBRARY": "caf\u00e9", "BANK": "bank", "NEW": "new", "TRAINED": "trained"}
COMMANDS = {
    "help": ["--help"],
    "env": ["env"],
    "support": ["support"],
    "support --markdown": ["support", "--markdown"],
    "bank info": ["bank", "info", "BANK"],
    "bank info --json": ["bank", "info", "BANK", "--json"],
    "bank search": ["bank", "search", "BANK", "--text", ""],
    "bank verify": ["bank", "verify", "BANK"],
    "library list": ["library", "list", "--library", "LIBRARY"],
    "library list --json": ["library", "list", "--library", "LIBRARY", "--json"],
    "library show": ["library", "show", "--library", "LIBRARY", "naïve"],
    "library search": ["library", "search", "--library", "LIBRARY", "naïve"],
    "library verify": ["library", "verify", "--library", "LIBRARY"],
    "library add": ["library", "add", "--library", "LIBRARY", "more", "TRAINED", "--overwrite"],
    "library combine": ["library", "combine", "--library", "LIBRARY", "sum", "naïve=2", "--overwrite"],
    "library export": ["library", "export", "--library", "LIBRARY", "naïve", "NEW"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("shell")
    places = {name: root / part for name, part in PLACES.items()}
    adapter = LIVEAdapter(LIVEConfig(), BACKBONE)
    adapter.save_pretrained(places["TRAINED"])
    mk.VLibrary(places["LIBRARY"]).put("naïve", adapter, tags=["é"])
    bank = mk.DemonstrationBank.create(places["BANK"], AIMAdapter(AIMConfig(), BACKBONE))
    bank.add([mk.Demonstration((), "where is the café?", "there")], [torch.ones(1, 4)])
    return places


def arguments_of(command, places):
    return [str(places.get(x, x)) for x in COMMANDS[command]]


def in_child(arguments, stdout, stderr, encoding="utf-8", before=lambda: None, unbuffered=False):
    """Exit code of a forked process that runs a command with these descriptors (None: closed)."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for number, name, target in ((1, "stdout", stdout), (2, "stderr", stderr)):
                stream = None
                if target is not None:
                    os.dup2(target, number)
                    stream = open(number, "w", encoding=encoding, closefd=False)  # noqa: SIM115
                    stream.reconfigure(line_buffering=unbuffered)
                setattr(sys, name, stream)
            before()
            try:
                code = main(arguments)
            except SystemExit as stop:
                code = stop.code or 0
            for stream in (sys.stdout, sys.stderr):  # as the interpreter does at its end
                if stream is not None:
                    stream.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def written(arguments, tmp_path, **options):
    """Exit code, output and errors of a command in a forked process."""
    with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
        code = in_child(arguments, out.fileno(), err.fileno(), **options)
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_pipe_is_silent(places, tmp_path, command, both, unbuffered):
    writer = closed_pipe()
    with open(tmp_path / "err", "w+") as err:
        errors = writer if both else err.fileno()
        code = in_child(arguments_of(command, places), writer, errors, unbuffered=unbuffered)
        os.close(writer)
        err.seek(0)
        assert (code, err.read()) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("command", [x for x in COMMANDS if "add" not in x and "env" not in x])
def test_closed_streams(places, tmp_path, command):
    """``>&-``: no stream at all; what was asked for is done, and nothing of an error goes to stdout."""
    assert in_child(arguments_of(command, places), None, None) == 0
    with open(tmp_path / "out", "w+") as out:
        assert in_child(["bank", "info", "/nowhere"], out.fileno(), None) == 1
        out.seek(0)
        assert out.read() == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["support", "library list"])
def test_a_whole_process_with_a_closed_pipe(places, command, unbuffered):
    """The interpreter has nothing to add when it ends."""
    writer = closed_pipe()
    result = subprocess.run(
        [sys.executable, "-m", "mmicl_kernels.cli", *arguments_of(command, places)],
        stdout=writer, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_head_gets_its_line(unbuffered):
    """The first line is written, then the pipe is closed."""
    command = f"{sys.executable} -m mmicl_kernels.cli support | head -1"
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert len(result.stdout.splitlines()) == 1 and "\t" in result.stdout and result.stderr == ""


def test_a_full_disk_behind_stdout(places, tmp_path):
    """One line and exit code 1, for errors that nothing was prepared for."""
    with open("/dev/full", "w") as full, open(tmp_path / "err", "w+") as err:
        assert in_child(["support"], full.fileno(), err.fileno()) == 1
        err.seek(0)
        assert err.read() == "mmicl: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_ascii_terminal(places, tmp_path, command):
    """All is shown, what is not ASCII as an escape."""
    code, text, errors = written(arguments_of(command, places), tmp_path, encoding="ascii")
    assert (code, errors) == (0, "") and text.isascii() and text
    if "bank search" in command:
        assert text == "0\t1\twhere is the caf\\xe9?\tthere\n"
    if command == "library show":
        assert "name\tna\\xefve\n" in text and "file\t" in text and "caf\\xe9/entries/na-ve-" in text


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=str,
)
@pytest.mark.parametrize("command", ["support", "library list"])
def test_a_whole_process_in_ascii(places, command, variables):
    """What it reads itself is UTF-8 whatever the locale is, and a folder's name is taken as it is."""
    result = subprocess.run(
        [sys.executable, "-m", "mmicl_kernels.cli", *arguments_of(command, places)],
        capture_output=True, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    expected = "na\\xefve\tlive\t\t\\xe9\t" if command == "library list" else "blip2\t"
    assert [line for line in result.stdout.splitlines() if line.startswith(expected)]


def test_a_folder_that_is_not_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    mk.VLibrary(folder).put("a", LIVEAdapter(LIVEConfig(), BACKBONE))
    code, text, errors = written(["library", "show", "--library", folder, "a"], tmp_path)
    assert (code, errors) == (0, "") and "/caf?/entries/a-" in text
    missing = written(["library", "show", "--library", folder, "b"], tmp_path)
    assert missing == (1, "", f"mmicl library: no entry 'b' in {folder[:-1]}?\n")


FOLDER_COMMANDS = [x for x in COMMANDS if x.startswith(("bank", "library")) and "json" not in x]


@pytest.mark.parametrize("kind", ["forbidden", "missing", "a file", "below a file"])
@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_folders_that_cannot_be_used(places, tmp_path, command, kind):
    """One line on stderr and exit code 1. Forbidden to another user, because root may do anything."""
    root = tmp_path / "root"
    root.mkdir()
    target = {"missing": root / "x", "a file": root / "x", "below a file": root / "x" / "y"}.get(kind, root)
    if kind.endswith("a file"):
        (root / "x").write_text("")

    def before():
        if kind == "forbidden":

            def denied(path, *args, **kwargs):
                if os.fspath(path).startswith(str(root)) and os.fspath(path) != str(root):
                    raise PermissionError(13, "Permission denied", os.fspath(path))
                return stat(path, *args, **kwargs)

            stat, os.stat = os.stat, denied

    arguments = [str({**places, "LIBRARY": target, "BANK": target}.get(x, x)) for x in COMMANDS[command]]
    if kind == "missing" and command == "library add":
        pytest.skip("makes the library")
    code, text, line = written(arguments, tmp_path, before=before)
    assert (code, text) == (1, "")
    assert line.startswith("mmicl ") and line.count("\n") == 1 and line[:-1].isprintable()


def test_interrupted(monkeypatch, capsys):
    """Silence, and the exit code of who dies of Ctrl-C; who calls it as a function gets the exception."""

    def interrupt(parsed):
        print("begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(support, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["mmicl", "support"])
    assert cli.main() == 128 + signal.SIGINT
    assert capsys.readouterr() == ("begun\n", "")
    with pytest.raises(KeyboardInterrupt):
        cli.main(["support"])


def test_interrupted_by_a_signal(places):
    """A whole process, that waits for a lock."""
    fcntl = pytest.importorskip("fcntl")
    with open(places["LIBRARY"] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A process that was begun in the background of a shell does not hear the signal.
        code = "import signal, sys, mmicl_kernels as mk\nfrom mmicl_kernels.cli import main\nmk.VLibrary\n"
        code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += f"sys.argv[1:] = {arguments_of('library verify', places)!r}\n"
        code += "print('ready', flush=True)\nsys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        with open(f"/proc/{process.pid}/wchan") as wchan:
            end = time.monotonic() + 30
            while "lock" not in wchan.read() and process.poll() is None and time.monotonic() < end:
                wchan.seek(0)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert process.stderr.read() == ""
