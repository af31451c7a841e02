"""The index of a VLibrary: a sqlite database of what is searched, derived from the entries' files.

The files are the truth. Before one of them changes, its name is written down as pending; afterwards the index
is made to say what the file says. If a crash came between, whoever comes next does that.
"""

import functools
import os
import re
import secrets
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmicl_kernels import durable
from mmicl_kernels.durable import clear_away, is_file, is_folder, locked, no_fork, sync_folder
from mmicl_kernels.methods import CheckpointError
from mmicl_kernels.store.entry_file import SUFFIX, Entry, file_name, read_embedding, read_entry
from mmicl_kernels.store.mapped import check_regular, opened
from mmicl_kernels.store.vectors import Vectors, scaled

T = TypeVar("T")
DATABASE = "index.sqlite3"
OLD_LOG = "log.jsonl"  # of the format before this one, beside vectors-*.f32
# The last bytes of a journal that names another file, which sqlite would delete. No transaction here has one.
NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
SECONDS = 60  # to wait for another process's transaction
FILE = re.compile(r"[a-z0-9-]{1,80}" + re.escape(SUFFIX), re.ASCII)
# Ids are never used again. ``tags`` has a newline before and after each, ``text`` is for words: case folded.
# ``pending`` names files that may have changed, or that could not be read.
SCHEMA = """
CREATE TABLE entries (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL UNIQUE, method TEXT NOT NULL, task TEXT, tags TEXT NOT NULL, text TEXT NOT NULL,
    digest TEXT NOT NULL, dimension INTEGER);
CREATE INDEX embedded ON entries (dimension);
CREATE TABLE vectors (id INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE pending (file TEXT PRIMARY KEY)
"""
COLUMNS = "file, name, method, task, tags, text, digest, dimension"


PENDING = ()  # in the place of a row that may not say what the file says


class UnusableError(CheckpointError):
    """The database may be sound, but cannot be read here and now."""


def row_of(entry: Entry, digest: str, embedding: Tensor | None) -> tuple:
    """What the index has of an entry: ``COLUMNS``, and the scaled embedding ``[D]`` fp32 as bytes, if any."""
    tags = "".join(f"\n{tag}" for tag in entry.tags) + "\n"
    text = "\n".join([entry.name, entry.task or "", *entry.tags]).casefold()
    columns = file_name(entry.name), entry.name, entry.method, entry.task, tags, text, digest
    if embedding is None:
        return *columns, None, None
    return *columns, len(embedding), scaled(embedding).numpy().tobytes()


def conditions(
    words: Sequence[str], tags: Sequence[str], task: str | None, method: str | None
) -> list[tuple[str, str]]:
    """SQL and its value, of each of the conditions."""
    found = [("instr(text, ?)", word) for word in words] + [("instr(tags, ?)", f"\n{tag}\n") for tag in tags]
    return found + [(f"{x} = ?", y) for x, y in (("task", task), ("method", method)) if y is not None]


