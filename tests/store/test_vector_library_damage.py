"""VLibrary and files that are damaged, or made to harm: a clear error or a finding, never anything else."""

import json
import os
import pickle
import sqlite3
import struct
import tracemalloc
from contextlib import closing, suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmicl_kernels as mk
from mmicl_kernels.store import entry_file
from tests.store.crashes import index_at_rest
from tests.store.vectors import assert_same, library_of_three, live

NAMES = ["a", "b", "c"]


@pytest.fixture
def library(tmp_path):
    return library_of_three(tmp_path / "library", task="t", record={"x": [1]})


def damaged(good, generator, places):
    """``good`` cut off, and with single bytes changed, half of them at one of ``places``."""

    def draw(limit):
        return int(torch.randint(limit, (1,), generator=generator))

    yield b""
    for _ in range(25):
        yield good[: draw(len(good))]
    for number in range(75):
        changed = bytearray(good)
        changed[places[draw(len(places))] if number % 2 else draw(len(good))] ^= 1 + draw(255)
        yield bytes(changed)
    yield good + b"\0"
    yield b"\0" * len(good)


def test_damaged_entry(library):
    path, generator = library.path("b"), torch.Generator().manual_seed(0)
    good, expected, harmless = path.read_bytes(), library.get("b"), 0
    for content in damaged(good, generator, range(64)):
        path.write_bytes(content)
        try:
            assert_same(library.get("b"), expected)
            harmless += 1
            assert library.verify() == []
        except mk.CheckpointError:
            problems = library.verify()
            assert len(problems) == 1 and path.name in problems[0]
            with pytest.raises(mk.CheckpointError):
                library.import_file(path)
        for call in (lambda: library.entry("b"), lambda: library.search("b"), lambda: library.embedding("b")):
            with suppress(mk.CheckpointError):
                call()
        # The others do not suffer, and a search that does not meet the file does not notice.
        assert_same(library.get("a"), live(1.0))
        assert [x.name for x in library.search(tags=["v3"])] == ["c"] and library.list() == NAMES
    assert harmless < 5
    library.put("b", expected, overwrite=True)
    library.put("d", live())
    assert library.verify() == []


def test_damaged_index(library):
    """Readers find all, or ``verify`` says that they may not; ``rebuild`` mends it."""
    path, generator, findings, scans = index_at_rest(library), torch.Generator().manual_seed(0), 0, 0
    good = path.read_bytes()
    for content in damaged(good, generator, places=[i for i, byte in enumerate(good) if byte]):
        path.write_bytes(content)
        reader = mk.VLibrary(library.folder)
        with suppress(mk.CheckpointError):  # a damaged name may be that of a damaged file
            found = sorted(x.name for x in reader.search(embedding=[1.0, 2.0]))
            names = reader.list()
        scans += reader._index.damage is not None
        problems = reader.verify()
        assert problems or names == found == NAMES
        findings += bool(problems)
        reader.rebuild()
        assert reader.list() == NAMES and reader.verify() == []
        index_at_rest(reader)
    assert findings > 60 and scans > 30


def test_rows_in_a_wrong_order(library):
    """SQLite finds and deletes them like others, and the pages stay damaged: ``rebuild`` makes new ones."""
    path = index_at_rest(library)
    good = path.read_bytes()
    for i in (i for i, byte in enumerate(good) if byte in (1, 2)):
        path.write_bytes(good[:i] + bytes([47]) + good[i + 1 :])
        with closing(sqlite3.connect(path)) as connection:
            try:
                (problem,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            except sqlite3.DatabaseError:
                continue
        if "out of order" in problem:
            break
    else:
        pytest.fail("no byte of the index is a row's number")
    reader = mk.VLibrary(library.folder)
    assert reader.verify()
    reader.rebuild()
    assert reader.list() == NAMES and reader.verify() == []


def test_damage_that_the_check_cannot_pass(library):
    """SQLite raises from within it, where it reports other damage."""
    path, found = index_at_rest(library), 0
    good = path.read_bytes()
    for i in (i for i, byte in enumerate(good) if byte):
        path.write_bytes(good[:i] + bytes([47]) + good[i + 1 :])
        with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.DatabaseError):
            connection.execute("SELECT file FROM pending").fetchall()
            try:
                connection.execute("PRAGMA integrity_check(1)").fetchone()
            except sqlite3.DatabaseError:
                reader = mk.VLibrary(library.folder)
                assert reader.verify()
                reader.rebuild()
                assert reader.list() == NAMES and reader.verify() == []
                index_at_rest(reader)
                found += 1
    assert found > 3


