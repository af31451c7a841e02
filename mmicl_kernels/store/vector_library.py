"""VLibrary: a folder of trained adapters, to be found by name, tag, text or embedding."""

from __future__ import annotations  # a method is called list, as the built-in type in the annotations is

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmicl_kernels.durable import append, clear_away, is_file, is_folder, locked, replacing, sync_folder
from mmicl_kernels.methods import ADAPTERS, Adapter, Backbone, CheckpointError
from mmicl_kernels.methods.base import check_tensors, is_plain
from mmicl_kernels.store.combine import combine_adapters
from mmicl_kernels.store.entry_file import (
    MAX_DIMENSION,
    SUFFIX,
    Entry,
    check_name,
    file_name,
    normal_form,
    pack,
    read_all,
    read_embedding,
    read_entry,
)  # fmt: skip
from mmicl_kernels.store.hub import huggingface_hub
from mmicl_kernels.store.index import PENDING, Index, check_dimension, conditions, row_of
from mmicl_kernels.store.mapped import is_hub_link
from mmicl_kernels.store.vectors import unit

RETRIES = 3  # of a search that met an entry while it was replaced
REMOVED_IN_USE = ".nfs"  # what NFS calls a file that was removed or replaced while somebody reads it


class VLibrary:
    """Adapters of any method in ``folder``, one immutable file each, and an index that can be rebuilt.

    Any number of processes may read and write at once: writers take turns by an advisory lock, readers
    need none. A process killed at any moment leaves the library as it was before or after the operation.
    One object may be shared by threads; copies, pickles and forked children open the folder again. The
    folder is made by the first ``put``.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).absolute()  # a pickle may be opened elsewhere
        if os.path.lexists(self.folder) and not is_folder(self.folder):
            raise NotADirectoryError(f"{self.folder} is not a folder, expected a library")
        self._entries = self.folder / "entries"
        self._index = Index(self.folder)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Copies and pickles open the folder again."""
        return type(self), (self.folder,)

    def put(
        self,
        name: str,
        adapter: Adapter,
        *,
        task: str | None = None,
        tags: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
        record: Any = None,
        embedding: Tensor | Sequence[float] | None = None,
        overwrite: bool = False,
    ) -> Entry:
        """Store ``adapter`` under ``name``; when this returns, the disk has it.

        Args:
            name: 1 to 128 printable Unicode characters, no slashes, not starting with "." or "-". task,
                tags: labels of the same kind, slashes allowed. All are kept in normal form C.
            metrics: finite numbers by label. record: anything JSON can hold, such as the training's log;
                keys are strings.
            embedding: ``[D]``, finite and not all zeros, stored in fp32; what ``search`` compares.
            overwrite: whether an entry of this name is replaced.

        Raises:
            FileExistsError: the name is taken. TypeError, ValueError: an argument is not as above, has
            another dimension than the library's other embeddings, or the adapter is not finite.
        """
        if not isinstance(adapter, Adapter) or adapter.method not in ADAPTERS:
            raise TypeError(f"adapter is a {type(adapter).__name__}, expected one of {sorted(ADAPTERS)}")
        if isinstance(tags, str):
            raise TypeError(f"tags is {tags!r}, expected a sequence of strings")
        vector = None if embedding is None else _embedding(embedding)
        tensors = adapter.state_dict()
        check_tensors("adapter", tensors, adapter.tensor_shapes(adapter.config, adapter.backbone))
        entry = Entry(
            name=_normal(name),
            method=adapter.method,
            config=asdict(adapter.config),
            backbone=adapter.backbone,
            task=normal_form(task),
            tags=tuple(dict.fromkeys(normal_form(tag) for tag in tags)),
            metrics={label: _number(label, value) for label, value in dict(metrics or {}).items()},
            record=record,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        return self._store(entry, tensors, vector, overwrite)

    def get(self, name: str, backbone: Backbone | None = None) -> Adapter:
        """The adapter stored under ``name``, on the CPU, bit for bit.

        Args:
            backbone: what the adapter must have been made for, such as another adapter's ``.backbone``.
                ``mk.load(library.path(name), model)`` checks a model and places the adapter on its
                devices, and so does ``attach``.

        Raises:
            KeyError: no such entry. CheckpointError: damaged, of an unknown method, or of another backbone.
        """
        if backbone is not None and not isinstance(backbone, Backbone):
            raise TypeError(
                f"backbone is a {type(backbone).__name__}, expected a Backbone; "
                "mk.load(library.path(name), model) checks a model"
            )
        adapter = self._read(name, read_all)[1]
        differences = [] if backbone is None else adapter.backbone.differences(backbone)
        if differences:
            raise CheckpointError(f"entry {name!r} belongs to another backbone: {'; '.join(differences)}")
        return adapter

    def entry(self, name: str) -> Entry:
        """All about an entry but its tensors. Raises KeyError, CheckpointError."""
        return self._read(name, read_entry)[0]

    def embedding(self, name: str) -> Tensor | None:
        """The embedding ``[D]`` fp32 of an entry, if it has one. Raises KeyError, CheckpointError."""
        return self._read(name, read_embedding)[2]

    def path(self, name: str) -> Path:
        """The entry's file, which ``mk.load`` reads too. Raises KeyError."""
        path = self._entries / file_name(_normal(name))
        if not is_file(path):
            raise KeyError(f"no entry {name!r} in {self.folder}")
        return path

    def list(self) -> list[str]:
        """All names, in order."""
        return self._index.names()

    def __len__(self) -> int:
        return len(self.list())

    def __contains__(self, name: str) -> bool:
        return is_file(self._entries / file_name(_normal(name)))

    def remove(self, name: str) -> None:
        """Remove an entry. Raises KeyError if there is none."""
        name = _normal(name)
        path = self._entries / file_name(name)
        if not is_folder(self._entries):
            raise KeyError(f"no entry {name!r} in {self.folder}")
        with self._writing() as index:
            if not is_file(path) and path.name not in index.rows():
                raise KeyError(f"no entry {name!r} in {self.folder}")
            index.announce(path.name)
            path.unlink(missing_ok=True)
            sync_folder(self._entries)
            index.settle()

    def search(
        self,
        text: str | None = None,
        tags: Sequence[str] | None = None,
        embedding: Tensor | Sequence[float] | None = None,
        task: str | None = None,
        method: str | None = None,
        limit: int = 10,
    ) -> list[Entry]:
        """The entries that meet every condition given, at most ``limit``.

        Args:
            text: each of its words occurs in the name, the task or a tag, whatever the case and the
                normal form. tags: all of them are the entry's. task, method: equal to the entry's.
            embedding: ``[D]``, rounded to fp32 as ``put`` does. The entries that have one, by falling
                cosine of the stored embedding with it (in fp64, in ``Entry.score``), ties by name; else
                the order is by name.

        Raises:
            TypeError, ValueError: an argument of another type, ``embedding`` of another dimension than
            the library's, or all zeros.
        """
        if type(limit) is not int or limit < 1:
            raise ValueError(f"limit is {limit!r}, expected a positive integer")
        if isinstance(tags, str):
            raise TypeError(f"tags is {tags!r}, expected a sequence of strings")
        for kind, value in (("text", text), ("task", task), ("method", method)):
            if not isinstance(value, str | None):
                raise TypeError(f"{kind} is {value!r:.80}, expected a string")
        words = normal_form(text or "").casefold().split()
        task, wanted = normal_form(task), [normal_form(tag) for tag in tags or ()]
        query = None if embedding is None else unit(_embedding(embedding))

        labels = [*words, *wanted, task or "", method or ""]
        if not all(label.isprintable() for label in labels):
            return []  # nobody's: all that are stored are
        meeting = conditions(words, wanted, task, method)
        found: list[Entry] = []
        for _ in range(RETRIES):
            found, stale = self._search(meeting, query, limit)
            if not stale:
                break
        return found

    def combine(self, weights: Mapping[str, float], backbone: Backbone | None = None) -> Adapter:
        """The weighted sum of stored adapters, as a new one: vectors as values.

        ``weights`` are numbers by name, negative ones for a difference. Where a method adds ``scale *
        vector``, the products are summed; the result has scale 1.

        Raises:
            As ``get``. ValueError: of a method whose sum means nothing (MimIC, AIM), a weight that is no
            finite number. CheckpointError: mixed methods, configs or backbones.
        """
        return combine_adapters({name: (self.get(name, backbone), w) for name, w in weights.items()})

    def verify(self) -> list[str]:
        """What is damaged, a sentence each; empty if nothing is. Reads every byte; writers wait.

        What a killed process leaves behind is not damage: the next writer clears it away.
        """
        if not is_folder(self._entries):
            return []
        lock = self.folder / "lock"
        # Where a lock cannot even be made, in a snapshot of the hub or on a read-only disk, nobody writes.
        alone = is_file(lock) or os.access(self.folder, os.W_OK)
        with locked(lock) if alone else nullcontext():
            if alone:
                with suppress(CheckpointError, OSError):
                    self._index.settle()
            rows = self._index.rows()
            problems = [f"index: {self._index.damage}"] if self._index.damage else []
            for path in sorted(self._entries.iterdir()):
                if path.name.startswith(REMOVED_IN_USE):
                    continue
                problem = self._problem_of(path, rows.pop(path.name, None))
                if problem:
                    problems.append(problem)
            return problems + [f"index: {row[1]!r} has no file" for row in rows.values() if row]

    def rebuild(self) -> None:
        """Write the index anew from the entries. Damaged files are left out, and left where they are.

        Raises:
            OSError: a file could not be read; the index is as it was.
        """
        with self._writing() as index:
            index.rebuild()

    def export(self, name: str, file: str | os.PathLike) -> None:
        """Write an entry as one file, which ``import_file`` reads.

        Raises:
            As ``get``. ValueError: ``file`` is where the library keeps its own.
        """
        path = self.path(name)
        target = Path(file).parent.resolve() / Path(file).name
        own = (self._entries, self._index.folder, self._index.temporary, self.folder / "lock")
        if {x.resolve() for x in own} & {target, *target.parents}:
            raise ValueError(f"file is {str(file)!r}, expected one outside of the library's own folders")
        self._read(name, read_all)
        with replacing(Path(file)) as (temporary,):
            temporary.write_bytes(path.read_bytes())

    def import_file(
        self, file: str | os.PathLike, *, name: str | None = None, overwrite: bool = False
    ) -> Entry:
        """Store the entry that ``export`` wrote, under its own name or ``name``.

        The file may come from anyone: nothing in it is run, and its name is not used as a path.

        Raises:
            FileNotFoundError. FileExistsError: the name is taken. CheckpointError: not a sound entry.
        """
        entry, adapter, embedding = read_all(Path(file))
        entry = entry if name is None else replace(entry, name=_normal(name))
        return self._store(entry, adapter.state_dict(), embedding, overwrite)

    def push(self, repo_id: str) -> None:
        """Upload all entries to a model repository of the Hugging Face hub, made if there is none.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed. What it raises itself.
        """
        hub = huggingface_hub("push and pull need").HfApi()
        hub.create_repo(repo_id, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=str(self._entries),
            path_in_repo="entries",
            allow_patterns=[f"*{SUFFIX}"],
        )

    def pull(self, repo_id: str, *, revision: str | None = None, overwrite: bool = False) -> list[Entry]:
        """Import every entry of a repository that ``push`` wrote; those imported, by file name.

        Without ``overwrite`` nothing is imported if a name is taken. Raises as ``push`` and ``import_file``.
        """
        hub = huggingface_hub("push and pull need")
        folder = hub.snapshot_download(repo_id, revision=revision, allow_patterns=[f"entries/*{SUFFIX}"])
        files = sorted((Path(folder) / "entries").glob(f"*{SUFFIX}"))
        taken = [] if overwrite else [x for x in (read_entry(file)[0].name for file in files) if x in self]
        if taken:
            raise FileExistsError(f"{repo_id} has entries whose names are taken: {taken[:3]}")
        return [self.import_file(file, overwrite=overwrite) for file in files]

    def _store(
        self, entry: Entry, tensors: Mapping[str, Tensor], embedding: Tensor | None, overwrite: bool
    ) -> Entry:
        entry, digest, data = pack(entry, tensors, embedding)
        path = self._entries / file_name(entry.name)
        with self._writing() as index:
            is_new = not is_file(path)
            if not is_new and not overwrite:
                raise FileExistsError(f"{self.folder} has an entry {entry.name!r}; overwrite replaces it")
            if embedding is not None:
                index.read(lambda x: check_dimension(x, len(embedding), path.name), complete=False)
            temporary = index.temporary / uuid.uuid4().hex
            append(temporary, data)
            index.announce(path.name)
            temporary.replace(path)
            try:
                sync_folder(self._entries)
            except OSError:
                clear_away([path] if is_new else [])
                raise
            index.settle()
        return entry

    def _read(self, name: str, reader: Any) -> tuple:
        path = self.path(name)
        try:
            found = reader(path)
        except FileNotFoundError as error:  # removed since
            raise KeyError(f"no entry {name!r} in {self.folder}") from error
        if found[0].name != _normal(name):
            raise CheckpointError(f"{path} holds the entry {found[0].name!r}, expected {name!r}")
        return found

    def _search(
        self, meeting: list[tuple[str, str]], query: Tensor | None, limit: int
    ) -> tuple[list[Entry], bool]:
        """Found entries, and whether one of them was replaced or removed meanwhile."""
        best = self._index.search(meeting, query, limit)
        found, stale = [], False
        for score, name, known in best:
            try:
                entry, digest = self._read(name, read_entry)
            except KeyError:
                stale = True
                continue
            stale |= digest != known
            found.append(replace(entry, score=score))
        return found, stale

    def _problem_of(self, path: Path, row: tuple | None) -> str | None:
        """What is wrong with a file in ``entries``, or with the ``row`` the index has of it."""
        try:
            linked = path.is_symlink() and not is_hub_link(path)
            if not path.name.endswith(SUFFIX) or linked or not is_file(path):
                return f"{path} is not an entry's file"
            entry, _, embedding = read_all(path)
            digest = read_entry(path)[1]
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{path} could not be read: {error}"
        if path.name != file_name(entry.name):
            return f"{path} holds the entry {entry.name!r}, expected in {file_name(entry.name)}"
        if row is None:
            return f"index: {entry.name!r} is not in it"
        expected = row_of(entry, digest, embedding)
        if row == PENDING:
            return None
        if row[:-2] != expected[:-2]:
            return f"index: {entry.name!r} is described otherwise than in its file"
        if row != expected:
            return f"index: {entry.name!r} has another vector than in its file"
        return None

    @contextmanager
    def _writing(self) -> Iterator[Index]:
        """The index, for the one writer at a time, after what a killed one left is cleared away."""
        folders = (self._entries, self._index.folder, self._index.temporary)
        if not all(is_folder(folder) for folder in folders):
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder)
        with locked(self.folder / "lock"):
            self._index.recover()
            yield self._index


def _normal(name: str) -> str:
    """``name`` in normal form C. Raises TypeError, ValueError for what is no name."""
    name = normal_form(name)
    check_name(name)
    return name


def _number(label: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"metric {label!r:.80} is no finite number: {error}") from error


def _embedding(values: Tensor | Sequence[float]) -> Tensor:
    """``[D]`` fp32 on the CPU."""
    if isinstance(values, Tensor) and not is_plain(values):
        raise ValueError("embedding is sparse, meta, freed or the like, expected a dense tensor [D]")
    # Numbers of Python in fp64, whatever the caller's default dtype and device are.
    dtype = None if hasattr(values, "dtype") else torch.float64
    try:
        vector = torch.as_tensor(values, dtype=dtype, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"embedding is {values!r:.80}, expected [D] of real numbers: {error}") from error
    if vector.ndim != 1 or not 1 <= len(vector) <= MAX_DIMENSION or vector.is_complex():
        raise ValueError(f"embedding has shape {list(vector.shape)}, expected [D] of real numbers")
    vector = vector.float().contiguous().clone()
    if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise ValueError("embedding is all zeros or not finite in fp32, so it has no cosine with anything")
    return vector
