"""The README says what works: its Python runs, its commands exist, its files are there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    if number == 0:
        words = re.findall(r"'(\w+)'", capsys.readouterr().out)
        truth = names["data"].decode(names["question"].targets)
        assert words == truth
    else:
        assert names["out"].shape == names["q"].shape


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

    tables = digits_report.tables()
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        if path.name == "e2e.json":
            tables["e2e"] = e2e_report.markdown(json.loads(path.read_text()))
        elif path.name not in ("demo.json", "library_search.json", "shots.json"):
            for result in json.loads(path.read_text()):
                tables |= report.tables(result)
    named = set(re.findall(r"<!-- table: ([\w-]+) -->", README))
    assert named and named <= tables.keys()
    assert report.fill_tables(README, tables) == README
