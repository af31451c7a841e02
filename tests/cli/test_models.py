"""`--import`: a module that registers the classes of a model that transformers does not have."""

import argparse
import sys

import pytest

from mmicl_kernels.cli import main
from mmicl_kernels.cli.models import add_import, import_modules


def options(*given):
    parser = argparse.ArgumentParser()
    add_import(parser)
    return parser.parse_args(given)


def test_modules_of_the_current_folder_are_imported_in_order(tmp_path, monkeypatch):
    for name in ("first_of_two", "second_of_two"):
        (tmp_path / f"{name}.py").write_text("import sys\nREGISTERED = len(sys.modules)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x != ""])
    import_modules(options("--import", "first_of_two", "--import", "second_of_two"))
    assert sys.modules["first_of_two"].REGISTERED < sys.modules["second_of_two"].REGISTERED
    for name in ("first_of_two", "second_of_two"):
        monkeypatch.delitem(sys.modules, name)


def test_without_it_the_path_is_left_alone(monkeypatch):
    before = [x for x in sys.path if x != ""]
    monkeypatch.setattr(sys, "path", list(before))
    import_modules(options())
    assert sys.path == before


@pytest.mark.parametrize("name", ["a/b.py", ".mine", "mine.py.", ""])
def test_what_is_no_name_of_a_module(name):
    with pytest.raises(ImportError, match="expected a module's name"):
        import_modules(options("--import", name))


@pytest.mark.parametrize("text", ["raise RuntimeError('no luck')", "def ("])
def test_a_module_that_cannot_be_imported(text, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ImportError, match="--import broken_module: (RuntimeError: no luck|SyntaxError: )"):
        import_modules(options("--import", "broken_module"))


@pytest.mark.parametrize("command", ["train", "eval", "bank"])
def test_a_module_that_is_not_there_is_one_line(command, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"images": [], "text": "a", "answer": "b"}\n')
    given = {
        "train": ["train", "--method", "live", "--out", str(tmp_path / "out")],
        "eval": ["eval"],
        "bank": ["bank", "build", str(tmp_path / "bank"), "--adapter", str(tmp_path)],
    }[command]
    common = ["--import", "no_such_module", "--model", str(tmp_path), "--data", str(data)]
    assert main([*given, *common]) != 0
    assert "No module named 'no_such_module'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "bank").exists()
