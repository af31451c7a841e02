"""Errors of the disk: never damage, never a reason to lose anything; and what a file system cannot do."""

import builtins
import errno
import fcntl
import io
import os
import sqlite3
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels import durable
from mmicl_kernels.methods.base import CONFIG_FILE, TENSORS_FILE
from mmicl_kernels.methods.official import read_official
from mmicl_kernels.store import read_adapter
from tests.store.banks import adapter, add, assert_holds, filled
from tests.store.crashes import in_child, index_at_rest
from tests.store.vectors import BACKBONE, MAKERS, assert_same, library_of_three, live

ERRORS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)
named = pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)


@contextmanager
def failing(error, *paths, calls=("open", "stat")):
    """``calls`` fail for ``paths``, as for another user's files, or on a disk or a server that fails."""
    paths = {os.fspath(path) for path in paths}

    def checked(function):
        def call(path, *args, **kwargs):
            if not isinstance(path, int) and os.fspath(path) in paths:
                raise OSError(error, os.strerror(error), os.fspath(path))
            return function(path, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            for holder in (builtins, io) if name == "open" else (os,):  # pathlib has the second
                patch.setattr(holder, name, checked(getattr(holder, name)))
        yield


# Entries that cannot be read


BREAK = {
    "database cut off": lambda library: os.truncate(index_at_rest(library), 30),
    "no database": lambda library: os.unlink(index_at_rest(library)),
    "half a database": lambda library: os.truncate(index_at_rest(library), 2**15),
}


@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize(
    ("broken", "error"), [(x, errno.EACCES) for x in BREAK] + [("database cut off", x) for x in ERRORS[1:]]
)
def test_an_entry_that_cannot_be_read_is_kept(library, broken, call, error):
    """Whoever writes meanwhile, and although the index must be made anew."""
    BREAK[broken](library)
    path = library.path("a")
    with failing(error, path, calls=[call]):
        writer = mk.VLibrary(library.folder)
        writer.put("d", live(4.0))
        writer.put("e", live(5.0), embedding=[1.0, 5.0])
        writer.put("b", live(6.0), embedding=[1.0, 6.0], overwrite=True)
        writer.remove("c")
        assert_same(writer.get("b"), live(6.0))
        for look in (writer.list, lambda: writer.search("x"), lambda: len(writer), writer.rebuild):
            with pytest.raises(OSError, match=os.strerror(error)):
                look()
        with pytest.raises(OSError, match=os.strerror(error)):
            writer.get("a")
        problems = [x for x in writer.verify() if "could not be read" in x]
        assert len(problems) == 1 and path.name in problems[0]
        with pytest.raises(FileExistsError):
            writer.put("d", live())
    for reader in (library, writer, mk.VLibrary(library.folder)):
        assert reader.list() == ["a", "b", "d", "e"]
        assert [x.name for x in reader.search(embedding=[1.0, 5.0])] == ["e", "b", "a"]
        assert_same(reader.get("a"), live(1.0))
    library.put("f", live())
    assert library.verify() == [] and library.list() == ["a", "b", "d", "e", "f"]


@named
def test_an_entry_that_cannot_be_read_while_it_is_put(library, error):
    """Whether a put was done that a crash interrupted is not known then, and it is not decided."""
    for _ in range(2):
        library._index.announce(library.path("c").name)
        assert mk.VLibrary(library.folder).list() == ["a", "b", "c"]
    library._index.announce(library.path("c").name)
    with failing(error, library.path("c")):
        with pytest.raises(OSError, match=os.strerror(error)):
            mk.VLibrary(library.folder).list()
        mk.VLibrary(library.folder).put("d", live())
    assert mk.VLibrary(library.folder).list() == library.list() == ["a", "b", "c", "d"]
    library.remove("d")
    assert library.verify() == []


@named
def test_where_the_only_embedding_changes_its_dimension(tmp_path, error):
    """The one operation that makes the index anew by itself."""
    library = mk.VLibrary(tmp_path)
    library.put("a", live(1.0), embedding=[1.0, 2.0])
    library.put("b", live(2.0))
    with failing(error, library.path("b")):
        library.put("a", live(3.0), embedding=[1.0, 2.0, 3.0], overwrite=True)
    assert library.list() == ["a", "b"] and library.search(embedding=[1.0, 2.0, 3.0])[0].name == "a"
    library.rebuild()
    assert library.verify() == []


@named
def test_a_rebuild_that_fails_leaves_the_index(library, error):
    before = index_at_rest(library).read_bytes()
    with failing(error, library.path("a")):
        with pytest.raises(OSError, match=os.strerror(error)):
            library.rebuild()
        assert index_at_rest(library).read_bytes()[100:] == before[100:]  # but for the count of changes
        assert mk.VLibrary(library.folder).list() == ["a", "b", "c"]
        library.put("d", live())  # the index is sound, so nobody needs to read the others
        assert library.list() == ["a", "b", "c", "d"]
    library.remove("d")
    assert library.verify() == []


@named
@pytest.mark.parametrize("call", ["listdir", "stat"])
def test_a_folder_that_cannot_be_read(library, call, error):
    index_at_rest(library).unlink()
    with failing(error, library.folder / "entries", calls=[call]):
        for work in (library.list, lambda: library.put("d", live()), lambda: library.remove("a")):
            with pytest.raises(OSError, match=os.strerror(error)):
                work()
    assert library.list() == ["a", "b", "c"]


@named
def test_an_index_that_cannot_be_looked_at(library, error):
    with failing(error, index_at_rest(library), calls=["stat"]):
        for work in (
            mk.VLibrary(library.folder).list,
            lambda: mk.VLibrary(library.folder).put("d", live()),
        ):
            with pytest.raises(OSError, match=os.strerror(error)):
                work()
    assert mk.VLibrary(library.folder).list() == ["a", "b", "c"] and library.verify() == []


SQLITE = {
    "disk full": sqlite3.OperationalError("database or disk is full"),
    "a disk that fails": sqlite3.OperationalError("disk I/O error"),
    "never free": sqlite3.OperationalError("database is locked"),
}


@pytest.mark.parametrize("kind", SQLITE)
@pytest.mark.parametrize("statement", ["INSERT OR IGNORE INTO pending", "DELETE FROM entries", "COMMIT"])
def test_an_index_that_cannot_be_written(library, kind, statement, monkeypatch):
    """Nothing is lost: what was to be written is written by whoever comes next."""

    class Failing(sqlite3.Connection):
        def execute(self, sql, *values):
            if sql.startswith(statement):
                raise SQLITE[kind]
            return super().execute(sql, *values)

    library._index.close()
    with monkeypatch.context() as patch:
        connect = sqlite3.connect
        patch.setattr(sqlite3, "connect", lambda *x, **named: connect(*x, factory=Failing, **named))
        for work in (lambda: library.put("d", live(4.0)), lambda: library.remove("a")):
            with pytest.raises(OSError, match=f"could not be used: {SQLITE[kind]}"):
                work()
        library._index.close()
    # Its file was there, and whoever removes settles first.
    put = ["d"] if statement.startswith("DELETE") else []
    assert library.list() == ["a", "b", "c", *put] and library.verify() == []


def as_nobody(work):
    """Run ``work`` in a process that has no rights but those of others."""

    def renounced():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        work()

    return os.waitpid(in_child(renounced), 0)[1] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize(
    "beside", ["nothing", "a reader", "a killed writer", "a changed entry", "an old index"]
)
def test_reading_takes_no_right_to_write(beside, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        library = library_of_three(f"{folder}/library")
        path = index_at_rest(library)
        if beside == "a reader":
            other = sqlite3.connect(path)  # a fork would close ours
            assert other.execute("SELECT count(*) FROM entries").fetchall() == [(3,)]
        elif beside == "a killed writer":
            kept = path, path.with_name(path.name + "-wal")
            library.put("d", live())
            contents = [x.read_bytes() for x in kept]
            library._index.close()
            for file, content in zip(kept, contents, strict=True):
                file.write_bytes(content)
        elif beside == "a changed entry":
            library._index.announce(library.path("b").name)
            index_at_rest(library)
            library.path("b").unlink()
        elif beside == "an old index":
            (path.parent / "log.jsonl").write_text("")
        expected = {"a killed writer": "abcd", "a changed entry": "ac"}.get(beside, "abc")

        def work():
            assert not os.access(folder, os.W_OK)
            reader = mk.VLibrary(f"{folder}/library")
            for _ in range(2):
                assert reader.list() == list(expected)
                assert reader.search(embedding=[1.0, 3.0], limit=1)[0].name == "c"
            assert_same(reader.get("c"), live(3.0))
            with pytest.raises(OSError):
                reader.put("x", live())

        before = sorted(os.walk(folder))
        assert as_nobody(work) and sorted(os.walk(folder)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_an_index_of_another_user():
    """That it cannot be read is the caller's to see."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        library = mk.VLibrary(f"{folder}/library")
        library.put("a", live(1.0))
        os.chmod(index_at_rest(library), 0)

        def work():
            reader = mk.VLibrary(f"{folder}/library")
            assert_same(reader.get("a"), live(1.0))
            with pytest.raises(OSError, match="unable to open"):
                reader.list()

        assert as_nobody(work)


def test_a_file_system_without_shared_memory(tmp_path, monkeypatch):
    """As those over a network, which have no device."""
    monkeypatch.setattr(os, "major", lambda device: 0)
    library = mk.VLibrary(tmp_path)
    library.put("a", live(1.0), embedding=[1.0])
    other = mk.VLibrary(tmp_path)
    other.put("b", live(2.0), embedding=[2.0])
    assert library.list() == other.list() == ["a", "b"] and library.verify() == []
    assert [x.name for x in (tmp_path / "index").iterdir()] == ["index.sqlite3"]


def test_an_entry_removed_while_it_is_looked_for(library):
    """That one is gone, and is not missed."""
    path = library.path("b")
    index_at_rest(library).unlink()
    with failing(errno.ENOENT, path, calls=["open"]):
        assert mk.VLibrary(library.folder).list() == ["a", "c"]


@named
@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize("name", ["bank.json", "index.bin", "rows.bin", "means.bin", "texts.bin"])
def test_a_bank_that_cannot_be_read_is_not_damaged(bank, name, call, error):
    with failing(error, bank.folder / name, calls=[call]):
        for work in (
            lambda: mk.DemonstrationBank(bank.folder),
            lambda: add(bank, 9),
            lambda: mk.DemonstrationBank.create(bank.folder, adapter()),
        ):
            with pytest.raises(OSError) as raised:
                work()
            assert raised.value.errno == error or isinstance(raised.value, FileExistsError)
        assert os.strerror(error) in mk.DemonstrationBank.verify(bank)[0]
    assert add(bank, 9) == [7] and bank.verify() == []
    for id, number in enumerate((0, 1, 2, 3, 4, 5, 6, 9)):
        assert_holds(mk.DemonstrationBank(bank.folder), id, number)


@named
@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_an_adapter_that_cannot_be_read(tmp_path, name, call, error):
    live(1.0).save_pretrained(tmp_path)
    with failing(error, tmp_path / name, calls=[call]), pytest.raises(OSError) as raised:
        read_adapter(tmp_path)
    assert raised.value.errno == error
    assert_same(read_adapter(tmp_path), live(1.0))


# Leftovers that stay


LEFTOVERS = {
    "busy": (".nfs000000000001", errno.EBUSY),
    "another's": ("c0ffee", errno.EACCES),
    "immutable": ("vectors-c0ffee.f32", errno.EPERM),
    "on a disk that fails": ("c0ffee", errno.EIO),
    "a folder": ("folder", None),
    "a folder that is full": ("full", None),
}


@contextmanager
def leftover(folder, kind):
    """Something in ``folder`` that cannot be removed."""
    name, error = LEFTOVERS[kind]
    path = folder / name
    if error is None:
        path.mkdir()
        if "full" in kind:
            (path / "file").write_text("")
        yield path
        return
    path.write_text("")
    with failing(error, path, calls=["unlink"]):
        yield path


@pytest.mark.parametrize("kind", LEFTOVERS)
@pytest.mark.parametrize("where", ["index", "tmp"])
def test_leftovers_that_stay_are_in_nobodys_way(library, where, kind):
    with leftover(library.folder / where, kind) as path:
        library.put("d", live(4.0), embedding=[1.0, 4.0])
        library.put("d", live(5.0), overwrite=True)
        library.remove("a")
        library.rebuild()
        os.truncate(library.folder / "index" / "index.sqlite3", 30)
        library.put("e", live())
        assert library.list() == ["b", "c", "d", "e"] and library.verify() == []
        assert path.exists()


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_leftovers_beside_a_bank(tmp_path, kind):
    """Also of a ``create`` that was killed."""
    tmp_path.joinpath("bank").mkdir()
    with (
        leftover(tmp_path / "bank", kind) as path,
        failing(errno.EBUSY, tmp_path / "bank" / "bank.json.tmp", calls=["unlink"]),
    ):
        (tmp_path / "bank" / "bank.json.tmp").write_text("half of i")
        bank = filled(tmp_path / "bank")
        assert add(bank, 9) == [7] and bank.verify() == [] and path.exists()


@pytest.mark.parametrize("kind", ["a folder", "a folder that is full"])
def test_a_folder_named_like_a_leftover_of_create(tmp_path, kind):
    (tmp_path / "bank.json.tmp").mkdir()
    if "full" in kind:
        (tmp_path / "bank.json.tmp" / "file").write_text("")
    assert add(filled(tmp_path), 9) == [7]


def test_what_nfs_keeps_of_an_entry_is_no_finding(library):
    """A file that is replaced or removed while a reader has it open."""
    (library.folder / "entries" / ".nfs0000000001").write_bytes(library.path("a").read_bytes())
    assert library.verify() == [] and library.list() == ["a", "b", "c"]
    library.rebuild()
    assert library.list() == ["a", "b", "c"]


def test_leftovers_do_not_hide_the_error(library, tmp_path):
    """The temporary file of a save that failed cannot be removed either: the caller hears why it failed."""
    live(1.0).save_pretrained(tmp_path / "saved")
    real = os.unlink

    def busy(path, *args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy", path)

    def full(source, target, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        for name in ("replace", "rename"):
            patch.setattr(os, name, full)
        for work in (
            lambda: live(2.0).save_pretrained(tmp_path / "saved"),
            lambda: library.export("a", tmp_path / "file"),
            lambda: library.put("d", live()),
            lambda: mk.DemonstrationBank.create(tmp_path / "bank", adapter()),
        ):
            with pytest.raises(OSError, match="No space left"):
                work()
    assert os.unlink is real
    assert_same(read_adapter(tmp_path / "saved"), live(1.0))
    assert library.list() == ["a", "b", "c"] and not (tmp_path / "file").exists()
    assert add(filled(tmp_path / "bank"), 9) == [7]


# Folders that cannot be waited for


def folders_fail(patch, error, when=lambda path: True, opening=False):
    """What cannot be done with a folder; files are waited for."""
    real, real_open = os.fsync, os.open

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not opening and os.path.isdir(path) and when(path):
            raise OSError(error, os.strerror(error))
        real(handle)

    def open_(path, *args, **kwargs):
        if opening and os.path.isdir(path) and when(os.fspath(path)):
            raise OSError(error, os.strerror(error), path)
        return real_open(path, *args, **kwargs)

    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "open", open_)


def use_all(folder):
    """Every operation that waits for a folder."""
    library = mk.VLibrary(folder / "library")
    for value, name in enumerate("ab", 1):
        library.put(name, live(float(value)), embedding=[1.0, value])
    library.remove("b")
    library.put("a", live(3.0), embedding=[1.0], overwrite=True)
    library.rebuild()
    library.export("a", folder / "file")
    live(4.0).save_pretrained(folder / "saved")
    add(mk.DemonstrationBank.create(folder / "bank", adapter(), torch.float32), 0, 1)


@pytest.mark.parametrize("opening", [False, True], ids=["fsync", "open"])
@pytest.mark.parametrize(
    "error",
    [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR],
    ids=errno.errorcode.get,
)
def test_folders_that_cannot_be_waited_for(tmp_path, monkeypatch, error, opening):
    """On CIFS, some FUSE file systems and Windows: all works, as safe as the file system is."""
    with monkeypatch.context() as patch:
        folders_fail(patch, error, opening=opening)
        use_all(tmp_path)
        with pytest.raises(FileExistsError):
            mk.DemonstrationBank.create(tmp_path / "bank", adapter())
    library = mk.VLibrary(tmp_path / "library")
    assert library.list() == ["a"] and library.verify() == []
    assert_same(library.get("a"), live(3.0))
    assert_same(read_adapter(tmp_path / "saved"), live(4.0))
    assert_holds(mk.DemonstrationBank(tmp_path / "bank"), 1, 1)


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE], ids=errno.errorcode.get
)
def test_folders_that_fail(tmp_path, monkeypatch, error):
    """What the disk may not have is an error; nothing is left of a bank."""
    library = mk.VLibrary(tmp_path / "library")
    for name in "abc":
        library.put(name, live(1.0), embedding=[1.0])
    works = (
        lambda: library.put("d", live()),
        lambda: library.put("a", live(2.0), overwrite=True),
        lambda: library.export("a", tmp_path / "file"),
        lambda: live().save_pretrained(tmp_path / "saved"),
        lambda: mk.DemonstrationBank.create(tmp_path / "bank", adapter()),
    )
    for opening, name in ((False, "b"), (True, "c")):
        with monkeypatch.context() as patch:
            folders_fail(patch, error, opening=opening)
            for work in (*works, lambda name=name: library.remove(name)):
                with pytest.raises(OSError, match=os.strerror(error)):
                    work()
    assert not (tmp_path / "bank" / "bank.json").exists()
    assert add(filled(tmp_path / "bank"), 9) == [7]
    assert library.list() == ["a"]
    library.put("d", live())
    assert library.verify() == []


@pytest.mark.parametrize(
    "step", ["fsync of a file", "fsync of the folder", "fsync of its parent", "open", "touch"]
)
def test_a_create_that_fails_leaves_no_bank(tmp_path, monkeypatch, step):
    """It is there or not, and what is left does not hinder the next one. After the last step, too."""
    folder = tmp_path / "parent" / "bank"
    failed = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        if step == "fsync of a file":
            patch.setattr(os, "fsync", lambda handle: _raise(failed))
        elif step.startswith("fsync"):
            which = folder if "the folder" in step else folder.parent
            folders_fail(patch, errno.EIO, when=lambda path: path == str(which))
        elif step == "open":
            real = mk.DemonstrationBank.__init__
            patch.setattr(mk.DemonstrationBank, "__init__", lambda *x: (real(*x), _raise(failed)))
        else:
            patch.setattr("pathlib.Path.touch", lambda *x, **kw: _raise(failed))
        with pytest.raises(OSError, match="Input/output error"):
            mk.DemonstrationBank.create(folder, adapter())
    with pytest.raises(FileNotFoundError):
        mk.DemonstrationBank(folder)
    bank = filled(folder)
    assert bank.verify() == [] and len(bank) == 7
    assert not list(folder.glob("bank.json.*"))


def _raise(error):
    raise error


def test_descriptions_that_could_not_be_read_back(tmp_path):
    """Refused before anything is written."""
    for backbone in (
        replace(BACKBONE, fingerprint=(float("nan"),)),
        replace(BACKBONE, name=None),
        replace(BACKBONE, layers={0: (-1, 4)}),
    ):
        made = adapter()
        made.backbone = backbone
        with pytest.raises(ValueError):
            mk.DemonstrationBank.create(tmp_path / "bank", made)
    with pytest.raises(ValueError):
        mk.DemonstrationBank.create(tmp_path / "bank", adapter(), prompt="x" * 2**22)
    assert not (tmp_path / "bank").exists()
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), prompt="caf\udce9 \0 ü")
    assert mk.DemonstrationBank(bank.folder).prompt == "caf\udce9 \0 ü"


@pytest.mark.parametrize(
    "error", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL], ids=errno.errorcode.get
)
def test_a_file_system_without_flock(library, bank, monkeypatch, error):
    """One clear sentence; reading works, and no open file is left."""

    def none(handle, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", none)
    handles = os.listdir("/proc/self/fd")
    for work in (
        lambda: library.put("d", live()),
        lambda: add(bank, 9),
        lambda: filled(bank.folder.parent / "x"),
    ):
        with pytest.raises(OSError, match="writing needs flock, which this file system lacks.*lock'"):
            work()
    assert set() == durable._LOCK_FILES and len(os.listdir("/proc/self/fd")) <= len(handles)
    assert mk.VLibrary(library.folder).list() == ["a", "b", "c"]
    assert len(mk.DemonstrationBank(bank.folder)) == 7


def test_a_platform_without_locks(library, bank, monkeypatch):
    monkeypatch.setattr("mmicl_kernels.durable.fcntl", None)
    assert library.list() == ["a", "b", "c"]
    assert_same(library.get("a"), live(1.0))
    assert_holds(mk.DemonstrationBank(bank.folder), 0, 0)
    for work in (lambda: library.put("d", live()), lambda: add(bank, 9)):
        with pytest.raises(OSError, match="needs flock"):
            work()
    assert library.list() == ["a", "b", "c"]
    assert_holds(mk.DemonstrationBank(bank.folder), 0, 0)


# Paths that are not UTF-8


ODD = {
    "Latin-1": b"caf\xe9",
    "all bytes": bytes(x for x in range(1, 256) if x != 0x2F)[:200],
    "spaces and newlines": b" a\n b ",
    "emoji": "🦜".encode(),
}


@pytest.mark.parametrize("kind", ODD)
def test_paths_that_are_not_utf8(tmp_path, kind):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + ODD[kind])
    library = mk.VLibrary(folder + "/library")
    library.put("a", live(1.0))
    library.put("b", live(2.0), embedding=[1.0, 2.0])
    for reader in (library, mk.VLibrary(os.fsencode(folder).decode(errors="surrogateescape") + "/library")):
        assert reader.list() == ["a", "b"] and reader.verify() == []
        assert [x.name for x in reader.search(embedding=[1.0, 1.0])] == ["b"]
        assert_same(reader.get("b"), live(2.0))
    library.export("b", folder + "/file")
    assert library.import_file(folder + "/file", name="c").name == "c"
    bank = filled(Path(folder) / "bank", torch.int8)
    assert add(mk.DemonstrationBank(folder + "/bank"), 9) == [7] and bank.verify() == []
    live(3.0).save_pretrained(folder + "/saved")
    assert_same(read_adapter(folder + "/saved"), live(3.0))


def test_an_official_file_whose_path_is_not_utf8(tmp_path):
    mimic = MAKERS["mimic"]()
    made = mk.MimICAdapter(mk.MimICConfig("all_keys", alignment="mean_square"), mimic.backbone)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pth")
    mk.save_official(made, path)
    assert_same(read_official(path, mimic.backbone), made)


@pytest.mark.parametrize("value", ["\udce9", "a\ud800", "\udfff"])
def test_labels_that_have_no_utf8(library, value):
    """Refused where they would be searched for, kept where they are the caller's own."""
    for wrong in ({"tags": [value]}, {"task": value}, {"metrics": {value: 1.0}}):
        with pytest.raises(ValueError, match="printable characters"):
            library.put("d", live(), **wrong)
    with pytest.raises(ValueError, match="name is"):
        library.put(value, live())
    assert library.list() == ["a", "b", "c"] and library.verify() == []
    assert library.put("d", live(), record={"run": value}).record == {"run": value}
    assert mk.VLibrary(library.folder).entry("d").record == {"run": value} and library.verify() == []
    assert library.search(value) == [] and library.search(tags=[value]) == []
    with pytest.raises(ValueError, match="expected Unicode"):
        mk.Demonstration((), value, "")


def made_a_pipe(path):
    os.mkfifo(path)


PLACES = [
    made_a_pipe,
    os.mkdir,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.parent.parent / "lock"),
    lambda path: path.write_bytes(b"SQLite format 3\0" * 4096),
    lambda path: path.touch(),
]


@pytest.mark.parametrize("make", PLACES, ids=["pipe", "folder", "device", "link", "garbage", "nothing"])
@pytest.mark.parametrize("suffix", ["", "-journal", "-wal", "-shm"])
def test_what_stands_in_the_place_of_the_index(library, make, suffix):
    """No reader waits for a pipe, no writer fails for ever: the index is made anew."""
    path = index_at_rest(library)
    place = path.with_name(path.name + suffix)
    place.unlink(missing_ok=True)
    make(place)
    assert mk.VLibrary(library.folder).list() == ["a", "b", "c"]
    mk.VLibrary(library.folder).put("d", live())
    assert path.is_file() and not path.is_symlink()
    assert mk.VLibrary(library.folder).list() == library.list() == ["a", "b", "c", "d"]
    library.remove("d")
    library.rebuild()
    assert mk.VLibrary(library.folder).list() == ["a", "b", "c"] and library.verify() == []
