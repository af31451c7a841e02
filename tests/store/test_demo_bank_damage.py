"""Banks that are damaged, or made to harm: a CheckpointError or a finding, never anything else."""

import hashlib
import json
import os
import pickle
import zlib
from dataclasses import asdict

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.store.bank_files import RECORD
from tests.store import vectors
from tests.store.banks import (
    DTYPES,
    adapter,
    add,
    assert_holds,
    demonstration,
    filled,
    records_of,
    tokens,
    write_records,
)
from tests.store.crashes import in_child
from tests.store.vectors import WIDTH

FILES = ("rows.bin", "means.bin", "texts.bin", "index.bin", "bank.json")


def flipped(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def look_at_all(bank):
    """Whatever a reader may do. Raises what it meets."""
    fused = bank.fused
    fused.rows.sum(), bank.lengths, bank.nearest(torch.ones(WIDTH), 3), bank.find(demonstration(1))
    for id in range(len(bank)):
        bank.tokens(id), bank.text(id), bank.mean(id)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_changed_byte_of_the_data_is_found(tmp_path, dtype):
    """By ``verify``, which names the file, and by whoever reads that demonstration; the others are sound."""
    bank = filled(tmp_path, dtype)
    expected = [(bank.tokens(id), bank.mean(id), bank.text(id)) for id in range(7)]
    names = ("rows.bin", "means.bin", "texts.bin", *(("scales.bin",) if dtype == torch.int8 else ()))
    for name in names:
        path, generator = tmp_path / name, torch.Generator().manual_seed(0)
        good = path.read_bytes()
        for _ in range(20):
            position, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(good), 8))
            flipped(path, position, bit)
            problems = bank.verify()
            assert len(problems) == 1 and ("rows.bin" if name == "scales.bin" else name) in problems[0]
            damaged = int(problems[0].split("demonstration ")[1].split()[0])
            reader = mk.DemonstrationBank(tmp_path)
            for id, (rows, mean, text) in enumerate(expected):
                if id != damaged:
                    assert torch.equal(reader.tokens(id), rows) and torch.equal(reader.mean(id), mean)
                    assert reader.text(id) == text
            with pytest.raises(mk.CheckpointError, match=f"of demonstration {damaged} "):
                look_at_all(reader)
            path.write_bytes(good)
    assert bank.verify() == []


def test_every_changed_byte_of_the_index_is_seen(tmp_path):
    """In the last call's record it is the torn end of a killed writer; before, it is damage."""
    filled(tmp_path)
    path, generator = tmp_path / "index.bin", torch.Generator().manual_seed(0)
    good = path.read_bytes()
    for number in range(140):
        id, position = number % 7, int(torch.randint(RECORD.size, (), generator=generator))
        flipped(path, id * RECORD.size + position, number % 8)
        if id == 6:
            bank = mk.DemonstrationBank(tmp_path)
            assert len(bank) == 6 and bank.verify() == []
        else:
            with pytest.raises(mk.CheckpointError, match=f"record {id} is not sound"):
                mk.DemonstrationBank(tmp_path)
        path.write_bytes(good)


def test_every_changed_byte_of_the_description_is_seen(tmp_path):
    bank, path = filled(tmp_path), tmp_path / "bank.json"
    good, harmless = path.read_bytes(), 0
    for position in range(0, len(good), 5):
        flipped(path, position, position % 8)
        try:
            reader = mk.DemonstrationBank(tmp_path)
            assert (reader.digest, reader.dtype, reader.backbone) == (bank.digest, bank.dtype, bank.backbone)
            harmless += 1
        except mk.CheckpointError:
            assert len(bank.verify()) == 1
        path.write_bytes(good)
    assert harmless < 5  # spaces between the parts


@pytest.mark.parametrize("name", ["rows.bin", "means.bin", "texts.bin"])
def test_files_that_are_too_short(tmp_path, name):
    """To map more than there is would end the process at the first touch."""
    bank = filled(tmp_path)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    with pytest.raises(mk.CheckpointError, match=f"{name} has .* bytes, expected at least"):
        mk.DemonstrationBank(tmp_path)
    assert len(bank.verify()) == 1
    with pytest.raises(mk.CheckpointError, match=f"{name} has .* bytes"):
        add(bank, 9)


