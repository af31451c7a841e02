"""The hub, without a network: what is asked of it and when, and its cache, where files are links."""

import hashlib
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.base import CONFIG_FILE, TENSORS_FILE
from mmicl_kernels.store import adapter_folder, read_adapter
from mmicl_kernels.testing.tiny_models import tiny_model
from tests.store.banks import add, assert_holds, demonstration, filled
from tests.store.crashes import in_child, index_at_rest
from tests.store.vectors import assert_same, library_of_three, live

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory without any folders."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.fixture
def hub(monkeypatch, tmp_path, elsewhere):
    """A huggingface_hub with one repository, ``me/shift``, that writes down what it is asked."""
    asked = []
    live(1.0).save_pretrained(tmp_path / "hub")

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision, sorted(allow_patterns)))
        if repo_id != "me/shift":
            raise ConnectionError("cannot\nreach the hub")
        return str(tmp_path / "hub")

    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    fake.asked = asked
    return fake


def test_the_hub_is_asked_for_three_files(hub):
    assert_same(read_adapter(adapter_folder("me/shift")), live(1.0))
    assert_same(read_adapter(adapter_folder("me/shift", "v2")), live(1.0))
    files = [CONFIG_FILE, TENSORS_FILE, "training.json"]
    assert hub.asked == [("me/shift", None, files), ("me/shift", "v2", files)]


def test_load_from_the_hub(hub, tmp_path):
    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.MimICConfig())
    adapter.save_pretrained(tmp_path / "hub")
    for named in ({}, {"revision": "v2"}):
        assert_same(mk.load("me/shift", model, **named), adapter)
    assert [x[1] for x in hub.asked] == [None, "v2"]
    with pytest.raises(mk.CheckpointError, match="another backbone"):
        mk.load("me/shift", tiny_model("llava-llama", seed=1))
    with pytest.raises(FileNotFoundError, match="'me/other' is no folder here"):
        mk.load("me/other", model)


def test_a_folder_comes_first(hub, tmp_path, monkeypatch):
    live(2.0).save_pretrained(Path("me") / "shift")
    assert adapter_folder("me/shift", "v2") == "me/shift"
    assert_same(read_adapter(adapter_folder("me/shift")), live(2.0))
    Path("me/file").write_text("")
    assert adapter_folder("me/file") == "me/file" and hub.asked == []


@pytest.mark.parametrize(
    "path",
    ["shift", "./me/shift", "../me/shift", "/me/shift", "me/shift/x", "me\\shift", "~/shift", "me/", "/shift",
     "me/.shift", "-me/shift", "me/sh ift", "m\u00e9/shift", "", "me//shift", Path("me/shift"), "me/shift\n"],
    ids=repr,
)  # fmt: skip
def test_what_can_only_be_a_path(hub, path):
    """The hub does not hear of it."""
    assert adapter_folder(path) == path and hub.asked == []
    with pytest.raises(FileNotFoundError):
        read_adapter(adapter_folder(path))


