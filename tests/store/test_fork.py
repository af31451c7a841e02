"""Forked processes find every lock free and keep none of their parent's; copies open the folder again."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mmicl_kernels as mk
from mmicl_kernels import durable
from tests.store.banks import add, assert_holds, demonstration, tokens
from tests.store.crashes import in_child
from tests.store.vectors import live

fcntl = pytest.importorskip("fcntl")


def ends_well(child, seconds=30):
    """Whether a child ends by itself, with exit code 0."""
    for _ in range(seconds * 100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def in_a_thread(work):
    """``work`` in another thread of a child: there the lock of the thread that forked is another's."""

    def run():
        found = []
        thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
        thread.start()
        thread.join(20)
        assert found == [True]

    return run


def library_works(library):
    assert library.list() == ["a", "b", "c"] and len(library) == 3
    assert [x.name for x in library.search(embedding=[1.0, 2.0], limit=1)] == ["b"]
    assert library.verify() == []
    library.put("d", live(4.0))
    library.remove("d")
    return True


def bank_works(bank):
    assert bank.find(mk.Demonstration((), "?", "")) is None
    assert_holds(bank, 4, 4)
    bank.refresh()
    assert bank.nearest(torch.ones(8), 3)
    assert add(bank, 4, 7) == [4, 7] and len(bank) == 8
    return True


@pytest.mark.parametrize("in_thread", [False, True], ids=["used by the child", "by a thread of the child"])
def test_a_fork_while_a_thread_holds_the_lock(library, bank, in_thread):
    """The fork waits for it, so that the child finds nothing half changed, and the lock free."""
    library.search(embedding=[1.0, 1.0])
    for work in (lambda: library_works(library), lambda: bank_works(bank)):
        has_it, done = threading.Event(), []

        def hold(has_it=has_it, done=done):
            with durable.no_fork:
                has_it.set()
                time.sleep(0.2)
                done.append(True)

        thread = threading.Thread(target=hold)
        thread.start()
        has_it.wait()
        child = in_child(in_a_thread(work) if in_thread else work)
        assert done and ends_well(child)
        thread.join()
    assert library_works(library)
    bank.refresh()
    assert len(bank) == 8


def test_no_child_inherits_an_open_database(library):
    """Its locks are the parent's, and what sqlite remembers of them is not true of a child."""
    path = library.folder / "index" / "index.sqlite3"

    def work():
        assert not any(
            os.path.realpath(f"/proc/self/fd/{x}").startswith(str(path)) for x in os.listdir("/proc/self/fd")
        )
        assert library_works(library)

    for _ in range(3):
        assert library.list() == ["a", "b", "c"] and library._index._connection is not None
        assert ends_well(in_child(work))


def test_forks_while_threads_read_and_write(library):
    """No child finds the database in the middle of something."""
    is_over, errors = threading.Event(), []

    def use(name):
        try:
            while not is_over.is_set():
                library.put(name, live(), embedding=[0.0, 1.0], overwrite=True)
                assert len(library.search(embedding=[1.0, 1.0])) >= 4
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(x,)) for x in "xy"]
    for thread in threads:
        thread.start()
    try:
        children = [in_child(lambda: set("abc") <= set(library.list()) or 1 / 0) for _ in range(20)]
        assert all(ends_well(child) for child in children)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert errors == [] and library.verify() == []


def test_a_child_does_not_give_back_its_parents_file_lock(tmp_path):
    """Both have the same open file, so an unlock by either would be one for both."""
    path, ends = tmp_path / "lock", os.pipe()
    with ExitStack() as stack:
        stack.enter_context(durable.locked(path))

        def leave():
            spare = os.open(path, os.O_RDONLY)  # gets the number that the lock's file had
            stack.close()
            os.fstat(spare)
            os.write(ends[1], b"x")
            with durable.locked(path):  # waits for the parent
                pass

        child = in_child(leave)
        os.close(ends[1])
        assert os.read(ends[0], 1) == b"x"
        with open(path) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert ends_well(child)


def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_killed(library, tmp_path):
    """A worker lives on when the process that was writing is killed, and has no copy of the open file."""
    ends = os.pipe()

    def work():
        with library._writing():
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(ends[1], b"%d\n" % worker)
            os.kill(os.getpid(), signal.SIGKILL)

    writer = in_child(work)
    os.waitpid(writer, 0)
    with open(ends[0]) as pipe:
        worker = int(pipe.readline())
    try:
        with open(library.folder / "lock") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert library_works(library)
    finally:
        os.kill(worker, signal.SIGKILL)


class Stored(Dataset):
    """What workers read of a library and a bank."""

    def __init__(self, library, bank):
        self.library, self.bank = library, bank

    def __len__(self):
        return 4

    def __getitem__(self, i):
        name = self.library.list()[i % 3]
        found = self.bank.tokens(self.bank.find(demonstration(4)))
        return self.library.get(name).layers["0"].vector.detach()[0] + found.sum()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(library, bank, start):
    library.search(embedding=[1.0, 1.0])
    loader = DataLoader(Stored(library, bank), num_workers=2, multiprocessing_context=start, timeout=60)
    values = torch.cat(list(loader))
    assert torch.equal(values, torch.tensor([1.0, 2.0, 3.0, 1.0]) + tokens(4).sum())


def names_in_a_pool(library):
    return library.list()


def test_a_pool_of_forked_processes(library):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(names_in_a_pool, (library,)).get(60) == ["a", "b", "c"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_open_the_folder_again(library, bank, copied, tmp_path, monkeypatch):
    """Also elsewhere than where a relative path was meant."""
    monkeypatch.chdir(tmp_path)
    here = mk.VLibrary("library"), mk.DemonstrationBank("bank")
    monkeypatch.chdir("/")
    for original in ((library, bank), here):
        other_library, other_bank = map(copied, original)
        assert other_library._index is not original[0]._index and other_bank._state is not original[1]._state
        assert library_works(other_library) and bank_works(other_bank)
        assert library_works(original[0])
    library.put("new", live())
    assert copied(library).list() == ["a", "b", "c", "new"]
    assert copied([library])[0].list() == ["a", "b", "c", "new"]
