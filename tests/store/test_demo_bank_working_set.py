"""WorkingSet: bit-equal rows whatever was evicted before, the least recently used first, never too large."""

from collections import OrderedDict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmicl_kernels as mk
from mmicl_kernels import ops
from mmicl_kernels.store import working_set as module
from tests.store.banks import DTYPES, adapter, demonstration
from tests.store.vectors import WIDTH, bits

LENGTHS = [n % 7 for n in range(50)]


@pytest.fixture(params=DTYPES, ids=str)
def bank(request, tmp_path):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), request.param)
    bank.add([demonstration(n) for n in range(50)], [torch.randn(n, WIDTH) for n in LENGTHS])
    return bank


def row_bytes(bank):
    return WIDTH * bank.dtype.itemsize + (4 if bank.dtype == torch.int8 else 0)


def assert_loaded(bank, ids, fused, positions):
    """Each id's rows are at its position, bit for bit."""
    assert fused.rows.dtype == bank.dtype and fused.offsets.dtype == torch.int64
    offsets = fused.offsets.cpu()
    assert len(positions) == len(ids) and offsets[0] == 0
    for id, position in zip(ids, positions, strict=True):
        begin, end = offsets[position : position + 2].tolist()
        rows = fused.rows[begin:end].cpu()
        if fused.scale is not None:
            rows = rows * fused.scale[begin:end, None].cpu()
        assert torch.equal(bits(rows), bits(bank.tokens(id))), id


class Least:
    """What a set of ``capacity`` rows keeps, by the textbook."""

    def __init__(self, capacity):
        self.capacity, self.kept = capacity, OrderedDict()

    def load(self, ids):
        wanted = dict.fromkeys(ids)
        room = self.capacity - sum(LENGTHS[id] for id in self.kept)
        need = sum(LENGTHS[id] for id in wanted if id not in self.kept)
        for id in list(self.kept):
            if room >= need:
                break
            if id not in wanted:
                room += LENGTHS[id]
                del self.kept[id]
        for id in wanted:
            self.kept[id] = None
            self.kept.move_to_end(id)


def test_random_requests(bank, device, monkeypatch):
    """300 loads, compacted three rows at a time, against a model of what should be there."""
    monkeypatch.setattr(module, "MOVED_BYTES", 3 * row_bytes(bank))
    capacity, evictions = 40, 0
    working_set, least = (
        bank.working_set(device, capacity * row_bytes(bank) + row_bytes(bank) - 1),
        Least(capacity),
    )
    address = working_set.load([])[0].rows.data_ptr()
    for _ in range(300):
        ids = torch.randint(50, (int(torch.randint(8, ())),)).tolist()
        fused, positions = working_set.load(ids)
        before = len(least.kept) + len(set(ids) - set(least.kept))
        least.load(ids)
        evictions += before - len(least.kept)
        assert_loaded(bank, ids, fused, positions)
        assert fused.rows.shape == (capacity, WIDTH) and fused.rows.data_ptr() == address
        assert (
            fused.rows.device.type == torch.device(device).type and fused.offsets.device == fused.rows.device
        )
        assert int(fused.offsets[-1]) == sum(LENGTHS[id] for id in least.kept) <= capacity
        assert len(fused.offsets) == len(least.kept) + 1
        # All that should be there, and still whole; asking in this order changes nothing.
        kept = list(least.kept)
        assert_loaded(bank, kept, *working_set.load(kept))
    assert evictions > 300


def test_the_least_recently_used_goes_first(bank, device):
    working_set = bank.working_set(device, 12 * row_bytes(bank))
    working_set.load([3, 4, 5])  # 3 + 4 + 5 rows: full
    working_set.load([3])
    fused, positions = working_set.load([2])  # 2 rows: 4 goes, not 3
    assert positions == [2] and fused.offsets.tolist() == [0, 3, 8, 10]
    assert working_set.load([5, 3])[1] == [1, 0]
    fused, positions = working_set.load([10])  # 3 rows: 2 goes, to make four
    assert positions == [2] and fused.offsets.tolist() == [0, 3, 8, 11]
    assert_loaded(bank, [3, 5, 10], fused, [0, 1, 2])


def test_what_is_wanted_is_not_evicted_for_the_rest(bank, device):
    working_set = bank.working_set(device, 12 * row_bytes(bank))
    working_set.load([6])
    working_set.load([5])
    fused, positions = working_set.load([4, 6])  # 6 is the oldest
    assert_loaded(bank, [4, 6], fused, positions)
    assert fused.offsets.tolist() == [0, 6, 10]


def test_a_request_that_fills_it(bank, device):
    working_set = bank.working_set(device, 12 * row_bytes(bank))
    for ids in ([6, 13], [5, 4, 3], [13, 6, 13, 0, 7], [0], [1, 5, 6]):
        assert_loaded(bank, ids, *working_set.load(ids))