def test_damaged_vectors(library):
    index = changed(library, "UPDATE vectors SET vector = zeroblob(8) WHERE id = 1")
    assert index.verify() == ["index: 'a' has another vector than in its file"]
    for vector in ("x'00'", "'text'", "NULL || 'x'", "zeroblob(4096)", "7"):
        reader = changed(library, f"UPDATE vectors SET vector = ifnull({vector}, 1.5) WHERE id = 1")
        assert [x.name for x in reader.search(embedding=[1.0, 2.0], limit=1)] == ["b"]
        assert "vectors of other sizes" in reader._index.damage and reader.verify()
    for sql in ("INSERT INTO vectors VALUES (99, zeroblob(8))", "DELETE FROM vectors"):
        assert mk.VLibrary(library.folder).search(embedding=[1.0, 2.0]) is not None
        changed(library, sql)
    library.rebuild()
    assert library.verify() == [] and len(library.search(embedding=[1.0, 2.0])) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 9e37, -9e37])
def test_a_damaged_vector_hides_no_other(library, value):
    reader = changed(library, "UPDATE vectors SET vector = ? WHERE id = 1", struct.pack("2f", 1.0, value))
    for limit, expected in ((1, ["b"]), (2, ["b", "c"])):
        assert [x.name for x in reader.search(embedding=[1.0, 2.0], limit=limit)] == expected
    assert sorted(x.name for x in reader.search(embedding=[1.0, 2.0])) == NAMES and len(reader.verify()) == 1


def test_missing_index(library):
    index_at_rest(library).unlink()
    reader = mk.VLibrary(library.folder)
    assert reader.list() == NAMES and "index" in reader.verify()[0]
    assert reader.search(embedding=[1.0, 2.0], limit=1)[0].name == "b"
    reader.put("a", live(), embedding=[1.0, 1.0], overwrite=True)
    assert reader.verify() == [] and library.verify() == []


def changed(library, *sql):
    """A new object of the library after a statement of somebody else's."""
    with closing(sqlite3.connect(index_at_rest(library))) as index, index:
        index.execute("PRAGMA writable_schema = ON")
        index.execute(*sql[:1], sql[1:])
    return mk.VLibrary(library.folder)


