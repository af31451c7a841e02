"""Adding, finding and refreshing cost the same however much there is: in bytes, not in seconds."""

import os
import tracemalloc
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmicl_kernels as mk
from mmicl_kernels import ops
from mmicl_kernels.store import bank_files
from mmicl_kernels.store.bank_files import Contents, read_records
from tests.store.banks import (
    adapter,
    add,
    assert_holds,
    demonstration,
    filled,
    hollow,
    records_of,
    tokens,
    write_records,
)
from tests.store.crashes import told_by_child
from tests.store.vectors import WIDTH


class Made(TorchDispatchMode):
    """Bytes of the tensors that torch makes, views aside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes += x.nbytes
        return out


@contextmanager
def counted(into):
    """Bytes that a block reads and writes by calls, that Python has at its peak, and that torch makes."""

    def calls():
        with open("/proc/self/io", "rb", buffering=0) as file:
            facts = dict(line.split(b": ") for line in file.read().splitlines())
        return int(facts[b"rchar"]), int(facts[b"wchar"])

    tracemalloc.start()
    with Made() as made:
        read, written = calls()
        yield
        read_after, written_after = calls()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    into.append((read_after - read, written_after - written, peak, made.bytes))


def costs(folder, count):
    """Of the first ``add``, the second, of ``find`` and of a refresh elsewhere, in a process of its own."""
    hollow(folder, adapter(), torch.float32, count, length=2)

    def work():
        found, bank, other = [], mk.DemonstrationBank(folder), mk.DemonstrationBank(folder)
        assert len(bank) == len(other) == count
        shown = [demonstration(1001), demonstration(1002)]
        for number, one in enumerate(shown):
            with counted(found):
                assert bank.add([one], [tokens(3)]) == [count + number]
        for one in (shown[1], demonstration(9)):
            with counted(found):
                bank.find(one)
        with counted(found):
            assert bank.add(shown, [tokens(4)] * 2) == [count, count + 1]  # nothing new
        for _ in range(2):
            with counted(found):
                other.refresh()
        with counted(found):
            assert other.find(shown[1]) == count + 1
        with counted(found):
            _ = other.fused.offsets[-1], len(other), other.tokens(count + 1)
        return found

    return told_by_child(work)


STEPS = ("add", "add again", "find", "find nothing", "add what is there", "refresh", "refresh of nothing",
         "find elsewhere", "look")  # fmt: skip


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_costs_do_not_grow(tmp_path, count):
    few, many = costs(tmp_path / "few", 3), costs(tmp_path / "many", count)
    assert len(few) == len(many) == len(STEPS)
    for step, small, great in zip(STEPS, few, many, strict=True):
        (read, written, peak, made), (great_read, great_written, great_peak, great_made) = small, great
        assert great_written == written and abs(great_read - read) < 64, step  # as long as /proc is
        # A page of records may be begun; Python's own tables grow by steps of their own.
        page = bank_files.RECORDS_OF_A_PAGE * bank_files.RECORD.size
        assert great_peak <= peak + page + 4096, (step, peak, great_peak)
        # Of ids that are looked for in a sorted table, one number each time.
        assert great_made <= made + 1024, (step, made, great_made)
    # What is written of one, what is read of it and of bank.json.
    assert few[0][1] < 2000 and few[5][0] < 8000


def test_many_small_adds(tmp_path, monkeypatch):
    """Over many pages and moves of the offsets; another object follows, in larger strides."""
    monkeypatch.setattr(bank_files, "RECORDS_OF_A_PAGE", 4)
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), torch.float32)
    other, seen = mk.DemonstrationBank(bank.folder), []
    numbers = iter(range(100))
    for stride in (1, 1, 2, 3, 1, 4, 5, 1, 1, 7, 9, 1, 2, 12):
        chosen = [next(numbers) for _ in range(stride)]
        seen.append((bank.fused.offsets, bank.fused.offsets.tolist()))
        assert add(bank, *chosen) == chosen
        if stride > 2:
            other.refresh()
    other.refresh()
    for reader in (bank, other, mk.DemonstrationBank(bank.folder)):
        assert len(reader) == 50 and reader.verify() == []
        for n in range(50):
            assert_holds(reader, n, n)
        assert reader.find(demonstration(50)) is None
    assert all(offsets.tolist() == values for offsets, values in seen), "what was handed out has changed"


def test_offsets_that_autograd_saved(tmp_path):
    """Adding writes behind them, into the same memory, between a forward and its backward."""
    bank = filled(tmp_path)
    fused, prompt = bank.fused, torch.randn(1, 2, WIDTH, requires_grad=True)
    ids, cu_demos = torch.tensor([4, 2]), torch.tensor([0, 2])
    out = ops.prefix_splice(fused.rows, fused.offsets, ids, cu_demos, prompt, length=8)
    memory = fused.offsets.untyped_storage().data_ptr()
    add(bank, 7, 8)
    assert bank.fused.offsets.untyped_storage().data_ptr() == memory
    out.embeddings.square().sum().backward()
    assert torch.equal(prompt.grad, 2 * prompt.detach())
    with torch.inference_mode():
        add(bank, 9)
    bank.fused.offsets.view(-1)
    assert not bank.fused.offsets.is_inference()
    assert bank.fused.offsets.tolist()[-1] == sum(n % 5 for n in range(10))


def test_a_refresh_that_failed_is_done_again(tmp_path):
    """Records were read, then a file was too short for them: the next try starts from what was known."""
    bank, writer = filled(tmp_path), mk.DemonstrationBank(tmp_path)
    add(writer, 7, 8, 9)
    rows = (tmp_path / "rows.bin").read_bytes()
    os.truncate(tmp_path / "rows.bin", len(rows) - 1)
    for _ in range(3):
        with pytest.raises(mk.CheckpointError, match=r"rows\.bin has"):
            bank.refresh()
        assert len(bank) == 7 and bank.find(demonstration(8)) is None
    (tmp_path / "rows.bin").write_bytes(rows)
    bank.refresh()
    for n in range(10):
        assert_holds(bank, n, n)


def test_damage_after_what_is_known(tmp_path):
    """New records are checked as the first ones are."""
    bank, writer = filled(tmp_path), mk.DemonstrationBank(tmp_path)
    add(writer, 7, 8)
    records = records_of(tmp_path)
    for change in ({"end_row": records[6].end_row - 1}, {"text_end": records[6].answer_end - 1}):
        write_records(tmp_path, [*records[:7], records[7]._replace(**change), records[8]])
        with pytest.raises(mk.CheckpointError, match="decrease"):
            bank.refresh()
        assert len(bank) == 7
    write_records(tmp_path, records)
    bank.refresh()
    assert len(bank) == 9 and bank.verify() == []


def test_digests_that_begin_alike(tmp_path):
    """The table knows 8 bytes of each, and the first of equal ones counts."""
    filled(tmp_path)
    records = records_of(tmp_path)
    digests = [bytes([7] * 8) + bytes([n] * 24) for n in (3, 1, 2, 3, 1)] + [b"\xff" * 32, bytes(32)]
    write_records(tmp_path, [x._replace(digest=y) for x, y in zip(records, digests, strict=True)])
    found = read_records(tmp_path)
    contents = Contents(found)
    assert [contents.find(x, found) for x in digests] == [0, 1, 2, 0, 1, 5, 6]
    for digest in (
        bytes([7] * 8) + bytes([9] * 24),
        b"\xff" * 31 + b"\0",
        b"\x80" + bytes(31),
        bytes(31) + b"\1",
    ):
        assert contents.find(digest, found) is None


def test_records_of_an_empty_bank(tmp_path):
    bank = mk.DemonstrationBank.create(tmp_path, adapter())
    bank.refresh()
    assert len(bank) == 0 and bank.find(demonstration(0)) is None and bank.fused.offsets.tolist() == [0]
    assert bank.add([demonstration(0)], [torch.empty(0, WIDTH)]) == [0]
    assert bank.fused.offsets.tolist() == [0, 0]
