"""The README says what works: its Python runs, its commands exist, its files are there."""

import json
import re
from pathlib import Path

import pytest
import torch

from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.support.ten_lines import prepare, shortened

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ten_lines_run(tmp_path, monkeypatch, capsys):
    """In a folder of the reader's own; test_installed.py runs them from a wheel, with real tokenizers."""
    pytest.importorskip("accelerate")
    prepare(tmp_path, tiny_model("llava-llama"), tiny_processor("llava", chat=True), count=9)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(shortened(BLOCKS[0]), "README block 0", "exec"), names)
    written = names["mk"].load("adapters/mine", names["model"])
    for (name, x), y in zip(written.named_parameters(), names["adapter"].parameters(), strict=True):
        assert torch.equal(x, y), name
    table = capsys.readouterr().out
    assert all(re.search(rf"^\W*{row}\b", table, re.MULTILINE) for row in ("zero-shot", "8-shot", "mine"))
    assert "gap" in table


def test_op_runs():
    names: dict = {}
    exec(compile(BLOCKS[1], "README block 1", "exec"), names)
    assert names["out"].shape == names["q"].shape and names["out"].isfinite().all()


def test_two_python_blocks():
    assert len(BLOCKS) == 2


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make (\w+)", README))
    assert {"demo", "test", "bench", "lint", "gpu"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is not in the Makefile"


def test_links_and_modules_exist():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link.partition("#")[0]).is_file(), link
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_tables_are_those_of_the_committed_results():
    from benchmarks import report
    from benchmarks.e2e import report as e2e_report
    from benchmarks.experiments.digits import report as digits_report
    from benchmarks.experiments.smolvl import report as smolvl_report

    real = smolvl_report.tables()
    tables = digits_report.tables() | real
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        if path.name == "e2e.json":
            tables["e2e"] = e2e_report.markdown(json.loads(path.read_text()))
        elif path.name not in ("demo.json", "library_search.json", "model.json", "shots.json"):
            tables |= report.tables_of(path)
    for text in (README, (ROOT / "docs" / "speed.md").read_text()):
        named = set(re.findall(r"<!-- table: ([\w-]+) -->", text))
        assert named and named <= tables.keys()
        assert report.fill_tables(text, tables) == text
    own = smolvl_report.READMES[1].read_text()
    assert report.fill_tables(own, real) == own