def test_a_request_that_is_too_large(bank, device):
    size = row_bytes(bank)
    working_set = bank.working_set(device, 12 * size + 3)
    working_set.load([3, 4])
    message = f"ids have 13 rows, {13 * size} bytes, expected at most max_bytes = {12 * size + 3}"
    with pytest.raises(ValueError, match=message):
        working_set.load([6, 5, 2])
    # Repeated ones count once, and nothing was lost by the error.
    fused, positions = working_set.load([4, 3, 4, 5, 5])
    assert positions == [1, 0, 1, 2, 2]
    assert_loaded(bank, [4, 3, 4, 5, 5], fused, positions)


class Copies(TorchDispatchMode):
    """The operators that run, and how many rows of the buffer are moved by each that moves some."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity, self.names, self.moved = capacity, [], []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.overloadpacket.__name__)
        if self.names[-1] == "index_select" and len(arguments[0]) == self.capacity:
            self.moved.append(len(arguments[2]))
        return function(*arguments, **(named or {}))


def test_one_copy_for_all_misses(bank, device):
    working_set = bank.working_set(device, 100 * row_bytes(bank))
    working_set.load([1, 2])
    buffers = 2 if bank.dtype == torch.int8 else 1  # rows, and scales
    with Copies(100) as copies:
        fused, _ = working_set.load([1, 3, 4, 2, 5, 6])
    assert copies.names.count("copy_") == buffers and copies.moved == []
    with Copies(100) as copies:
        again, positions = working_set.load([6, 1, 3])
    assert not {"copy_", "_to_copy", "cat"} & set(copies.names) and positions == [5, 0, 2]
    assert again.offsets is fused.offsets


def test_compaction_moves_only_what_lies_behind_a_gap(bank, device):
    working_set = bank.working_set(device, 20 * row_bytes(bank))
    working_set.load([3, 4, 5, 6])  # 18 rows
    working_set.load([3, 4, 6])
    with Copies(20) as copies:
        fused, positions = working_set.load([1, 9])  # three rows: 5 goes, the 6 rows of 6 move
    assert copies.moved == [6] * (2 if bank.dtype == torch.int8 else 1)
    assert fused.offsets.tolist() == [0, 3, 7, 13, 14, 16]
    assert_loaded(bank, [1, 9], fused, positions)
    assert_loaded(bank, [3, 4, 6], fused, [0, 1, 2])


def test_what_was_added_since(bank, device):
    working_set, other = bank.working_set(device, 12 * row_bytes(bank)), mk.DemonstrationBank(bank.folder)
    other.add([demonstration(99)], [torch.randn(3, WIDTH)])
    with pytest.raises(IndexError, match="ids has 50, expected 0 to 49"):
        working_set.load([50])
    bank.refresh()
    assert_loaded(bank, [50, 1], *working_set.load([50, 1]))


def test_splice_from_it(bank, device):
    """The op takes the positions for ids, and makes of them what it makes of the bank."""
    working_set = bank.working_set(device, 40 * row_bytes(bank))
    prompt = torch.randn(2, 3, WIDTH)
    for _ in range(10):
        ids, cu_demos = torch.randint(50, (6,)), torch.tensor([0, 4, 6])
        fused, positions = working_set.load(ids.tolist())
        mapped = bank.fused
        expected = ops.prefix_splice(
            mapped.rows, mapped.offsets, ids, cu_demos, prompt, length=30, bank_scale=mapped.scale
        )
        named = torch.tensor(positions, device=device)
        actual = ops.prefix_splice(
            fused.rows, fused.offsets, named, cu_demos.to(device), prompt.to(device), length=30,
            bank_scale=fused.scale,
        )  # fmt: skip
        assert torch.equal(actual.embeddings.cpu(), expected.embeddings)
        assert torch.equal(actual.attention_mask.cpu(), expected.attention_mask)


def test_loaded_in_inference_mode_used_outside(bank, device):
    with torch.inference_mode():
        fused, positions = bank.working_set(device, 12 * row_bytes(bank)).load([3])
    prompt = torch.zeros(1, 1, WIDTH, device=device, requires_grad=True)
    ids, cu_demos = torch.tensor(positions, device=device), torch.tensor([0, 1], device=device)
    out = ops.prefix_splice(
        fused.rows, fused.offsets, ids, cu_demos, prompt, length=4, bank_scale=fused.scale
    )
    out.embeddings.sum().backward()
    assert torch.equal(prompt.grad, torch.ones_like(prompt))


def test_bad_arguments(bank):
    for max_bytes in (row_bytes(bank) - 1, -1, 1e6, True, None):
        with pytest.raises(ValueError, match=f"expected at least one row's {row_bytes(bank)}"):
            bank.working_set("cpu", max_bytes)
    working_set = bank.working_set("cpu", row_bytes(bank))
    for id in (-1, 50):
        with pytest.raises(IndexError, match=f"ids has {id}, expected 0 to 49"):
            working_set.load([1, id])
    with pytest.raises(TypeError):
        working_set.load([1.5])
    assert_loaded(bank, [1, 0], *working_set.load([1, 0]))