@pytest.mark.parametrize("name", ["rows.bin", "means.bin", "texts.bin"])
def test_files_that_are_shortened_while_they_are_open(tmp_path, name):
    """An error as well, in a process of its own because SIGBUS is what it must not get."""
    bank = filled(tmp_path)
    os.truncate(tmp_path / name, 0)

    def work():
        with pytest.raises(mk.CheckpointError, match="it was shortened while it was open"):
            look_at_all(bank)
        if name == "rows.bin":
            with pytest.raises(mk.CheckpointError, match="it was shortened"):
                bank.working_set("cpu", 1000).load([1])

    assert os.waitpid(in_child(work), 0)[1] == 0


def test_an_index_that_is_shortened(tmp_path):
    bank = filled(tmp_path)
    os.truncate(tmp_path / "index.bin", 3 * RECORD.size)
    for call in (bank.refresh, lambda: add(bank, 9)):
        with pytest.raises(mk.CheckpointError, match="expected the 7 records read before"):
            call()
    assert_holds(bank, 6, 6)
    assert len(mk.DemonstrationBank(tmp_path)) == 3


@pytest.mark.parametrize("name", [*FILES, "scales.bin"])
@pytest.mark.parametrize("kind", ["missing", "link", "dangling link", "folder", "pipe"])
def test_what_is_no_regular_file(tmp_path, name, kind):
    """A link could lead a writer to another file, a pipe would make a reader wait for ever."""
    folder, elsewhere = tmp_path / "bank", tmp_path / "elsewhere"
    bank = filled(folder, torch.int8)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind == "link":
        elsewhere.write_bytes(content + b"another's")
    if "link" in kind:
        (folder / name).symlink_to(elsewhere)
    elif kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    for call in (lambda: mk.DemonstrationBank(folder), lambda: add(bank, 9)):
        error = FileNotFoundError if (name, kind) == ("bank.json", "missing") else mk.CheckpointError
        with pytest.raises(error, match=name):
            call()
    assert len(bank.verify()) == 1 and name in bank.verify()[0]
    if kind == "link":
        assert elsewhere.read_bytes() == content + b"another's"
    if "link" in kind:
        with pytest.raises(FileExistsError):
            mk.DemonstrationBank.create(folder, adapter())