HOSTILE = {
    "a view": "CREATE VIEW x AS SELECT * FROM entries",
    "a trigger": "CREATE TRIGGER x AFTER INSERT ON entries BEGIN DELETE FROM entries; END",
    "a trigger on what is pending": "CREATE TRIGGER x AFTER INSERT ON pending BEGIN DELETE FROM entries; END",
    "a table more": "CREATE TABLE x (y)",
    "a table less": "DROP TABLE pending",
    "a column more": "ALTER TABLE entries ADD COLUMN x DEFAULT 5",
    "a virtual table": "CREATE VIRTUAL TABLE x USING fts4(y)",
    "an index on an expression": "CREATE INDEX x ON entries (abs(dimension))",
    "a view for a table": "UPDATE sqlite_master SET type = 'view', sql = 'CREATE VIEW vectors AS SELECT 1'"
    " WHERE name = 'vectors'",
    "a schema that is none": "UPDATE sqlite_master SET sql = 'nonsense' WHERE name = 'vectors'",
    "a path that is pending": "INSERT INTO pending VALUES ('../../etc/passwd')",
    "an absolute path": "INSERT INTO pending VALUES ('/dev/zero')",
    "a number that is pending": "INSERT INTO pending VALUES (x'ff')",
    "a name of a terminal": "UPDATE entries SET name = char(27) || '[2J' WHERE name = 'a'",
    "a name of bytes": "UPDATE entries SET name = x'ff' WHERE name = 'a'",
    "a name that is not UTF-8": "UPDATE entries SET name = CAST(x'ff' AS TEXT) WHERE name = 'a'",
    "a name with a zero": "UPDATE entries SET name = 'a' || char(0) WHERE name = 'a'",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index(library, case):
    reader = changed(library, HOSTILE[case])
    assert reader.list() == NAMES and [x.name for x in reader.search(embedding=[1.0, 2.0], limit=1)] == ["b"]
    assert "index" in reader.verify()[0]
    if "name" not in case:  # what is wrong in rows is for ``rebuild``
        reader.put("d", live())
        assert reader.list() == [*NAMES, "d"] and reader.verify() == []
    reader.rebuild()
    assert reader.verify() == [] and mk.VLibrary(library.folder).list()[:3] == NAMES


def test_an_index_of_another_size_than_it_says(library):
    path = index_at_rest(library)
    os.truncate(path, 2**40)  # a hole
    tracemalloc.start()
    reader = mk.VLibrary(library.folder)
    assert reader.list() == NAMES and reader.search(embedding=[1.0, 2.0], limit=1)[0].name == "b"
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_journal_that_names_another_file(library, tmp_path):
    """sqlite deletes the file that a journal names as that of a larger transaction."""
    path, other = index_at_rest(library), tmp_path / "other"
    other.write_text("precious")
    with closing(sqlite3.connect(path)) as index:
        index.execute("PRAGMA journal_mode = DELETE")
    name = os.fsencode(other)
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", 0, 0, 7, 512, 16384)
    tail = struct.pack(">3I", 2**31, len(name), sum(name)) + bytes.fromhex("d9d505f920a163d7")
    journal = path.with_name(path.name + "-journal")
    journal.write_bytes(header.ljust(512, b"\0") + tail[:4] + name + tail[4:])
    reader = mk.VLibrary(library.folder)
    assert reader.list() == NAMES and other.read_text() == "precious" and journal.exists()
    reader.put("d", live())
    assert reader.list() == [*NAMES, "d"] and other.read_text() == "precious" and not journal.exists()


def test_files_that_do_not_belong(library, tmp_path):
    entries = library.folder / "entries"
    (entries / "notes.txt").write_text("")
    (entries / "folder.safetensors").mkdir()
    (entries / "link.safetensors").symlink_to(library.path("a"))
    moved = entries / "moved.safetensors"
    moved.write_bytes(library.path("a").read_bytes())
    library.path("b").unlink()
    problems = library.verify()
    assert sorted(len([x for x in problems if part in x]) for part in
                  ("notes.txt", "folder", "link", "moved", "'b' has no file")) == [1] * 5  # fmt: skip
    assert len(problems) == 5
    assert "holds the entry 'a', expected in" in next(x for x in problems if "moved" in x)
    assert [x.name for x in library.search()] == ["a", "c"]
    library.rebuild()
    assert library.list() == ["a", "c"]


def test_an_entry_under_the_name_of_another(library):
    library.path("a").write_bytes(library.path("b").read_bytes())
    with pytest.raises(mk.CheckpointError, match="holds the entry 'b', expected 'a'"):
        library.get("a")
    with pytest.raises(mk.CheckpointError, match="holds the entry 'b'"):
        library.search("a")


def test_an_entry_copied_over_by_hand_is_found(library, tmp_path):
    other = mk.VLibrary(tmp_path / "other")
    other.put("a", live(9.0), tags=["new"])
    library.path("a").write_bytes(other.path("a").read_bytes())
    assert library.verify() == ["index: 'a' is described otherwise than in its file"]
    library.rebuild()
    assert library.verify() == [] and [x.name for x in library.search(tags=["new"])] == ["a"]


def test_a_removed_file_can_be_removed(library):
    library.path("a").unlink()
    library.remove("a")
    assert library.list() == ["b", "c"] and library.verify() == []


def forge(path, edit):
    """Rewrite an entry as ``edit(its JSON, its table of tensors)`` leaves them, all checksums right."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table, data = json.loads(raw[8:start]), raw[start:]
    metadata = table.pop("__metadata__")
    entry = json.loads(metadata["entry"])
    edited = edit(entry, table)
    if not isinstance(edited, str):
        entry["sha256"] = entry_file._tensors_digest(table, memoryview(data))
        edited = json.dumps(entry)
    metadata["entry"], metadata["sha256"] = edited, entry_file._sha256(edited.encode(errors="surrogatepass"))
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def renamed(table, old, new):
    table[new] = table.pop(old)


VECTOR = "adapter.layers.0.vector"
FORGED = {
    "not JSON": lambda e, t: "{",
    "deep JSON": lambda e, t: "[" * 100_000,
    "long number": lambda e, t: "9" * 5000,
    "NaN": lambda e, t: '{"name": NaN}',
    "surrogate": lambda e, t: '"\ud800"',
    "a list": lambda e, t: "[]",
    "null": lambda e, t: "null",
    "empty": lambda e, t: "{}",
    "unknown field": lambda e, t: e.update(code="import os"),
    "no name": lambda e, t: e.pop("name"),
    "path in the name": lambda e, t: e.update(name="../../etc/passwd"),
    "absolute name": lambda e, t: e.update(name="/etc/passwd"),
    "name is a list": lambda e, t: e.update(name=[]),
    "name with a null": lambda e, t: e.update(name="a\0b"),
    "name of a terminal": lambda e, t: e.update(name="\x1b[2J"),
    "name not normal": lambda e, t: e.update(name="e\u0301"),
    "name of a surrogate": lambda e, t: e.update(name="\ud800"),
    "method is a list": lambda e, t: e.update(method=[]),
    "method is unknown": lambda e, t: e.update(method="os.system"),
    "method is another": lambda e, t: e.update(method="mimic"),
    "config is null": lambda e, t: e.update(config=None),
    "config of another": lambda e, t: e["config"].update(rank=8),
    "site is a list": lambda e, t: e["config"].update(site=[]),
    "weight is a word": lambda e, t: e["config"].update(ce_weight="much"),
    "weight is infinite": lambda e, t: e["config"].update(ce_weight=float("1e999")),
    "backbone is a list": lambda e, t: e.update(backbone=[]),
    "backbone is null": lambda e, t: e.update(backbone=None),
    "no layers": lambda e, t: e["backbone"].pop("layers"),
    "layers is null": lambda e, t: e["backbone"].update(layers=None),
    "layers many": lambda e, t: e["backbone"].update(layers={str(i): [2, 4] for i in range(10_000)}),
    "width huge": lambda e, t: e["backbone"].update(hidden_size=2**62),
    "tags is a word": lambda e, t: e.update(tags="\n"),
    "tags is null": lambda e, t: e.update(tags=None),
    "tags many": lambda e, t: e.update(tags=["x"] * 100_000),
    "tag is a number": lambda e, t: e.update(tags=[3]),
    "task is a number": lambda e, t: e.update(task=3),
    "metrics is a list": lambda e, t: e.update(metrics=[]),
    "metric is a word": lambda e, t: e.update(metrics={"a": "x"}),
    "metric is infinite": lambda e, t: json.dumps(e).replace('"metrics": {}', '"metrics": {"a": 1e999}'),
    "metric is long": lambda e, t: json.dumps(e).replace(
        '"metrics": {}', '"metrics": {"a": %s}' % ("9" * 4000)
    ),
    "record is deep": lambda e, t: e.update(record=nested(300)),
    "created is a number": lambda e, t: e.update(created=3),
    "checksum is null": lambda e, t: json.dumps({**e, "sha256": None}),
    "checksum of others": lambda e, t: json.dumps({**e, "sha256": "0" * 64}),
    "no tensors": lambda e, t: t.clear(),
    "tensor gone": lambda e, t: t.pop(VECTOR),
    "tensor renamed": lambda e, t: renamed(t, VECTOR, "adapter.layers.9.vector"),
    "tensor of no adapter": lambda e, t: renamed(t, VECTOR, "weights"),
    "integers": lambda e, t: t[VECTOR].update(dtype="I32"),
    "half of twice": lambda e, t: t[VECTOR].update(dtype="F16", shape=[16]),
    "dtype is a list": lambda e, t: t[VECTOR].update(dtype=[]),
    "shape is null": lambda e, t: t[VECTOR].update(shape=None),
    "shape below 0": lambda e, t: t[VECTOR].update(shape=[-2, -4]),
    "shape in words": lambda e, t: t[VECTOR].update(shape=["8"]),
    "shape huge": lambda e, t: t[VECTOR].update(shape=[2**62, 2**62]),
    "offsets huge": lambda e, t: t[VECTOR].update(data_offsets=[0, 2**62]),
    "offsets of three": lambda e, t: t[VECTOR].update(data_offsets=[0, 1, 2]),
    "offsets are null": lambda e, t: t[VECTOR].update(data_offsets=None),
    "offsets overlap": lambda e, t: t[VECTOR].update(t["adapter.layers.1.vector"]),
    "tensor is a list": lambda e, t: t.update({VECTOR: []}),
    "embedding of rows": lambda e, t: t["embedding"].update(shape=[1, 2]),
    "embedding of halves": lambda e, t: t["embedding"].update(dtype="F16", shape=[4]),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_entries(library, case, tmp_path):
    path = library.path("a")
    forge(path, FORGED[case])
    before = sorted(tmp_path.rglob("*"))
    other = mk.VLibrary(tmp_path / "other")
    tracemalloc.start()
    with pytest.raises(mk.CheckpointError):
        library.get("a")
    with pytest.raises(mk.CheckpointError):
        other.import_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26, "sizes are believed before the tensors are seen"
    assert any(path.name in problem for problem in library.verify())
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    for call in (lambda: library.entry("a"), lambda: library.search("a"), library.rebuild, library.list):
        with suppress(mk.CheckpointError):
            call()


@pytest.mark.parametrize("values", [[float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]])
def test_forged_embedding(library, values, tmp_path):
    path = library.path("b")
    path.write_bytes(path.read_bytes().replace(struct.pack("2f", 1.0, 2.0), struct.pack("2f", *values)))
    forge(path, lambda entry, table: None)
    for call in (library.get, library.embedding):
        with pytest.raises(mk.CheckpointError, match="embedding of NaN"):
            call("b")
    with pytest.raises(mk.CheckpointError, match="embedding of NaN"):
        mk.VLibrary(tmp_path / "other").import_file(path)
    library.rebuild()
    assert library.list() == ["a", "c"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_forged_tensor(library, value):
    path = library.path("b")
    path.write_bytes(
        path.read_bytes().replace(struct.pack("8f", *[2.0] * 8), struct.pack("8f", *[value] * 8))
    )
    forge(path, lambda entry, table: None)
    with pytest.raises(mk.CheckpointError, match="finite floating"):
        library.get("b")


def test_forging_nothing_is_harmless(library):
    """So the cases above fail for their own reasons."""
    forge(library.path("a"), lambda entry, table: None)
    assert_same(library.get("a"), live(1.0))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_of_other_kinds(library, tmp_path):
    file, ran = tmp_path / "file", tmp_path / "ran"
    other = mk.VLibrary(tmp_path / "other")
    tensors = load_file(library.path("a"))
    contents = [pickle.dumps(Code(ran)), b"", b"\0" * 8, b"PK\3\4" + b"\0" * 100]
    contents += [length.to_bytes(8, "little") + header for length, header in
                 ((2**63, b"{}"), (2, b"[]"), (100_000, b"[" * 100_000))]  # fmt: skip
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(mk.CheckpointError, match="file"):
            other.import_file(file)
    torch.save({"x": Code(ran)}, file)
    with pytest.raises(mk.CheckpointError):
        other.import_file(file)
    for metadata in (None, {"format": "pt"}, {"format": entry_file.FORMAT}):
        save_file(tensors, file, metadata)
        with pytest.raises(mk.CheckpointError):
            other.import_file(file)
    assert not ran.exists() and not other.folder.exists()
    with pytest.raises(FileNotFoundError):
        other.import_file(tmp_path)


def test_header_larger_than_the_limit(library, tmp_path):
    length = entry_file.MAX_HEADER_BYTES + 8
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b" " * length)
    with pytest.raises(mk.CheckpointError, match="a header of"):
        library.import_file(tmp_path / "file")
