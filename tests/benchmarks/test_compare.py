"""This tree beside another commit, of a repository with this library and one commit."""

import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import run
from benchmarks.harness import compare
from benchmarks.harness.case import Case

ROOT = Path(__file__).parents[2]
CASE = Case(B=1, H=2, G=2, T=16, S=16, D=16, dtype="float32")
OP = "attention_shift"
ARGUMENTS = ("--op", OP, "--quick", "--threads", "1", "--base")

# At the end of mmicl_kernels/ops/__init__.py; the reference stays.
CHANGED = """
def _changed(op):
    def changed(*inputs, impl="auto"):
        return {result} if impl == "composed" else op(*inputs, impl=impl)

    return changed


attention_shift = _changed(attention_shift)
"""
LATE = CHANGED.format(result="__import__('time').sleep(0.05) or op(*inputs, impl=impl)")
WRONG = CHANGED.format(result="op(*inputs, impl=impl) * 1.5")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Where ``compare`` finds it; temporary folders are made in ``temporary`` beside it."""
    root, temporary = tmp_path / "repository", tmp_path / "temporary"
    shutil.copytree(ROOT / "mmicl_kernels", root / "mmicl_kernels", ignore=shutil.ignore_patterns("*.so"))
    (root / "benchmarks").symlink_to(ROOT / "benchmarks")
    temporary.mkdir()
    identity = ("-c", "user.name=a", "-c", "user.email=a")
    for words in (("init", "-q"), ("add", "mmicl_kernels"), (*identity, "commit", "-qm", "one")):
        subprocess.run(["git", *words], cwd=root, check=True)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    spec = run.OPS[OP]
    lineup = replace(spec.lineups["cpu"], cases=(CASE,))
    monkeypatch.setitem(run.OPS, OP, replace(spec, lineups={"cpu": lineup}))
    yield root
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, check=True).stdout
    assert not list(temporary.iterdir()) and worktrees.count(b"\n") == 1


def append(root, text):
    with (root / "mmicl_kernels" / "ops" / "__init__.py").open("a") as file:
        file.write(text)


def test_each_side_has_its_own_library(repository, monkeypatch, capsys):
    found = []
    compare_op = compare.compare_op
    monkeypatch.setattr(run, "compare_op", lambda *x: found.append(compare_op(*x)) or found[-1])
    append(repository, LATE)
    monkeypatch.setenv("COLUMNS", "200")  # or the table is cut
    assert run.main([*ARGUMENTS, "HEAD"]) == 0
    ((key, row),) = found[0].rows.items()
    assert key == (CASE.label, "composed")
    assert min(row.ms["this"]) > 50 and len(row.ms["this"]) == len(row.ms["base"])
    assert sum(row.ms["this"]) > sum(row.ms["base"])
    printed = capsys.readouterr().out
    assert "this tree beside HEAD, both without C++ kernels" in printed and "this / base" in printed


def test_a_wrong_side_gets_no_ratio(repository, capsys):
    append(repository, WRONG)
    assert run.main([*ARGUMENTS, "HEAD"]) == 1
    printed = capsys.readouterr().out
    assert f"this composed, {CASE.label}: out[0, :, 0:16]: relative error" in printed


def test_an_interrupt_leaves_no_process_and_no_folder(repository, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(*_):
        assert started[-1].poll() is started[-2].poll() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(compare, "take_turns", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.main([*ARGUMENTS, "HEAD"])
    assert all(process.poll() is not None for process in started)


def test_a_side_that_ends_is_an_error(repository, capfd):
    append(repository, "raise ImportError('no such op')\n")
    assert run.main([*ARGUMENTS, "HEAD"]) == 1
    assert "the process of this ended with status 1" in capfd.readouterr().err


def test_no_such_commit(repository, capsys):
    assert run.main([*ARGUMENTS, "nothing"]) == 1
    assert "--base is 'nothing', expected a commit of this repository" in capsys.readouterr().err


def test_no_checkout(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", repository / "mmicl_kernels")
    assert run.main([*ARGUMENTS, "HEAD"]) == 1
    assert "--base needs a git checkout, and" in capsys.readouterr().err
