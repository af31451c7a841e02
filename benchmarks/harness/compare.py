"""This tree beside another commit of the library: ``python -m benchmarks.run --op X --base REV``.

The commit is unpacked into a temporary folder, and both sides are measured by this tree's benchmarks. Each
has a process, and they take turns, round by round, so that both meet the same machine.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from tqdm import tqdm

from benchmarks.harness.case import Case
from benchmarks.harness.spec import Spec
from benchmarks.harness.tables_cuda import MIB
from benchmarks.harness.timing import Samples, take_turns

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, KERNELS = "mmicl_kernels", ("csrc", "setup.py")
HEADER = ("case", "implementation", "this ms", "base ms", "this / base", "this MiB", "base MiB")


class BaseError(Exception):
    """There is nothing to compare with; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How both sides are measured; ``threads``: 0 as torch chooses."""

    device: str
    clock: str
    threads: int
    seconds: float
    check: bool


@dataclass(frozen=True)
class Trees:
    """Folders with a library and this tree's benchmarks; ``kernels`` says which C++ kernels they have."""

    this: Path
    base: Path
    kernels: str
    environment: Mapping[str, str]


@dataclass
class Row:
    """One implementation in one case: milliseconds of both sides, round by round, and bytes at the peak."""

    ms: dict[str, list[float]] = field(default_factory=lambda: {"this": [], "base": []})
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def cells(self) -> list[str]:
        this, base = (Samples(tuple(self.ms[side])) for side in ("this", "base"))
        ratio = this.over(base)
        times = (f"{this.median:.3f}", f"{base.median:.3f}")
        memory = (f"{self.peak_bytes[side] / MIB:.2f}" for side in ("this", "base"))
        return [*times, f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})", *memory]


@dataclass
class Comparison:
    """Of one op: rows by case and implementation, what went wrong, and what there was no time for."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    errors: dict[str, None] = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)

    def table(self, title: str) -> Table:
        notes = "in brackets, what a tenth of the rounds is below and a tenth above"
        if self.left_out:
            notes += f"; left out for lack of time: {', '.join(self.left_out)}"
        shown = Table(title=title, caption=notes)
        for index, column in enumerate(HEADER):
            shown.add_column(column, justify="left" if index < 2 else "right")
        for key, row in self.rows.items():
            shown.add_row(*key, *row.cells())
        return shown


@contextmanager
def unpacked(revision: str, device: str) -> Iterator[Trees]:
    """This tree and that of a commit, which is gone afterwards.

    Raises:
        BaseError: this is no git checkout, it has no such commit, or its C++ kernels do not compile.
    """
    if not (ROOT / ".git").exists():
        raise BaseError(f"--base needs a git checkout, and {ROOT} is none")
    try:
        commit = _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except BaseError as error:
        raise BaseError(f"--base is {revision!r}, expected a commit of this repository: {error}") from error
    archive = _git("archive", "--format=tar", commit, "--", ".", ":!benchmarks", ":!tests")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(base, filter="data")
        (base / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
        yield Trees(ROOT, base, *_give_kernels(base, commit, device))


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except OSError as error:
        raise BaseError(f"--base needs git: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BaseError(error.stderr.decode().strip()) from error


def _give_kernels(base: Path, commit: str, device: str) -> tuple[str, dict[str, str]]:
    """Copy or build the C++ kernels of the base: what is to be said, and the environment of both sides."""
    # Threads that spin while their process waits for its turn would take the other's cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    libraries = list((ROOT / PACKAGE).glob("*.so"))
    if device != "cpu":
        return "C++ kernels take no part", environment
    if not libraries or environment.get("MMICL_DISABLE_EXTENSION") == "1":
        return "both without C++ kernels", environment | {"MMICL_DISABLE_EXTENSION": "1"}
    changed = _git("diff", "--name-only", commit, "--", *KERNELS)
    if not changed and not _git("ls-files", "--others", "--exclude-standard", "--", *KERNELS):
        for library in libraries:
            shutil.copy(library, base / PACKAGE)
        return "both with this tree's C++ kernels: their source is the same", environment
    print(f"building the C++ kernels of {commit}", file=sys.stderr, flush=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    required = environment | {"MMICL_REQUIRE_EXTENSION": "1"}
    built = subprocess.run(command, cwd=base, env=required, capture_output=True, text=True)
    if built.returncode != 0:
        raise BaseError(f"the C++ kernels of {commit} do not compile:\n{built.stdout}{built.stderr}")
    return "each with its own C++ kernels: their source differs", environment


class Side:
    """A process that measures one side of an op; see side.py."""

    def __init__(self, name: str, folder: Path, op: str, trees: Trees, settings: Settings) -> None:
        self.name = name
        words = (op, settings.device, settings.clock, str(settings.threads))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.side", *words],
            cwd=folder,
            env=trees.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt is this process's matter, which ends that one
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def ask(self, **request: object) -> dict | float:
        """
        Raises:
            BaseError: the process has ended; what it said is on stderr.
        """
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BaseError(f"the process of {self.name} ended with status {self.process.wait()}")
        return json.loads(line)


def compare_op(
    spec: Spec, cases: Sequence[Case], trees: Trees, settings: Settings, runs: int, deadline: float
) -> Comparison:
    """Both sides of one op, in new processes for every run. An implementation must be right on both."""
    comparison = Comparison()
    for _ in range(runs):
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(Side(name, folder, spec.name, trees, settings))
                for name, folder in (("this", trees.this), ("base", trees.base))
            }
            for case in tqdm(cases, desc=spec.name, unit="case", disable=None):
                if time.monotonic() >= deadline:
                    comparison.left_out[case.label] = None
                else:
                    _compare_case(comparison, case, sides, settings)
    return comparison


def _compare_case(comparison: Comparison, case: Case, sides: Mapping[str, Side], settings: Settings) -> None:
    ready = {name: side.ask(case=asdict(case), check=settings.check) for name, side in sides.items()}
    for name, answer in ready.items():
        for impl, reason in answer["errors"].items():
            comparison.errors[f"{name} {impl}, {case.label}: {reason}"] = None
    impls = [x for x in ready["this"]["peak_bytes"] if x in ready["base"]["peak_bytes"]]
    turns = [(name, impl) for impl in impls for name in sides]
    if not turns:
        return
    times = take_turns(turns, lambda turn: sides[turn[0]].ask(sample=turn[1]), settings.seconds, case.label)
    for (name, impl), ms in times.items():
        row = comparison.rows.setdefault((case.label, impl), Row())
        row.ms[name] += ms
        row.peak_bytes[name] = ready[name]["peak_bytes"][impl]
