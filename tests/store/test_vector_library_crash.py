"""VLibrary when processes are killed, and when several write at once."""

import os
import random
import signal
import time

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.store import index as index_module
from mmicl_kernels.store import vector_library as module
from tests.store.crashes import Steps, crashes, in_child
from tests.store.vectors import assert_same, live

NAMES = ["a", "b", "c"]


def store(library, name, value):
    """An entry every part of which says ``value``, so that parts of two are seen."""
    library.put(
        name,
        live(float(value)),
        tags=[f"v{value}"],
        metrics={"value": value},
        embedding=[1.0, float(value)],
        overwrite=True,
    )


def value_of(library, name):
    """The value that entry, tensors, embedding and index agree on."""
    entry = library.entry(name)
    value = entry.metrics["value"]
    assert_same(library.get(name), live(value))
    assert torch.equal(library.embedding(name), torch.tensor([1.0, value]))
    assert name in [found.name for found in library.search(tags=[f"v{int(value)}"])]
    assert name in [found.name for found in library.search(embedding=[1.0, value], limit=99)]
    return int(value)


def check(folder):
    """Values by name, of a library that is sound."""
    library = mk.VLibrary(folder)
    values = {name: value_of(library, name) for name in library.list()}
    assert len(library.search(embedding=[1.0, 1.0], limit=len(values) + 1)) == len(values)
    assert library.verify() == []
    return values


