"""`mmicl env` reports from any installation; `mmicl demo` runs in a checkout and says so elsewhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmicl_kernels.cli import demo

ROOT = Path(__file__).parents[2]


def mmicl(*arguments, cwd=ROOT, path=ROOT, before=""):
    """Run the command in a fresh interpreter, the package imported from ``path``."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{before}\n"
    code += f"from mmicl_kernels.cli import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_env_reports_versions():
    import torch

    result = mmicl("env")
    assert result.returncode == 0
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["python"] == sys.version.split()[0]


def test_env_survives_a_broken_installation():
    broken = (
        "import importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'triton', 'transformers'):\n"
        "            raise RuntimeError('undefined symbol')\n"
        "sys.meta_path.insert(0, Broken())"
    )
    result = mmicl("env", before=broken)
    assert result.returncode == 0, result.stderr
    assert "cuda" in result.stdout and "broken: RuntimeError: undefined symbol" in result.stdout
    assert sys.version.split()[0] in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bank", "search", "x"], "one of the arguments --text --like is required"),
        (["library", "list"], "no library given"),
    ],
)
def test_parsers_need_no_torch(arguments, message, monkeypatch):
    monkeypatch.delenv("MMICL_LIBRARY", raising=False)
    result = mmicl(*arguments, before="for name in ('torch', 'numpy', 'rich'): sys.modules[name] = None")
    assert result.returncode == 2 and message in result.stderr


def test_demo_outside_of_a_checkout(tmp_path):
    shutil.copytree(ROOT / "mmicl_kernels", tmp_path / "mmicl_kernels")
    result = mmicl("demo", cwd=tmp_path, path=tmp_path)
    assert result.returncode == 2
    assert "needs a checkout" in result.stderr


def test_demo_without_the_real_model(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(demo.WORLDS, "smolvl", ("no_such_package",))
    options = {"task": "weather", "seed": 0, "out": str(tmp_path), "quick": True}
    assert demo.run(world="smolvl", **options) == 2
    assert "smolvl needs no_such_package: `make demo` downloads it" in capsys.readouterr().err
    assert demo.run(world=None, **options) == 2
    shown = capsys.readouterr()
    assert "smolvl needs no_such_package, not installed: showing digits instead" in shown.out
    assert "expected one of digit" in shown.err


def test_demo_unknown_task(tmp_path):
    result = mmicl("demo", "--world", "digits", "--task", "weather", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "'weather'" in result.stderr and "digit" in result.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_quick_demo_writes_table_and_plot(tmp_path):
    result = mmicl("demo", "--world", "digits", "--quick", "--task", "ink", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "demo.json").read_text())["rows"]}
    shots = [f"{n}-shot" for n in (1, 4, 8, 16)]
    vectors = ["MimIC, published", "MimIC, ours", "LIVE", "M2IV", "Prompt tuning", "M2IV + style"]
    assert list(rows) == ["zero-shot", *shots, *vectors, *(f"AIM, {x}" for x in shots)]
    assert rows["AIM, 8-shot"]["prompt_tokens"] == rows["zero-shot"]["prompt_tokens"] + 8 * 2
    assert rows["MimIC, ours"]["prompt_tokens"] == rows["zero-shot"]["prompt_tokens"]
    assert rows["8-shot"]["accuracy"] > rows["zero-shot"]["accuracy"]
    assert rows["16-shot"]["attention_peak_bytes"] > rows["zero-shot"]["attention_peak_bytes"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert name in result.stdout


@pytest.mark.slow
def test_quick_demo_of_the_real_model(tmp_path):
    result = mmicl("demo", "--world", "smolvl", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "demo.json").read_text())["rows"]}
    adapted = ["MimIC", "answers-only", "LIVE", "M2IV", "HiFICL", "STAVE"]
    inserted = ["AIM, 4 fused", "HiFICL", "prompt-tuning", "STAVE"]
    assert list(rows) == ["zero-shot", "4-shot", *adapted[:4], *inserted]
    zero, four = rows["zero-shot"], rows["4-shot"]
    assert four["prompt_tokens"] > 4 * 25 + zero["prompt_tokens"]
    assert zero["prompt_tokens"] < rows["AIM, 4 fused"]["prompt_tokens"] < four["prompt_tokens"]
    assert rows["prompt-tuning"]["prompt_tokens"] == zero["prompt_tokens"] + 20
    assert four["peak_bytes"] > zero["peak_bytes"]
    for name in adapted:
        assert rows[name]["prompt_tokens"] == zero["prompt_tokens"]
        assert rows[name]["accuracy"] > zero["accuracy"]  # those that are shipped
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    table, _, _ = result.stdout.partition("first, further")
    assert max(map(len, table.splitlines())) <= 100
    for name in rows:
        assert name in result.stdout
