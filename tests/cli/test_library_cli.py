"""`mmicl library`: every command, its exit code, its JSON, and errors of one line."""

import json
import os
import sys
from functools import partial

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods import Backbone, MimICAdapter, MimICConfig
from tests.store.vectors import BACKBONE, live


@pytest.fixture
def library(tmp_path, monkeypatch):
    library = mk.VLibrary(tmp_path / "library")
    library.put("a", live(1.0), task="vqa", tags=["x"], metrics={"accuracy": 0.5}, embedding=[1.0, 0.0])
    library.put("b", live(2.0), task="caption", tags=["x", "y"], embedding=[1.0, 1.0], record={"k": [1]})
    monkeypatch.setenv("MMICL_LIBRARY", str(library.folder))
    return library


@pytest.fixture
def mmicl(run):
    return partial(run, "library")


def test_list(library, mmicl):
    code, out, err = mmicl("list")
    assert (code, err) == (0, "")
    created = [library.entry(name).created for name in "ab"]
    assert [line.split("\t") for line in out.splitlines()] == [
        ["a", "live", "vqa", "x", "accuracy 0.5", "org/model@r1", created[0]],
        ["b", "live", "caption", "x, y", "", "org/model@r1", created[1]],
    ]
    entries = json.loads(mmicl("list", "--json")[1])
    assert [(entry["name"], entry["tags"]) for entry in entries] == [("a", ["x"]), ("b", ["x", "y"])]
    assert "score" not in entries[0]


def test_tables_on_a_terminal(library, mmicl, monkeypatch):
    library.put("[red]", live(1.0))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    out = mmicl("list")[1]
    assert "metrics" in out and "[red]" in out and "accuracy 0.5" in out and "\t" not in out
    assert "num_parameters" in mmicl("show", "a")[1]