BAD_RECORDS = {
    "rows that decrease": {"end_row": 1},
    "rows before the first": {"end_row": -5},
    "more rows than the file has": {"end_row": 10**6},
    "more rows than can be counted": {"end_row": 2**63 - 1},
    "text before the last": {"text_end": 3},
    "text after its answer": {"text_end": 100, "answer_end": 90},
    "negative text": {"answer_end": -(2**63)},
    "more text than the file has": {"answer_end": 2**62},
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_records_with_right_checksums_that_lie(tmp_path, case):
    filled(tmp_path)
    records = records_of(tmp_path)
    for id in (3, 6):
        changed = {
            name: value if abs(value) >= 10**6 or value < 0 else getattr(records[id - 1], name) - 1
            for name, value in BAD_RECORDS[case].items()
        }
        write_records(tmp_path, [*records[:id], records[id]._replace(**changed), *records[id + 1 :]])
        with pytest.raises(mk.CheckpointError, match="decrease|bytes, expected at least"):
            mk.DemonstrationBank(tmp_path)


def test_one_content_twice(tmp_path):
    """No writer of ours does it; the first id counts."""
    filled(tmp_path)
    records = records_of(tmp_path)
    write_records(tmp_path, [*records[:6], records[6]._replace(digest=records[2].digest)])
    bank = mk.DemonstrationBank(tmp_path)
    assert bank.find(demonstration(2)) == 2 and bank.find(demonstration(6)) is None


def test_text_that_is_none(tmp_path):
    filled(tmp_path)
    path, records = tmp_path / "texts.bin", records_of(tmp_path)
    data = path.read_bytes()
    begin, end = records[2].answer_end, records[3].answer_end
    path.write_bytes(data[:begin] + b"\xff" * (end - begin) + data[end:])
    records[3] = records[3]._replace(text_crc=zlib.crc32(b"\xff" * (end - begin)))
    write_records(tmp_path, records)
    with pytest.raises(mk.CheckpointError, match="demonstration 3 is no text"):
        mk.DemonstrationBank(tmp_path).text(3)
    assert len(mk.DemonstrationBank(tmp_path).verify()) == 1


def described(folder, **changes):
    """``bank.json`` with ``changes`` and a right checksum."""
    path = folder / "bank.json"
    outer = json.loads(path.read_text())
    text = json.dumps({**json.loads(outer["bank"]), **changes})
    path.write_text(json.dumps({**outer, "bank": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


BACKBONE = asdict(vectors.BACKBONE)
BAD_DESCRIPTIONS = {
    "an unknown dtype": {"dtype": "float64"},
    "a dtype that is a list": {"dtype": ["float32"]},
    "a digest that is a path": {"digest": "../" * 21 + "x"},
    "a digest that is a number": {"digest": 1},
    "a short key": {"key": "00"},
    "an unknown field": {"path": "/etc/passwd"},
    "no backbone": {"backbone": None},
    "a negative width": {"backbone": {**BACKBONE, "hidden_size": -8}},
    "a huge width": {"backbone": {**BACKBONE, "hidden_size": 10**30}},
    "a width that is true": {"backbone": {**BACKBONE, "hidden_size": True}},
    "an infinite fingerprint": {"backbone": {**BACKBONE, "fingerprint": [1e400]}},
    "layers that are a list": {"backbone": {**BACKBONE, "layers": [1]}},
}


@pytest.mark.parametrize("case", BAD_DESCRIPTIONS)
def test_descriptions_with_right_checksums_that_lie(tmp_path, case):
    filled(tmp_path)
    described(tmp_path)
    assert len(mk.DemonstrationBank(tmp_path)) == 7
    described(tmp_path, **BAD_DESCRIPTIONS[case])
    with pytest.raises(mk.CheckpointError, match="bank.json"):
        mk.DemonstrationBank(tmp_path)


@pytest.mark.parametrize("width", [4, 16])
def test_another_width_than_the_rows(tmp_path, width):
    """Where the files are long enough, nothing tells but the checksums; out of bounds nothing is read."""
    filled(tmp_path)
    described(tmp_path, backbone={**BACKBONE, "hidden_size": width})
    if width == 4:
        assert len(mk.DemonstrationBank(tmp_path).verify()) >= 5
    else:
        with pytest.raises(mk.CheckpointError, match="bytes, expected at least"):
            mk.DemonstrationBank(tmp_path)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"[" * 10**5, b"\xff\xfe", b"NaN", pickle.dumps(Harm()), b'{"format": "1"}'],
    ids=str,
)  # fmt: skip
def test_descriptions_that_are_none(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "bank")
    for name in FILES:
        good = (tmp_path / "bank" / name).read_bytes()
        (tmp_path / "bank" / name).write_bytes(content)
        if name == "index.bin":  # what is no whole record is none
            assert len(mk.DemonstrationBank(tmp_path / "bank")) == 0
        elif name == "bank.json" or len(content) < len(good):
            with pytest.raises(mk.CheckpointError):
                mk.DemonstrationBank(tmp_path / "bank")
        (tmp_path / "bank" / name).write_bytes(good)
    assert not (tmp_path / "harmed").exists()


def test_damage_does_not_hide_the_others_from_a_search(tmp_path):
    bank = filled(tmp_path)
    expected = [id for _, id in bank.nearest(tokens(4), 7)]
    means = torch.frombuffer(bytearray((tmp_path / "means.bin").read_bytes()), dtype=torch.float32).clone()
    for value in (torch.nan, torch.inf, torch.finfo(torch.float32).max):
        means[3 * WIDTH : 4 * WIDTH] = value
        (tmp_path / "means.bin").write_bytes(means.numpy().tobytes())
        found = [id for _, id in mk.DemonstrationBank(tmp_path).nearest(tokens(4), 7)]
        assert [id for id in found if id != 3] == [id for id in expected if id != 3]
        assert (3 in found) == bool(means[3 * WIDTH].isfinite())


def test_a_bank_larger_than_the_memory(tmp_path):
    """One demonstration of 2^34 rows, 512 GiB in a file that takes none: mapped, and its end is read."""
    mk.DemonstrationBank.create(tmp_path, adapter(), torch.float32)
    bank = mk.DemonstrationBank(tmp_path)
    add(bank, 1)
    (record,) = records_of(tmp_path)
    write_records(tmp_path, [record._replace(end_row=2**34)])
    os.truncate(tmp_path / "rows.bin", 2**34 * WIDTH * 4)
    bank = mk.DemonstrationBank(tmp_path)
    assert bank.fused.rows.shape == (2**34, WIDTH)
    assert torch.equal(bank.fused.rows[0], tokens(1)[0]) and not bool(bank.fused.rows[-1].any())
    assert add(bank, 2) == [1]
    assert torch.equal(bank.tokens(1), tokens(2))
