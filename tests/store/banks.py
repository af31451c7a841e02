"""Small demonstrations to store, each known by its number."""

import os

import torch

import mmicl_kernels as mk
from mmicl_kernels.store.bank_files import RECORD, Record
from tests.store.vectors import BACKBONE, WIDTH

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def adapter(value=0.5):
    """An AIM adapter that is the same in every process."""
    made = mk.AIMAdapter(mk.AIMConfig(), BACKBONE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def demonstration(number):
    return mk.Demonstration((b"image %d" % number, b"another"), f"question {number}", f"answer {number}")


def tokens(number, rows=None):
    """Fused tokens ``[number % 5, C]`` fp32, or of ``rows`` rows."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number % 5 if rows is None else rows, WIDTH, generator=generator)


def add(bank, *numbers):
    return bank.add([demonstration(n) for n in numbers], [tokens(n) for n in numbers])


def filled(folder, dtype=torch.float32, calls=((0, 1, 2), (3,), (4, 5), (6,))):
    """A bank whose demonstrations have their number as id."""
    bank = mk.DemonstrationBank.create(folder, adapter(), dtype)
    for numbers in calls:
        assert add(bank, *numbers) == list(numbers)
    return bank


def hollow(folder, made, dtype, count, length):
    """The folder of a bank of ``count`` demonstrations of ``length`` rows, which are holes in their files."""
    bank = mk.DemonstrationBank.create(folder, made, dtype)
    records = []
    for n in range(count):
        digest = (n * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") + bytes(24)
        records.append(Record(length * (n + 1), 8 * n + 4, 8 * n + 8, 0, digest, 0, 0, 0))
    write_records(folder, records)
    row = bank.hidden_size * dtype.itemsize
    for name, size in (("rows", length * row), ("means", 4 * bank.hidden_size), ("texts", 8)):
        os.truncate(folder / f"{name}.bin", count * size)
    return folder


def records_of(folder):
    raw = (folder / "index.bin").read_bytes()
    whole = raw[: len(raw) // RECORD.size * RECORD.size]
    return [Record(*fields[:-1]) for fields in RECORD.iter_unpack(whole)]


def write_records(folder, records):
    """Records with right checksums, whatever they say."""
    (folder / "index.bin").write_bytes(b"".join(record.pack() for record in records))


def assert_holds(bank, id, number):
    """Demonstration ``id`` of an fp32 bank is whole, and that of ``number``."""
    assert torch.equal(bank.tokens(id), tokens(number)), (id, number)
    assert bank.text(id) == (f"question {number}", f"answer {number}")
    assert bank.find(demonstration(number)) == id
    expected = tokens(number).double().mean(0).float() if number % 5 else torch.zeros(WIDTH)
    assert torch.equal(bank.mean(id), expected)