def test_errors_of_the_hub(hub, elsewhere):
    """Whatever they are, one line that says what was tried."""
    import_error = ModuleNotFoundError("No module named 'yaml'", name="yaml")
    for error in (
        ConnectionError("offline"),
        OSError(28, "No space left on device"),
        ValueError("not a repo id"),
        RuntimeError("Client\n  Error"),
        import_error,
        type("HTTPError", (Exception,), {})("404"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        hub.snapshot_download = fail
        for revision, where in ((None, "me/shift could"), ("v2", "me/shift at revision 'v2' could")):
            with pytest.raises(FileNotFoundError) as raised:
                adapter_folder("me/shift", revision)
            text = str(raised.value)
            assert f"'me/shift' is no folder here ({Path.cwd()}), and {where} not be had from the hub" in text
            assert f"{type(error).__name__}: {' '.join(str(error).split())}" in text and "\n" not in text
            assert raised.value.__cause__ is error
    hub.snapshot_download = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter_folder("me/shift")


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_a_repository_without_an_adapter(hub, tmp_path, name):
    (tmp_path / "hub" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"me/shift on the hub has no {name}"):
        adapter_folder("me/shift")


def test_without_huggingface_hub(monkeypatch, elsewhere):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="'me/shift' is no folder here.*pip install huggingface_hub"):
        adapter_folder("me/shift")
    with pytest.raises(FileNotFoundError, match="nowhere.* does not exist"):
        read_adapter(adapter_folder("nowhere"))


# The real package, and its cache


def cached(folder, cache, repo="me/shift", ref="main"):
    """``folder`` as the hub's cache has it: links from a snapshot to blobs. The snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / ref).write_text(COMMIT)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = root / "blobs" / hashlib.sha256(path.read_bytes() + path.name.encode()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_real_cache_without_a_network(tmp_path):
    """huggingface_hub reads where it looks for things when it is imported: a process of its own."""
    pytest.importorskip("huggingface_hub")
    live(3.0).save_pretrained(tmp_path / "saved")
    cached(tmp_path / "saved", tmp_path / "cache")
    code = (
        "from mmicl_kernels.store import adapter_folder, read_adapter\n"
        "for revision in (None, 'main'):\n"
        "    print(read_adapter(adapter_folder('me/shift', revision)).layers['0'].vector[0].item())\n"
        "for name, revision in (('me/other', None), ('me/shift', 'v9'), ('me--x/shift', None)):\n"
        "    try: adapter_folder(name, revision)\n"
        "    except FileNotFoundError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["3.0"] * 2 and len(lines) == 5
    assert all("is no folder here" in line and "could not be had from the hub" in line for line in lines[2:])


@contextmanager
def read_only(folder):
    """``folder`` without any right to write; root, who has it all the same, gets what others would get."""
    real = os.open

    def denied(path, flags, *args, **kwargs):
        inside = not isinstance(path, int) and os.fspath(path).startswith(str(folder))
        if inside and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not os.path.exists(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, flags, *args, **kwargs)

    def no_folder(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", denied)
        patch.setattr(os, "mkdir", no_folder)
        patch.setattr(os, "access", lambda path, mode, **kw: not mode & os.W_OK)
        before = sorted(folder.rglob("*"))
        yield
    assert sorted(folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("below", [".", "banks/one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_bank_in_the_hubs_cache(tmp_path, monkeypatch, dtype, below):
    """Opened through its links, also by a link to the snapshot, by a relative path, and by a worker."""
    original = filled(tmp_path / "repo" / below, dtype)
    expected = [original.tokens(id) for id in range(7)]
    (tmp_path / "repo" / below / "lock").unlink()
    snapshot = cached(tmp_path / "repo", tmp_path / "cache")
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot.parent)
    with read_only(tmp_path / "cache"):
        for folder in (snapshot / below, tmp_path / "link" / below, Path(COMMIT) / below):
            bank = mk.DemonstrationBank(folder)
            assert len(bank) == 7 and bank.verify() == []
            assert all(torch.equal(bank.tokens(id), x) for id, x in enumerate(expected))
            assert bank.find(demonstration(4)) == 4
            assert bank.nearest(bank.mean(3), 1)[0][1] == 3 and bank.text(2).answer == "answer 2"
            assert torch.equal(bank.fused.rows, original.fused.rows)
            assert bank.working_set("cpu", 10_000).load([2, 5])[1] == [0, 1]
            bank.refresh()
        assert os.waitpid(in_child(lambda: bank.verify() == [] or 1 / 0), 0)[1] == 0
        with pytest.raises(OSError):
            add(bank, 9)
    blobs = {path: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()}
    with pytest.raises(mk.CheckpointError, match="is not a regular file"):
        # Where it could, too: a blob is named after its content.
        add(mk.DemonstrationBank(snapshot / below), 9)
    assert {path: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()} == blobs


def test_a_bank_in_a_read_only_folder(tmp_path):
    bank = filled(tmp_path / "bank")
    with read_only(tmp_path / "bank"):
        reader = mk.DemonstrationBank(tmp_path / "bank")
        reader.refresh()
        assert reader.verify() == []
        assert_holds(reader, 6, 6)
    assert add(bank, 9) == [7]


@pytest.mark.parametrize(
    "target", ["../../secret", "../../../blobs/x", "../blobs/x", "/etc/hostname", "../../blobs/../secret"]
)
def test_other_links_lead_nowhere(tmp_path, target):
    """Only those of the cache's own kind."""
    filled(tmp_path / "repo")
    snapshot = cached(tmp_path / "repo", tmp_path / "cache" / "deep")
    root = snapshot.parents[1]
    good = (snapshot / "rows.bin").read_bytes()
    for path in (root / "secret", root.parent / "blobs" / "x", snapshot.parent / "blobs" / "x"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(good)
    (snapshot / "rows.bin").unlink()
    (snapshot / "rows.bin").symlink_to(target)
    with pytest.raises(mk.CheckpointError, match="rows.bin is not a regular file"):
        mk.DemonstrationBank(snapshot)
    blob = root / "blobs" / "gone"
    (snapshot / "rows.bin").unlink()
    (snapshot / "rows.bin").symlink_to(Path("../../blobs/gone"))
    with pytest.raises(mk.CheckpointError, match="rows.bin does not exist"):
        mk.DemonstrationBank(snapshot)
    os.mkfifo(blob)
    with pytest.raises(mk.CheckpointError, match="rows.bin is not a regular file"):
        mk.DemonstrationBank(snapshot)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_library_in_the_hubs_cache(tmp_path, indexed):
    library = library_of_three(tmp_path / "repo")
    database = index_at_rest(library)
    for path in [library.folder / "lock"] + ([] if indexed else [database]):
        path.unlink()
    snapshot = cached(library.folder, tmp_path / "cache")
    with read_only(tmp_path / "cache"):
        reader = mk.VLibrary(snapshot)
        assert reader.list() == ["a", "b", "c"] and reader.search(tags=["v2"])[0].name == "b"
        assert [x.name for x in reader.search(embedding=[1.0, 2.0], limit=1)] == ["b"]
        assert_same(reader.get("c"), live(3.0))
        assert_same(read_adapter(reader.path("c")), live(3.0))
        problems = reader.verify()
        assert len(problems) == (0 if indexed else 1) and all("index.sqlite3" in x for x in problems)
        with pytest.raises(OSError):
            reader.put("d", live())
    stray = snapshot / "entries" / "stray.safetensors"
    stray.symlink_to(library.path("a"))
    assert any("stray" in x for x in mk.VLibrary(snapshot).verify())


def test_an_adapter_in_the_hubs_cache(tmp_path, monkeypatch):
    live(2.0).save_pretrained(tmp_path / "saved")
    snapshot = cached(tmp_path / "saved", tmp_path / "cache")
    monkeypatch.chdir(snapshot.parent)
    with read_only(tmp_path / "cache"):
        for folder in (snapshot, COMMIT):
            assert_same(read_adapter(folder), live(2.0))
