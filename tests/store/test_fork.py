"""Forked processes find every lock free and keep none of their parent's; copies open the folder again."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch
from banks import add, assert_holds
from test_vector_library_crash import in_child
from torch.utils.data import DataLoader, Dataset
from vectors import live

import mmicl_kernels as mk
from mmicl_kernels.store import locking
from mmicl_kernels.store.index import Row

fcntl = pytest.importorskip("fcntl")


@contextmanager
def held(mutex, by_this_thread=False):
    """``mutex`` in the hands of another thread, for as long as the block runs, or of this one."""
    if by_this_thread:
        with mutex:
            yield
        return
    has_it, is_over = threading.Event(), threading.Event()

    def hold():
        with mutex:
            has_it.set()
            is_over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    has_it.wait()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


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


@pytest.mark.parametrize("by_this_thread", [False, True], ids=["another thread", "the thread that forks"])
@pytest.mark.parametrize("in_thread", [False, True], ids=["used by the child", "by a thread of the child"])
def test_a_lock_that_was_held_when_the_process_forked(library, bank, by_this_thread, in_thread):
    library.search(embedding=[1.0, 1.0])
    for mutex, work in (
        (library._mutex, lambda: library_works(library)),
        (bank._mutex, lambda: bank_works(bank)),
    ):
        with held(mutex, by_this_thread):
            child = in_child(in_a_thread(work) if in_thread else work)
            assert ends_well(child)
    assert library_works(library)
    bank.refresh()
    assert len(bank) == 8


def test_rows_have_no_lock_of_their_own(library):
    """While a thread makes the text of one, the others' can be had."""
    begun, is_over = threading.Event(), threading.Event()

    class Slow(tuple):
        def __iter__(self):
            begun.set()
            is_over.wait(60)
            return iter(())

    thread = threading.Thread(target=lambda: Row("slow", "live", None, Slow(), "", None).text)
    thread.start()
    begun.wait()
    child = in_child(lambda: [x.name for x in library.search("A")] == ["a"] or 1 / 0)
    assert ends_well(child)
    is_over.set()
    thread.join()


def test_what_a_thread_was_changing_is_read_again(library):
    """A child gets the index as it was in the middle of a step."""
    library.search(embedding=[1.0, 1.0])
    index = library._index
    with held(library._mutex):
        index.rows, index._halves = {}, torch.full_like(index._halves, torch.nan)
        child = in_child(lambda: library_works(library))
        assert ends_well(child)
    index.clear()
    assert library_works(library)


def test_a_child_leaves_what_it_was_forked_in(library, bank):
    """By the way of exceptions, say: what it gives back there is not what its threads hold now."""
    for mutex, work in (
        (library._mutex, lambda: library_works(library)),
        (bank._mutex, lambda: bank_works(bank)),
    ):
        with ExitStack() as stack:
            stack.enter_context(mutex)

            def leave(stack=stack, mutex=mutex, work=work):
                with held(mutex):
                    stack.close()
                work()
                in_a_thread(work)()

            child = in_child(leave)
            assert ends_well(child)
        work()


def test_a_child_does_not_give_back_its_parents_file_lock(tmp_path):
    """Both have the same open file, so an unlock by either would be one for both."""
    path, ends = tmp_path / "lock", os.pipe()
    with ExitStack() as stack:
        stack.enter_context(locking.locked(path))

        def leave():
            spare = os.open(path, os.O_RDONLY)  # gets the number that the lock's file had
            stack.close()
            os.fstat(spare)
            os.write(ends[1], b"x")
            with locking.locked(path):  # waits for the parent
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
        found = self.bank.tokens(
            self.bank.find(mk.Demonstration((b"image 4", b"another"), "question 4", "answer 4"))
        )
        return self.library.get(name).layers["0"].vector.detach()[0] + found.sum()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(library, bank, start):
    from banks import tokens

    with held(library._mutex), held(bank._mutex):
        loader = DataLoader(Stored(library, bank), num_workers=2, multiprocessing_context=start, timeout=60)
        values = torch.cat(list(loader))
    assert torch.equal(values, torch.tensor([1.0, 2.0, 3.0, 1.0]) + tokens(4).sum())


def names_in_a_pool(library):
    return library.list()


def test_a_pool_of_forked_processes(library):
    with held(library._mutex), multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(names_in_a_pool, (library,)).get(60) == ["a", "b", "c"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_open_the_folder_again(library, bank, copied, tmp_path, monkeypatch):
    """Also elsewhere than where a relative path was meant."""
    monkeypatch.chdir(tmp_path)
    here = mk.VLibrary("library"), mk.DemonstrationBank("bank")
    monkeypatch.chdir("/")
    for original in ((library, bank), here):
        other_library, other_bank = map(copied, original)
        assert other_library._mutex is not original[0]._mutex and other_bank._mutex is not original[1]._mutex
        assert library_works(other_library) and bank_works(other_bank)
        assert library_works(original[0])
    library.put("new", live())
    assert copied(library).list() == ["a", "b", "c", "new"]
    assert copied([library])[0].list() == ["a", "b", "c", "new"]
