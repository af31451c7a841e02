"""DemonstrationBank when processes are killed, when power fails, and when several write at once."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.store import bank_files, demo_bank
from mmicl_kernels.store.bank_files import RECORD
from tests.store.banks import (
    adapter,
    add,
    assert_holds,
    demonstration,
    filled,
    records_of,
    tokens,
    write_records,
)
from tests.store.crashes import Steps, crashes, in_child
from tests.store.vectors import WIDTH

ROWS = 500  # of a demonstration: 16 kB, so that a kill can come in the middle of it


def whole(bank, number):
    """Whether demonstration ``number`` is there, under this id, as it was added."""
    return (
        torch.equal(bank.tokens(number), tokens(number, ROWS)) and bank.find(demonstration(number)) == number
    )


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """kill -9 a process that adds: what it had reported is there bit for bit, and nothing is half there."""
    generator, torn, count = random.Random(0), 0, 0
    folder = tmp_path / "bank"
    mk.DemonstrationBank.create(folder, adapter(), torch.float32)
    sizes = [1 + n % 4 for n in range(10**5)]
    for _ in range(kills):
        ends = os.pipe()

        def work(ends=ends, start=count):
            bank = mk.DemonstrationBank(folder)
            for size in sizes[start:]:
                numbers = range(start, start := start + size)
                values = [tokens(n, ROWS) for n in numbers]
                assert bank.add([demonstration(n) for n in numbers], values) == list(numbers)
                os.write(ends[1], f"{start}\n".encode())

        child = in_child(work)
        os.close(ends[1])
        with open(ends[0]) as pipe:
            done = [pipe.readline() for _ in range(generator.randrange(3))]
            time.sleep(generator.uniform(0, 0.006))
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child failed by itself"
            done += pipe.read().splitlines()
        promised = int(done[-1]) if done else count
        bank = mk.DemonstrationBank(folder)
        # One call may have been under way, of at most four demonstrations.
        assert promised <= len(bank) <= promised + 4
        assert all(whole(bank, number) for number in range(count, len(bank)))
        torn += (folder / "rows.bin").stat().st_size > int(bank.lengths.sum()) * WIDTH * 4
        count = len(bank)
    assert count > kills and torn > kills // 20, "hardly anything was interrupted, so the test shows nothing"
    bank.add([demonstration(count)], [tokens(count, ROWS)])
    assert all(whole(bank, number) for number in range(count + 1)) and bank.verify() == []
    assert (folder / "rows.bin").stat().st_size == (count + 1) * ROWS * WIDTH * 4
    assert (folder / "index.bin").stat().st_size == (count + 1) * RECORD.size


class BankSteps(Steps):
    def __init__(self, monkeypatch, at):
        super().__init__(at)
        write_after, append = bank_files.write_after, bank_files.append

        def half(path, size, parts):
            data = b"".join(map(bytes, parts))
            write_after(path, size, [data[: len(data) // 2]])

        def half_append(path, data):
            append(path, data[: len(data) // 2])

        monkeypatch.setattr(demo_bank, "write_after", self.crashing(write_after, half))
        monkeypatch.setattr(bank_files, "append", self.crashing(append, half_append))
        monkeypatch.setattr(bank_files, "sync_folder", self.crashing(bank_files.sync_folder))
        for name in ("replace", "touch", "mkdir"):
            monkeypatch.setattr(f"pathlib.Path.{name}", self.crashing(getattr(bank_files.Path, name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_crash_at_every_step_of_add(tmp_path, dtype):
    """What was there stays, of the new ones the first few are there or none, and the next writer goes on."""
    counts = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        bank = filled(folder, dtype, calls=[(0, 1), (2,)])
        expected = [bank.tokens(id) for id in range(3)]
        crashed = crashes(BankSteps, at, lambda folder=folder: add(mk.DemonstrationBank(folder), 3, 4))
        fresh = mk.DemonstrationBank(folder)
        bank.refresh()
        for reader in (bank, fresh):
            assert all(torch.equal(reader.tokens(id), x) for id, x in enumerate(expected))
            assert all(reader.find(demonstration(id)) == id for id in range(len(reader)))
            assert reader.verify() == []
        assert len(bank) == len(fresh)
        counts.append(len(fresh))
        assert add(fresh, 9, 3, 4) == {3: [3, 4, 5], 4: [4, 3, 5], 5: [5, 3, 4]}[counts[-1]]
        assert add(bank, 9, 8)[1] == 6 and bank.verify() == []
        if not crashed:
            break
    # Half of the index's two records is one: a call is not one transaction, each demonstration is.
    assert not crashed and counts == sorted(counts) and set(counts) == {3, 4, 5}
    assert at == 3 * (4 if dtype == torch.float32 else 5) + 1


def test_crash_at_every_step_of_create(tmp_path):
    for at in range(1, 100):
        folder = tmp_path / "parent" / str(at)
        if not crashes(BankSteps, at, lambda x=folder: mk.DemonstrationBank.create(x, adapter())):
            break
        try:
            bank = mk.DemonstrationBank(folder)
        except FileNotFoundError:
            bank = mk.DemonstrationBank.create(folder, adapter())
        assert add(bank, 1, 2) == [0, 1] and mk.DemonstrationBank(folder).verify() == []
    assert at > 15


@pytest.mark.parametrize("lost", [2, 3, 4, 5])
def test_power_lost_in_the_middle_of_the_index(tmp_path, lost):
    """The disk may have the end of a call's records and not their beginning."""
    filled(tmp_path, calls=[(0, 1), (2, 3, 4, 5)])
    index = bytearray((tmp_path / "index.bin").read_bytes())
    index[lost * RECORD.size : (lost + 1) * RECORD.size] = bytes(RECORD.size)
    (tmp_path / "index.bin").write_bytes(index)
    bank = mk.DemonstrationBank(tmp_path)
    assert len(bank) == lost and bank.verify() == []
    assert add(bank, 9) == [lost]
    for id, number in enumerate([*range(lost), 9]):
        assert_holds(mk.DemonstrationBank(tmp_path), id, number)


