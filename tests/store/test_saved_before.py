"""What was saved before is read: ``fixtures`` are of the last version whose index was a log."""

import shutil
from pathlib import Path

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.store import read_adapter
from mmicl_kernels.store.index import Index
from tests.store.banks import records_of, tokens
from tests.store.crashes import Crash
from tests.store.vectors import BACKBONE, assert_same

FIXTURES = Path(__file__).parent / "fixtures"
ADAPTERS = {
    "live": (mk.LIVEAdapter, mk.LIVEConfig()),
    "m2iv": (mk.M2IVAdapter, mk.M2IVConfig()),
    "mimic": (mk.MimICAdapter, mk.MimICConfig(ffn_shift=True)),
    "aim": (mk.AIMAdapter, mk.AIMConfig()),
}


def adapter(method, value):
    """As the fixtures have it, with numbers of its ``value``."""
    adapter_class, config = ADAPTERS[method]
    made = adapter_class(config, BACKBONE)
    with torch.no_grad():
        for number, x in enumerate(made.parameters()):
            x.copy_((torch.arange(x.numel()) + value + number).view(x.shape) / 8)
    return made


@pytest.fixture
def folder(tmp_path):
    """A library in which one entry was removed and one replaced."""
    shutil.copytree(FIXTURES / "library", tmp_path / "library")
    (tmp_path / "library" / "tmp").mkdir(exist_ok=True)  # git keeps no empty folders
    return tmp_path / "library"


def assert_is_all_there(library):
    assert library.list() == ["a", "b", "bare é", "replaced"] and library.verify() == []
    found = library.search(embedding=[1.0, 0.5, 0.0])
    assert [x.name for x in found] == ["b", "a", "replaced"]
    # As the version found that wrote it.
    assert [x.score for x in found] == [0.9341987329938276, 0.7999999999999999, 0.3162277660168379]
    assert [x.name for x in library.search(tags=["y"])] == ["b", "bare é"] and library.search("old") == []
    assert library.entry("b").metrics == {"accuracy": 0.5} and library.entry("b").record == {"steps": 3}
    assert library.embedding("bare é") is None
    stored = {"a": ("live", 1), "b": ("m2iv", 2), "replaced": ("mimic", 6), "bare é": ("live", 5)}
    for name, (method, value) in stored.items():
        assert_same(library.get(name, BACKBONE), adapter(method, value))


@pytest.mark.parametrize("first", ["list", "search", "verify", "put", "remove", "rebuild"])
def test_a_library_is_taken_over_once(folder, first, monkeypatch):
    renewed, renew = [], Index._renew
    monkeypatch.setattr(Index, "_renew", lambda index: renewed.append(index) or renew(index))
    library = mk.VLibrary(folder)
    library.put("gone", adapter("live", 1)) if first == "remove" else None
    {
        "put": lambda: library.put("a", library.get("a"), task="vqa", tags=["x"],
                                   embedding=library.embedding("a"), overwrite=True),
        "remove": lambda: library.remove("gone"),
    }.get(first, lambda: getattr(library, first)())()  # fmt: skip
    for reader in (library, mk.VLibrary(folder)):
        assert_is_all_there(reader)
    assert len(renewed) == 1
    library._index.close()
    assert not (folder / "index" / "log.jsonl").exists()
    library.put("c", adapter("live", 3))
    assert [x.name.split("-")[0] for x in (folder / "index").iterdir() if x.suffix == ".f32"] == []


def test_a_crash_while_a_library_is_taken_over(folder, monkeypatch):
    for at in range(9):
        copy = folder.parent / str(at)
        shutil.copytree(folder, copy)
        steps = iter(range(at))
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink"):
                do = getattr(Path, name)

                def crashing(*args, do=do, steps=steps, **named):
                    if next(steps, None) is None:
                        raise Crash
                    return do(*args, **named)

                patch.setattr(Path, name, crashing)
            try:
                mk.VLibrary(copy).list()
                break
            except Crash:
                pass
        assert_is_all_there(mk.VLibrary(copy))
    assert 1 < at < 9


def test_what_an_older_version_writes_meanwhile_is_found(folder):
    """It finds no log, writes one, and removes the database: then it is taken over again."""
    library = mk.VLibrary(folder)
    assert_is_all_there(library)
    log = (FIXTURES / "library" / "index" / "log.jsonl").read_bytes()
    library.path("a").unlink()
    (folder / "index" / "log.jsonl").write_bytes(log)
    (folder / "index" / "index.sqlite3").unlink()
    assert library.list() == ["b", "bare é", "replaced"] and library.verify() == []
    (folder / "index" / "log.jsonl").write_bytes(log)  # killed before it removed the database
    library.path("b").unlink()
    assert library.list() == ["bare é", "replaced"] and library.verify() == []


def test_a_bank(tmp_path):
    shutil.copytree(FIXTURES / "bank", tmp_path / "bank")
    bank = mk.DemonstrationBank(tmp_path / "bank")
    assert len(bank) == 4 and bank.dtype == torch.bfloat16 and bank.prompt == "plain" and bank.verify() == []
    for id in range(4):
        assert torch.equal(bank.tokens(id), tokens(id).bfloat16())
        assert bank.text(id) == (f"question {id}", f"answer {id}")
    assert [record.call for record in records_of(bank.folder)] == [0, 0, 0, 3]


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter(method):
    assert_same(read_adapter(FIXTURES / "adapters" / method), adapter(method, 7))