def test_tables_without_rich(library, mmicl, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = mmicl("list")
    assert (code, err) == (0, "") and out.splitlines()[0].startswith("a\tlive\tvqa")


def test_show(library, mmicl):
    code, out, _ = mmicl("show", "b")
    facts = dict(line.split("\t") for line in out.splitlines())
    assert code == 0 and facts["task"] == "caption" and json.loads(facts["record"]) == {"k": [1]}
    assert facts["num_parameters"] == "27" and facts["file"] == str(library.path("b"))
    shown = json.loads(mmicl("show", "b", "--json")[1])
    assert shown["record"] == {"k": [1]} and shown["backbone"]["revision"] == "r1"


def test_add(library, mmicl, tmp_path):
    adapter = MimICAdapter(MimICConfig(), BACKBONE)
    adapter.save_pretrained(tmp_path / "trained")
    (tmp_path / "record.json").write_text('{"steps": 3}')
    (tmp_path / "embedding.json").write_text("[0, 2.5]")
    code, out, err = mmicl(
        "add", "new", str(tmp_path / "trained"), "--task", "t", "--tag", "p", "--tag", "q",
        "--metric", "acc=0.75", "--metric", "a=b=1e-3", "--record", str(tmp_path / "record.json"),
        "--embedding", str(tmp_path / "embedding.json"),
    )  # fmt: skip
    assert (code, err) == (0, "") and out == f"new: mimic, {adapter.num_parameters():,} parameters\n"
    entry = library.entry("new")
    assert (entry.task, entry.tags, entry.record) == ("t", ("p", "q"), {"steps": 3})
    assert entry.metrics == {"acc": 0.75, "a=b": 1e-3}
    assert library.embedding("new").tolist() == [0.0, 2.5]
    for name, x in adapter.state_dict().items():
        assert torch.equal(library.get("new").state_dict()[name], x)
    code, _, err = mmicl("add", "new", str(tmp_path / "trained"))
    assert code == 1 and "an entry 'new'; overwrite replaces it" in err
    assert mmicl("add", "new", str(tmp_path / "trained"), "--overwrite", "--json")[0] == 0
    assert library.entry("new").task is None


def test_add_makes_a_library(mmicl, tmp_path):
    live(1.0).save_pretrained(tmp_path / "trained")
    assert mmicl("add", "a", str(tmp_path / "trained"), "--library", str(tmp_path / "fresh"))[0] == 0
    assert mk.VLibrary(tmp_path / "fresh").list() == ["a"]


def test_remove(library, mmicl):
    assert mmicl("remove", "a", "b") == (0, "", "")
    assert library.list() == []
    code, out, err = mmicl("remove", "a")
    message = f"mmicl library: no entry 'a' in {library.folder}; nothing was removed\n"
    assert code == 1 and out == "" and err == message


def test_remove_is_all_or_nothing(library, mmicl):
    code, out, err = mmicl("remove", "a", "nope")
    assert code == 1 and out == "" and "no entry 'nope'" in err and "nothing was removed" in err
    assert library.list() == ["a", "b"]
    assert mmicl("remove", "a", "../b")[0] == 1 and library.list() == ["a", "b"]
    assert mmicl("remove", "b", "b") == (0, "", "") and library.list() == ["a"]
    library.put("e\u0301", live(1.0))
    assert mmicl("remove", "e\u0301", "\u00e9", "--json")[:2] == (0, '["\\u00e9"]\n')


def test_remove_of_what_is_half_there(library, mmicl):
    """An entry whose file is damaged or gone can still be removed."""
    library.path("a").write_bytes(b"")
    library.path("b").unlink()
    assert mmicl("remove", "a", "b") == (0, "", "") and mmicl("verify")[0] == 0


@pytest.mark.parametrize("option", ["--record", "--embedding"])
@pytest.mark.parametrize("content", ['{"a": 1}', '"text"', "[[1], [2]]", '["a"]', "/dev/zero", "a pipe"])
def test_add_of_what_is_no_embedding(library, mmicl, tmp_path, option, content):
    live(1.0).save_pretrained(tmp_path / "trained")
    file = tmp_path / "x.json"
    if content == "a pipe":
        os.mkfifo(file)
    elif content == "/dev/zero":
        file.symlink_to(content)
    else:
        file.write_text(content)
    code, out, err = mmicl("add", "z", str(tmp_path / "trained"), option, str(file))
    if option == "--record" and not content.startswith(("/", "a pipe")):
        assert code == 0 and library.entry("z").record == json.loads(content)
    else:
        assert code == 1 and out == "" and err.startswith("mmicl library: ") and err.count("\n") == 1
        assert "z" not in library and ("embedding" in err or "is not a regular file" in err)


def test_search(library, mmicl):
    def found(*arguments):
        return [entry["name"] for entry in json.loads(mmicl("search", "--json", *arguments)[1])]

    assert found() == ["a", "b"] and found("VQA") == ["a"] and found("nothing") == []
    assert found("--tag", "x", "--tag", "y") == ["b"] and found("--task", "caption") == ["b"]
    assert found("--method", "mimic") == [] and found("--limit", "1") == ["a"]
    assert found("--like", "b") == ["b", "a"]
    line = mmicl("search", "--like", "b", "--limit", "1")[1]
    assert line.startswith("1.0000\tb\t")
    library.put("bare", live(1.0))
    assert mmicl("search", "--like", "bare")[2] == (
        "mmicl library: 'bare' has no embedding, so nothing is like it\n"
    )


def test_combine(library, mmicl):
    code, out, err = mmicl("combine", "sum", "a=1", "b=-0.5", "--task", "both", "--tag", "made")
    assert (code, err) == (0, "") and out == "sum: live, 27 parameters\n"
    assert torch.equal(library.get("sum").layers["1"].vector, torch.full((8,), 1.0 - 0.5 * 4.0))
    entry = library.entry("sum")
    assert (entry.task, entry.tags, entry.record) == ("both", ("made",), {"combined": {"a": 1.0, "b": -0.5}})
    for weights in (["a"], ["a=x"], ["=1"], ["a=1", "a=2"]):
        code, _, err = mmicl("combine", "other", *weights)
        assert code == 1 and "expected name=number, each name once" in err
    assert mmicl("combine", "other", "a=nan")[0] == 1
    library.put("mimic", MimICAdapter(MimICConfig(), BACKBONE))
    code, _, err = mmicl("combine", "other", "mimic=1")
    assert code == 1 and "cannot be combined" in err and "other" not in library


def test_verify(library, mmicl):
    assert mmicl("verify") == (0, "2 entries, nothing damaged\n", "")
    assert mmicl("verify", "--json") == (0, "[]\n", "")
    path = library.path("a")
    path.write_bytes(path.read_bytes()[:-1])
    (library.folder / "index" / "index.sqlite3").unlink()
    code, out, err = mmicl("verify")
    assert code == 1 and err == "" and len(out.splitlines()) == 2 and path.name in out
    code, out, _ = mmicl("verify", "--repair", "--json")
    assert code == 1 and len(json.loads(out)) == 1 and path.name in out
    assert mmicl("remove", "a")[0] == 0 and mmicl("verify")[0] == 0


def test_export_and_import(library, mmicl, tmp_path):
    file = str(tmp_path / "b.safetensors")
    assert mmicl("export", "b", file) == (0, "b: live, 27 parameters\n", "")
    code, _, err = mmicl("import", file)
    assert code == 1 and "an entry 'b'" in err
    assert mmicl("import", file, "--overwrite")[0] == 0
    assert json.loads(mmicl("import", file, "--name", "c", "--json")[1])["name"] == "c"
    assert library.list() == ["a", "b", "c"]
    (tmp_path / "bad").write_bytes(b"\x80\x04K\x01.")
    code, out, err = mmicl("import", str(tmp_path / "bad"))
    assert code == 1 and out == "" and "expected an entry's file" in err and err.count("\n") == 1


def test_which_library(library, mmicl, monkeypatch, tmp_path):
    code, out, err = mmicl("list", "--library", str(tmp_path / "nowhere"))
    assert code == 1 and "does not exist" in err and not (tmp_path / "nowhere").exists()
    (tmp_path / "other").mkdir()
    assert mmicl("list", "--library", str(tmp_path / "other")) == (0, "", "")
    monkeypatch.delenv("MMICL_LIBRARY")
    code, out, err = mmicl("list")
    assert code == 2 and err == "mmicl library: no library given: use --library FOLDER or set MMICL_LIBRARY\n"


def test_usage_errors(library, mmicl):
    for arguments in ([], ["frobnicate"], ["show"], ["search", "--limit", "many"]):
        with pytest.raises(SystemExit) as stop:
            mmicl(*arguments)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "nowhere"],
        ["show", "../a"],
        ["show", "\x1b[2J"],
        ["search", "--limit", "0"],
        ["add", "x", "/nowhere"],
        ["add", "x", "/nowhere", "--record", "/nowhere"],
        ["export", "a", "/nowhere/x"],
        ["import", "/nowhere"],
        ["list", "--library", "/dev/null"],
    ],
)
def test_errors_are_one_line(library, mmicl, arguments):
    code, out, err = mmicl(*arguments)
    assert code == 1 and out == "" and err.startswith("mmicl library: ") and err.count("\n") == 1
    assert err[:-1].isprintable()


def test_damaged_entry_is_one_line(library, mmicl):
    library.path("a").write_bytes(b"")
    for command in (["show", "a"], ["list"], ["export", "a", "/tmp/x"], ["combine", "n", "a=1"]):
        code, out, err = mmicl(*command)
        assert code == 1 and out == "" and library.path("a").name in err and err.count("\n") == 1


def test_hostile_names_of_a_backbone_do_not_reach_the_terminal(library, mmicl):
    adapter = live(1.0)
    adapter.backbone = Backbone(**{**vars(BACKBONE), "name": "x\x1b[2J\ny"})
    library.put("z", adapter)
    for command in (["list"], ["show", "z"], ["search", "z"], ["show", "z", "--json"]):
        code, out, _ = mmicl(*command)
        assert code == 0 and "\x1b" not in out
    assert len(mmicl("list")[1].splitlines()) == 3