def test_killed_at_random_moments(tmp_path):
    """50 times: kill -9 a process that puts and removes; nothing is half there, nothing promised is lost."""
    generator, started = random.Random(0), 0
    folder = tmp_path / "library"
    for _ in range(50):
        ends = os.pipe()

        def work(ends=ends, start=started):
            library = mk.VLibrary(folder)
            for value in range(start + 1, start + 10_000):
                name = NAMES[value % 3]
                if value % 7 == 0 and name in library:
                    library.remove(name)
                    os.write(ends[1], f"{name} 0\n".encode())
                else:
                    store(library, name, value)
                    os.write(ends[1], f"{name} {value}\n".encode())

        before = check(folder)
        child = in_child(work)
        os.close(ends[1])
        with open(ends[0]) as pipe:
            done = [pipe.readline().split() for _ in range(generator.randrange(4))]
            time.sleep(generator.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child failed by itself"
            done += [line.split() for line in pipe.read().splitlines()]
        expected = {**before, **{name: int(value) for name, value in done}}
        after = check(folder)
        # One operation may have been under way: whichever it was, it happened wholly or not at all.
        touched = [name for name in NAMES if expected.get(name, 0) != after.get(name, 0)]
        assert len(touched) <= 1
        started = max([started, *after.values(), *(int(value) for _, value in done)]) + 1
    assert started > 60, "hardly anything was written, so the test shows nothing"
    store(mk.VLibrary(folder), "last", 1)
    assert check(folder)["last"] == 1
    assert list((folder / "tmp").iterdir()) == []


class LibrarySteps(Steps):
    def __init__(self, monkeypatch, at):
        super().__init__(at)
        append = module.append

        def half(path, data):
            append(path, data[: len(data) // 2])

        monkeypatch.setattr(module, "append", self.crashing(append, half))
        for holder in (index_module, module):
            monkeypatch.setattr(holder, "sync_folder", self.crashing(module.sync_folder))
        for name in ("replace", "rename", "unlink"):
            monkeypatch.setattr(f"pathlib.Path.{name}", self.crashing(getattr(module.Path, name)))
        for name in ("announce", "settle", "_follow"):
            monkeypatch.setattr(index_module.Index, name, self.crashing(getattr(index_module.Index, name)))


WORKS = {
    "put": (lambda library: store(library, "new", 2), {"old": 1}, {"old": 1, "new": 2}),
    "overwrite": (lambda library: store(library, "old", 2), {"old": 1}, {"old": 2}),
    "remove": (lambda library: library.remove("old"), {"old": 1}, {}),
    "rebuild": (lambda library: library.rebuild(), {"old": 1}, {"old": 1}),
}


@pytest.mark.parametrize("work", WORKS)
def test_crash_at_every_step(tmp_path, work):
    """Deterministic: before, within and after everything that touches the disk."""
    do, before, after = WORKS[work]
    outcomes = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        store(mk.VLibrary(folder), "old", 1)
        reader = mk.VLibrary(folder)
        assert reader.list() == ["old"]
        crashed = crashes(LibrarySteps, at, lambda folder=folder: do(mk.VLibrary(folder)))
        outcome = check(folder)
        assert outcome in (before, after)
        assert {name: value_of(reader, name) for name in reader.list()} == outcome
        outcomes.append(outcome)
        if at % 2:  # the next writer, which clears up, is killed as well
            assert crashes(
                LibrarySteps, at // 2 + 1, lambda folder=folder: store(mk.VLibrary(folder), "next", 3)
            )
            assert {k: v for k, v in check(folder).items() if k != "next"} == outcome
        store(mk.VLibrary(folder), "next", 3)
        assert check(folder) == {**outcome, "next": 3}
        assert {name: value_of(reader, name) for name in reader.list()} == {**outcome, "next": 3}
        assert list((folder / "tmp").iterdir()) == []
        if not crashed:
            break
    assert not crashed and at > 6
    # Every crash before some step undoes the operation, every later one does not.
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome == after)
    assert outcomes[0] == before and outcomes[-1] == after


def test_crash_while_the_only_embedding_changes_its_dimension(tmp_path):
    """Entry and search are of before or after."""
    outcomes = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        library = mk.VLibrary(folder)
        store(library, "a", 1)
        library.put("other", live())
        change = {"embedding": [1.0, 2.0, 3.0], "overwrite": True}
        writer = mk.VLibrary(folder)
        crashed = crashes(LibrarySteps, at, lambda x=writer, change=change: x.put("a", live(2.0), **change))
        for reader in (library, mk.VLibrary(folder)):
            query = reader.embedding("a")
            assert [entry.name for entry in reader.search(embedding=query)] == ["a"]
            assert reader.list() == ["a", "other"]
            assert reader.verify() == []
        assert_same(library.get("a"), live(1.0 if len(query) == 2 else 2.0))
        outcomes.append(len(query))
        library.put("other", live(), overwrite=True)
        assert library.verify() == []
        if not crashed:
            break
    assert not crashed and outcomes == sorted(outcomes) and set(outcomes) == {2, 3}


def test_crash_while_the_first_entry_is_put(tmp_path):
    for at in range(1, 100):
        folder = tmp_path / str(at)
        if not crashes(LibrarySteps, at, lambda folder=folder: store(mk.VLibrary(folder), "a", 1)):
            break
        assert check(folder) in ({}, {"a": 1})
        store(mk.VLibrary(folder), "b", 2)
        assert check(folder)["b"] == 2
    assert at > 10


def test_two_writers_lose_nothing(tmp_path):
    folder = tmp_path / "library"
    children = [
        in_child(lambda who=who: [store(mk.VLibrary(folder), f"{who}{i}", i + 1) for i in range(50)])
        for who in "xy"
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert check(folder) == {f"{who}{i}": i + 1 for who in "xy" for i in range(50)}


def test_twenty_processes_at_once(tmp_path):
    folder = tmp_path / "library"

    def work(who):
        library = mk.VLibrary(folder)
        for number in range(3):
            name = f"{who:02} {number}"
            store(library, name, who + 1)
            assert value_of(library, name) == who + 1 and name in library.list()

    children = [in_child(lambda who=who: work(who)) for who in range(20)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 20
    assert check(folder) == {f"{who:02} {number}": who + 1 for who in range(20) for number in range(3)}


def test_one_of_two_writers_gets_a_name(tmp_path):
    folder, ends = tmp_path / "library", os.pipe()

    def work():
        library, won = mk.VLibrary(folder), 0
        for number in range(20):
            try:
                library.put(f"n{number}", live(1.0))
                won += 1
            except FileExistsError:
                pass
        os.write(ends[1], f"{won}\n".encode())

    children = [in_child(work) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(ends[1])
    with open(ends[0]) as pipe:
        assert sum(map(int, pipe.read().split())) == 20
    assert len(mk.VLibrary(folder)) == 20 and mk.VLibrary(folder).verify() == []


def test_reader_beside_a_writer(tmp_path):
    """A reader sees every entry at every moment while they and the index are replaced, never parts of two."""
    folder = tmp_path / "library"
    for name in NAMES:
        store(mk.VLibrary(folder), name, 1)

    def work():
        library = mk.VLibrary(folder)
        for value in range(2, 122):
            store(library, NAMES[value % 3], value)
            if value % 10 == 0:
                library.rebuild()

    child = in_child(work)
    reader, seen, looks = mk.VLibrary(folder), dict.fromkeys(NAMES, 1), 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert reader.list() == NAMES
        assert sorted(x.name for x in reader.search(embedding=[1.0, 5.0])) == NAMES
        assert len(mk.VLibrary(folder).search("v")) == 3
        for name in NAMES:
            vector = reader.get(name).layers["0"].vector
            value = int(vector[0])
            assert bool((vector == value).all()) and value >= seen[name]
            seen[name] = value
        looks += 1
    assert looks > 5
    assert sorted(check(folder).values()) == [119, 120, 121]