def test_a_lost_record_of_an_earlier_call_is_damage(tmp_path):
    """It was safe before the later call began, so nothing crashed there, and nothing is cut off."""
    bank = filled(tmp_path, calls=[(0, 1), (2, 3, 4, 5)])
    index = (tmp_path / "index.bin").read_bytes()
    for lost in (0, 1):
        damaged = index[: lost * RECORD.size] + bytes(RECORD.size) + index[(lost + 1) * RECORD.size :]
        (tmp_path / "index.bin").write_bytes(damaged)
        with pytest.raises(mk.CheckpointError, match=f"record {lost} is not sound, later ones are"):
            mk.DemonstrationBank(tmp_path)
        assert [f"record {lost} is not sound" in problem for problem in bank.verify()] == [True]
        assert (tmp_path / "index.bin").read_bytes() == damaged


def test_two_writers_lose_nothing(tmp_path):
    """Three processes add, partly the same demonstrations: all are there, once."""
    mk.DemonstrationBank.create(tmp_path, adapter(), torch.float32)

    def work(start):
        bank = mk.DemonstrationBank(tmp_path)
        for n in range(start, start + 40, 2):
            first, second = add(bank, n, n + 1)
            assert bank.find(demonstration(n)) == first != second

    children = [in_child(lambda start=start: work(start)) for start in (0, 20, 40)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    bank = mk.DemonstrationBank(tmp_path)
    assert len(bank) == 80 and bank.verify() == []
    for n in range(80):
        assert_holds(bank, bank.find(demonstration(n)), n)


def test_one_of_two_creates_it(tmp_path):
    ends = os.pipe()

    def work():
        for n in range(20):
            try:
                mk.DemonstrationBank.create(tmp_path / str(n), adapter())
                os.write(ends[1], b"1")
            except FileExistsError:
                pass

    children = [in_child(work) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(ends[1])
    with open(ends[0], "rb") as pipe:
        assert pipe.read() == b"1" * 20


def test_reader_beside_a_writer(tmp_path):
    """A reader sees only whole demonstrations, and all that it saw before."""
    reader, looks = mk.DemonstrationBank.create(tmp_path, adapter(), torch.float32), 0

    def work():
        bank = mk.DemonstrationBank(tmp_path)
        for n in range(0, 240, 3):
            add(bank, n, n + 1, n + 2)

    child = in_child(work)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen = len(reader)
        reader.refresh()
        fresh = mk.DemonstrationBank(tmp_path)
        assert seen <= len(reader) <= len(fresh)
        for id in range(seen, len(reader)):
            assert_holds(reader, id, id)
        assert reader.lengths.tolist() == [n % 5 for n in range(len(reader))]
        looks += 1
    assert looks > 5
    reader.refresh()
    assert len(reader) == 240 and reader.verify() == []


def test_a_reader_that_looks_while_a_torn_record_is_cut_off(tmp_path, monkeypatch):
    """It sees a torn record and, after it, what a later call wrote: not damage, it looks again."""
    filled(tmp_path)
    records, looks = records_of(tmp_path), []
    good = (tmp_path / "index.bin").read_bytes()
    write_records(tmp_path, [records[0], records[1]._replace(end_row=9), *records[2:]])
    torn = bytearray((tmp_path / "index.bin").read_bytes())
    torn[RECORD.size + 3] ^= 1
    (tmp_path / "index.bin").write_bytes(torn)
    are_sound = bank_files._are_sound

    def look(part):
        sound = are_sound(part)
        looks.append(sound)
        (tmp_path / "index.bin").write_bytes(good)
        return sound

    monkeypatch.setattr(bank_files, "_are_sound", look)
    bank = mk.DemonstrationBank(tmp_path)
    assert len(bank) == 7 and looks == [[True, False] + [True] * 5, [True] * 7]


def test_a_full_disk(tmp_path, monkeypatch):
    """An error while writing is the caller's to see; the bank is as before, and takes the next addition."""
    bank, flush = filled(tmp_path), bank_files.flush

    def fail(file):
        if "means" in file.name:
            raise OSError(28, "No space left on device")
        flush(file)

    with monkeypatch.context() as patch:
        patch.setattr(bank_files, "flush", fail)
        with pytest.raises(OSError, match="No space left"):
            add(bank, 9)
    assert len(bank) == len(mk.DemonstrationBank(tmp_path)) == 7
    assert add(bank, 8) == [7] and bank.verify() == []
    assert_holds(bank, 7, 8)


def test_one_wait_per_file_and_call(tmp_path, monkeypatch):
    bank, waits, fsync = filled(tmp_path), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (waits.append(handle), fsync(handle)))
    add(bank, *range(10, 60))
    assert len(waits) == 4 and len(bank) == 57


def test_data_reach_the_disk_before_their_records(tmp_path, monkeypatch):
    bank, order, flush = filled(tmp_path, torch.int8), [], bank_files.flush
    monkeypatch.setattr(bank_files, "flush", lambda file: (flush(file), order.append(Path(file.name).name)))
    add(bank, 9)
    assert order[-1] == "index.bin"
    assert sorted(order) == ["index.bin", "means.bin", "rows.bin", "scales.bin", "texts.bin"]
