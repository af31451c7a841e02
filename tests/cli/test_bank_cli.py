"""`mmicl bank`: every command, its exit code, its JSON, and errors of one line."""

import json
from functools import partial

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods import AIMAdapter, AIMConfig, Backbone

BACKBONE = Backbone("M", "m", "t", 4, "org/model", "r1", {0: (2, 2)}, (1.0, 2.0))
TEXTS = [
    ("What is this?", "a red cat"),
    ("How many dogs\nare here?", "2"),
    ("STRASSE", "é" + "x" * 100),
    ("", "\x1b[2Jred"),
]
TOKENS = [
    torch.tensor([[1.0, 0, 0, 0], [1, 0, 2, 0]]),
    torch.tensor([[2.0, 0, 2, 0]]),
    torch.tensor([[0.0, 1, 0, 0]] * 3),
    torch.zeros(0, 4),
]


@pytest.fixture
def bank(tmp_path):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", AIMAdapter(AIMConfig(), BACKBONE))
    bank.add([mk.Demonstration((b"image",), *texts) for texts in TEXTS], TOKENS)
    return bank


@pytest.fixture
def mmicl(run):
    return partial(run, "bank")


def test_info(bank, mmicl):
    code, out, err = mmicl("info", bank.folder)
    assert (code, err) == (0, "")
    size = sum(path.stat().st_size for path in bank.folder.iterdir())
    assert [line.split("\t") for line in out.splitlines()] == [
        ["demonstrations", "4"],
        ["tokens", "6"],
        ["longest", "3"],
        ["bytes", f"{size:,}"],
        ["dtype", "bfloat16"],
        ["hidden_size", "4"],
        ["backbone", "org/model@r1"],
        ["digest", bank.digest],
        ["prompt", bank.prompt],
    ]
    facts = json.loads(mmicl("info", bank.folder, "--json")[1])
    assert (facts["demonstrations"], facts["tokens"], facts["bytes"]) == (4, 6, size)


def test_info_of_an_empty_bank(tmp_path, mmicl):
    mk.DemonstrationBank.create(tmp_path / "empty", AIMAdapter(AIMConfig(), BACKBONE))
    facts = json.loads(mmicl("info", tmp_path / "empty", "--json")[1])
    assert (facts["demonstrations"], facts["tokens"], facts["longest"]) == (0, 0, 0)
    assert mmicl("search", tmp_path / "empty", "--text", "x") == (0, "", "")
    assert mmicl("verify", tmp_path / "empty") == (0, "0 demonstrations, nothing damaged\n", "")


def test_on_a_terminal(bank, mmicl, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    out = mmicl("info", bank.folder)[1]
    assert "demonstrations" in out and bank.digest in out and "\t" not in out
    out = mmicl("search", bank.folder, "--like", 0)[1]
    assert "cosine" in out and "How many dogs are here?" in out and "\x1b[2J" not in out


def test_search_by_words(bank, mmicl):
    def found(*arguments):
        return [row["id"] for row in json.loads(mmicl("search", bank.folder, "--json", *arguments)[1])]

    assert found("--text", "RED") == [0, 3] and found("--text", "red what") == [0]
    assert found("--text", "straße") == [2] and found("--text", "e\u0301xxx") == [2]
    assert found("--text", "dogs many") == [1] and found("--text", "nothing") == []
    assert found("--text", "") == [0, 1, 2, 3] and found("--text", "", "--limit", "2") == [0, 1]
    code, out, err = mmicl("search", bank.folder, "--text", "a")
    assert (code, err) == (0, "")
    shown = ["2", "3", "STRASSE", "é" + "x" * 58 + "…"]
    assert [line.split("\t") for line in out.splitlines()] == [
        ["0", "2", "What is this?", "a red cat"],
        ["1", "1", "How many dogs are here?", "2"],
        shown,
    ]
    assert mmicl("search", bank.folder, "--text", "[2j")[1] == "3\t0\t\t?[2Jred\n"
    row = json.loads(mmicl("search", bank.folder, "--text", "dogs", "--json")[1])[0]
    assert row == {"id": 1, "tokens": 1, "text": TEXTS[1][0], "answer": "2"}


def test_search_by_likeness(bank, mmicl):
    rows = json.loads(mmicl("search", bank.folder, "--like", 1, "--json")[1])
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [row["cosine"] for row in rows] == pytest.approx([1, 1, 0], abs=2.0**-50)
    line = mmicl("search", bank.folder, "--like", 2, "--limit", 1)[1]
    assert line.startswith("1.0000\t2\t3\tSTRASSE\t")
    code, out, err = mmicl("search", bank.folder, "--like", 3)
    assert (code, out) == (1, "")
    assert err == "mmicl bank: the mean token of demonstration 3 is zero, so nothing is like it\n"


def test_verify(bank, mmicl):
    assert mmicl("verify", bank.folder) == (0, "4 demonstrations, nothing damaged\n", "")
    assert mmicl("verify", bank.folder, "--json") == (0, "[]\n", "")
    data = bytearray((bank.folder / "rows.bin").read_bytes())
    data[2 * 4 * 2] ^= 1  # the second demonstration's
    (bank.folder / "rows.bin").write_bytes(data)
    code, out, err = mmicl("verify", bank.folder)
    assert (code, err) == (1, "") and out.endswith("rows.bin: the rows of demonstration 1 are damaged\n")
    assert len(json.loads(mmicl("verify", bank.folder, "--json")[1])) == 1
    (bank.folder / "rows.bin").write_bytes(b"")
    code, out, err = mmicl("verify", bank.folder)
    assert code == 1 and "rows.bin has 0 bytes" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "/nowhere"],
        ["info", "/dev/null"],
        ["verify", "/"],
        ["search", "BANK", "--like", "4"],
        ["search", "BANK", "--like", "-1"],
        ["search", "BANK", "--text", "a", "--limit", "0"],
        ["search", "BANK", "--like", "0", "--limit", "-3"],
    ],
)
def test_errors_are_one_line(bank, mmicl, arguments):
    code, out, err = mmicl(*(bank.folder if x == "BANK" else x for x in arguments))
    assert code == 1 and out == "" and err.startswith("mmicl bank: ") and err.count("\n") == 1
    assert err[:-1].isprintable()


def test_usage_errors(bank, mmicl):
    search = ["search", str(bank.folder)]
    both, word = [*search, "--text", "a", "--like", "1"], [*search, "--like", "x"]
    for arguments in ([], ["info"], ["frobnicate", str(bank.folder)], search, both, word):
        with pytest.raises(SystemExit) as stop:
            mmicl(*arguments)
        assert stop.value.code == 2