class Index:
    """What is known of the entries in ``folder``.

    ``damage`` says why the database could not be used for the last ``read``, which asked all the files then.
    What is said to be for who holds the lock is for the one writer.
    """

    def __init__(self, folder: Path) -> None:
        self.entries, self.folder, self.temporary = folder / "entries", folder / "index", folder / "tmp"
        self.path, self._lock = self.folder / DATABASE, folder / "lock"
        self._beside = [self.folder / (DATABASE + suffix) for suffix in ("-journal", "-wal", "-shm")]
        self.damage: str | None = None
        self.vectors = Vectors()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None  # of the file that is connected to
        durable.close_before_forks(self)

    def close(self) -> None:
        """Close the database until it is needed again: no other process may inherit what is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        self.close()

    def read(self, query: Callable[[sqlite3.Connection], T], complete: bool = True) -> T:
        """What ``query`` finds in one state of the index, or of all files where it is missing or damaged.

        Raises:
            OSError: an entry that may be part of it could not be read, and it is to be ``complete``.
        """

        def found(index: sqlite3.Connection) -> T:
            if complete:
                self._raise_for_pending(index)
            return query(index)

        try:
            self._finish()
            with self._transaction() as index:
                result = found(index)
            self.damage = None
            return result
        except CheckpointError as error:
            expected = self._is_old() or not any(_entry_files(self.entries))
            self.damage = None if expected else str(error)
        with no_fork, closing(sqlite3.connect(":memory:", isolation_level=None)) as index:
            self._fill(index)
            return found(index)

    def names(self) -> list[str]:
        """All names, in order. Raises as ``read``."""
        # As one text: to make a string of each row takes ten times as long.
        sql = "SELECT group_concat(name, char(10)) FROM entries"

        def found(index: sqlite3.Connection) -> list[str]:
            names = (index.execute(sql).fetchone()[0] or "").splitlines()
            _label("".join(names))
            return sorted(names)

        return self.read(found)

    def search(
        self, meeting: list[tuple[str, str]], query: Tensor | None, limit: int
    ) -> list[tuple[float | None, str, str]]:
        """``(cosine, name, digest)`` of what meets the conditions, best first; by name without a query.

        Raises:
            ValueError: ``query``, a unit vector ``[D]`` fp64, has another dimension. Else as ``read``.
        """
        where = " AND ".join(["true", *(condition for condition, _ in meeting)])
        values = [value for _, value in meeting]

        def found(index: sqlite3.Connection) -> list[tuple[float | None, str, str]]:
            if query is None:
                sql = f"SELECT NULL, name, digest FROM entries WHERE {where} ORDER BY name LIMIT ?"
                return index.execute(sql, (*values, min(limit, 2**62))).fetchall()
            check_dimension(index, len(query))
            sql = f"SELECT group_concat(id) FROM entries WHERE +dimension IS NOT NULL AND {where}"
            if not meeting:
                return self.vectors.nearest(index, query, limit, None)
            # As one text, as names are.
            text = index.execute(sql, values).fetchone()[0]
            ids = np.fromstring(text, np.int64, sep=",") if text else np.empty(0, np.int64)
            return self.vectors.nearest(index, query, limit, torch.from_numpy(ids))

        return self.read(lambda index: [(x, _label(name), digest) for x, name, digest in found(index)])

    def rows(self) -> dict[str, tuple]:
        """All rows by file, as ``row_of`` has them, or ``PENDING``; the database is checked."""

        def found(index: sqlite3.Connection) -> dict[str, tuple]:
            self._check(index)
            sql = f"SELECT {COLUMNS}, vector FROM entries LEFT JOIN vectors USING (id)"
            return {row[0]: row for row in index.execute(sql)} | dict.fromkeys(_pending(index), PENDING)

        return self.read(found, complete=False)

    def recover(self) -> None:
        """Clear away and finish what a crash left, and write the index anew if it is missing or damaged.

        Before every write, for who holds the lock.
        """
        clear_away(self.temporary.iterdir())
        self._or_renew(self.settle)
        if not self._is_old():
            own = {self.path, *self._beside}
            clear_away(path for path in self.folder.iterdir() if path not in own)

    def announce(self, file: str) -> None:
        """Write down that ``file`` is about to change. For who holds the lock."""
        with self._transaction("IMMEDIATE") as index:
            index.execute("INSERT OR IGNORE INTO pending VALUES (?)", (file,))

    def settle(self) -> None:
        """Have the index say what the files say that were pending. For who holds the lock.

        Raises:
            CheckpointError: the database is missing, damaged, or of another version.
        """
        with self._transaction("IMMEDIATE") as index:
            for file in _pending(index):
                self._follow(index, self.entries / file)

    def rebuild(self) -> None:
        """Write all anew from the entries' files. For who holds the lock and has recovered.

        Raises:
            OSError: one could not be read; the index is as it was.
        """
        self._or_renew(self._write_anew)

    def _write_anew(self) -> None:
        with self._transaction("IMMEDIATE") as index:
            # Rows in a wrong order, say, are found and deleted like others, and the pages stay what they are.
            self._check(index)
            for table in ("entries", "vectors", "pending"):
                index.execute(f"DELETE FROM {table}")
            self._follow_all(index)
            self._raise_for_pending(index)

    def _check(self, index: sqlite3.Connection) -> None:
        """Raise CheckpointError where sqlite finds a page damaged; some damage it meets with an error."""
        problem = index.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise CheckpointError(f"{self.path} is damaged: {problem!r:.200}")

    def _or_renew(self, work: Callable[[], None]) -> None:
        """Do ``work``, or where it finds the database missing or damaged make another.

        Raises:
            OSError: the database may be sound, but cannot be read here and now.
        """
        try:
            work()
        except UnusableError as error:
            raise OSError(str(error)) from error
        except CheckpointError:
            self._renew()

    def _renew(self) -> None:
        """Another database in the place of whatever is there; entries that cannot be read stay pending."""
        temporary = self.temporary / uuid.uuid4().hex
        with no_fork, _errors(temporary), closing(_connect(temporary, "mode=rwc")) as index:
            index.execute("PRAGMA page_size = 16384")  # or a vector would leave half of its page unused
            index.execute("BEGIN")
            self._fill(index)
            index.execute("COMMIT")
            # Needs memory that all processes share, which a file system over a network, one without a device,
            # only seems to have.
            if os.major(self.folder.stat().st_dev):
                index.execute("PRAGMA journal_mode = WAL")
        with no_fork:
            self.close()
            for path in (self.path, *self._beside):
                if os.path.lexists(path):
                    path.rename(self.temporary / uuid.uuid4().hex)
            temporary.replace(self.path)
        sync_folder(self.folder)
        if self._is_old():
            (self.folder / OLD_LOG).unlink()

    def _fill(self, index: sqlite3.Connection) -> None:
        for statement in SCHEMA.split(";"):
            index.execute(statement)
        index.execute(f"PRAGMA user_version = {secrets.randbelow(2**31)}")  # tells one database from another
        self._follow_all(index)

    def _follow_all(self, index: sqlite3.Connection) -> None:
        for path in _entry_files(self.entries):
            self._follow(index, path)

    def _follow(self, index: sqlite3.Connection, path: Path) -> None:
        """Have ``index`` say what the file at ``path`` says, or that it could not be read."""
        index.execute("DELETE FROM vectors WHERE id IN (SELECT id FROM entries WHERE file = ?)", (path.name,))
        for table in ("entries", "pending"):
            index.execute(f"DELETE FROM {table} WHERE file = ?", (path.name,))
        try:
            entry, digest, embedding = read_embedding(path)
        except (CheckpointError, FileNotFoundError):
            return  # damaged, which ``verify`` tells, or removed
        except OSError:  # of another user, or on a disk that fails: none the less an entry
            index.execute("INSERT INTO pending VALUES (?)", (path.name,))
            return
        if file_name(entry.name) != path.name:
            return
        if embedding is not None:
            try:
                check_dimension(index, len(embedding))
            except ValueError:  # a file that was put here by hand
                embedding = None
        *columns, vector = row_of(entry, digest, embedding)
        marks = ", ".join("?" * len(columns))
        id = index.execute(f"INSERT INTO entries ({COLUMNS}) VALUES ({marks})", columns).lastrowid
        if vector is not None:
            index.execute("INSERT INTO vectors VALUES (?, ?)", (id, vector))

    def _finish(self) -> None:
        """Settle what a killed writer left, and take over from an older version.

        A writer that is at work does so itself; till then its operation has not happened.

        Raises:
            CheckpointError: the database cannot be used.
        """
        if not self._is_old():
            with self._transaction() as index:
                if not _pending(index):
                    return
        try:
            with locked(self._lock, wait=False):
                self.temporary.mkdir(exist_ok=True)
                self._renew() if self._is_old() else self.settle()
        except BlockingIOError:
            pass
        except OSError as error:
            raise CheckpointError(f"{self.path} could not be brought up to date: {error}") from error

    def _is_old(self) -> bool:
        return is_file(self.folder / OLD_LOG)

    def _raise_for_pending(self, index: sqlite3.Connection) -> None:
        """Raise the OSError with which an entry cannot be read that may be one of those in question."""
        for file in _pending(index):
            with suppress(CheckpointError, FileNotFoundError):
                read_entry(self.entries / file)

    @contextmanager
    def _transaction(self, kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
        """The database, in one state, to which all that is done in the block is added, or nothing.

        Raises:
            CheckpointError: it is missing, damaged, or of another version. OSError: the disk.
        """
        with no_fork, _errors(self.path):
            index = self._connected()
            try:
                index.execute(f"BEGIN {kind}")
                yield index
                index.execute("COMMIT")
            except BaseException:
                if index.in_transaction:
                    index.execute("ROLLBACK")
                raise

    def _connected(self) -> sqlite3.Connection:
        if self._is_old():
            raise CheckpointError(f"{self.folder} has the index of an older version")
        found = check_regular(self.path)
        if self._connection is None or (found.st_dev, found.st_ino) != self._identity:
            self.close()
            self._identity = found.st_dev, found.st_ino
            self._connection = self._opened()
            if not os.path.samestat(found, check_regular(self.path)):
                raise CheckpointError(f"{self.path} was replaced while it was opened")
        return self._connection

    def _opened(self) -> sqlite3.Connection:
        """Raises CheckpointError: what is there is not an index of this version, or not only one."""
        beside = [path for path in self._beside if os.path.lexists(path)]
        for path in beside:
            check_regular(path)
            if path == self._beside[0] and _names_another(path):
                raise CheckpointError(f"{path} names another file")
        # Where nothing can be written beside it, and nobody is writing, it is read as it lies.
        ways = ["mode=rw"] if os.access(self.folder, os.W_OK) and not self.path.is_symlink() else []
        ways.append("mode=ro" if beside else "immutable=1")
        for how in ways:
            try:
                index = _connect(self.path, how)
                break
            except sqlite3.OperationalError as error:
                if how == "mode=ro":
                    raise UnusableError(f"{self.path} is in use and cannot be read: {error}") from error
                if how == ways[-1]:
                    raise
        if how == "immutable=1":
            self._identity = None  # to be opened again the next time
        if _schema(index) != _our_schema():
            index.close()
            raise CheckpointError(f"{self.path} has other tables than an index of this version")
        return index


def _connect(path: Path, how: str) -> sqlite3.Connection:
    """A connection on which nothing in the database is run, and that has read from it."""
    index = sqlite3.connect(
        f"{path.as_uri()}?{how}", SECONDS, isolation_level=None, check_same_thread=False, uri=True
    )
    # What is not UTF-8 is not printable then, and refused.
    index.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    try:
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL"):
            index.execute(f"PRAGMA {pragma}")
        _schema(index)
    except BaseException:
        index.close()
        raise
    return index


def _schema(index: sqlite3.Connection) -> list[tuple]:
    return index.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()


@functools.cache
def _our_schema() -> list[tuple]:
    with closing(sqlite3.connect(":memory:")) as index:
        index.executescript(SCHEMA)
        return _schema(index)


def _names_another(journal: Path) -> bool:
    with opened(journal) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(NAMES_ANOTHER)))
        return file.read() == NAMES_ANOTHER


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Those of sqlite as others have them: what could not be read or written, and what is damaged."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{path} could not be used: {error}") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the second where sqlite quotes what is not UTF-8
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _pending(index: sqlite3.Connection) -> list[str]:
    files = [file for (file,) in index.execute("SELECT file FROM pending")]
    if not all(isinstance(file, str) and FILE.fullmatch(file) for file in files):
        raise CheckpointError(f"the index has pending files {files[:3]!s:.80}, expected those of entries")
    return files


def check_dimension(index: sqlite3.Connection, dimension: int, file: str = "") -> None:
    """Raise ValueError where others than ``file`` have embeddings of another dimension."""
    sql = "SELECT dimension FROM entries WHERE dimension IS NOT NULL AND file != ? LIMIT 1"
    found = index.execute(sql, (file,)).fetchone()
    if found not in (None, (dimension,)):
        raise ValueError(f"embedding has dimension {dimension}, the library has {found[0]}")


def _label(name: Any) -> str:
    if not isinstance(name, str) or not name.isprintable():
        raise CheckpointError(f"the index has the name {name!r:.80}, expected a printable text")
    return name


def _entry_files(entries: Path) -> Iterator[Path]:
    if is_folder(entries):
        yield from (path for path in sorted(entries.iterdir()) if FILE.fullmatch(path.name))
