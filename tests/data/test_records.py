"""Records of files and rows: what is read, when, and how what is bad is named."""

import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

import mmicl_kernels as mk
from mmicl_kernels.data import BadRecord, Demonstration, ImageFile, Record, Records, as_records
from mmicl_kernels.data import lines as lines_module
from mmicl_kernels.data.decoding import decode_image
from mmicl_kernels.data.records import BUCKETS, text_pieces

LINES = [
    {"id": "a", "image": "1.png", "text": "what?", "answer": "red", "answers": ["red", "rot"]},
    {
        "id": 7,
        "images": ["2.png", "1.png"],
        "text": "{image} or {image}?",
        "answer": "",
        "choices": ["x", "y"],
    },
    {"image": [], "text": "", "answer": "é\n", "answers": None, "choices": None, "unknown": {}},
]


@pytest.fixture
def write(tmp_path):
    """Writes lines beside images whose bytes are their names; returns the file."""
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(name.encode())

    def write(*lines, name="data.jsonl"):
        made = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        (tmp_path / name).write_bytes(b"\n".join(made))
        return tmp_path / name

    return write


def line(i, **fields):
    return {"image": "1.png", "text": f"text {i}", "answer": "x", **fields}


def test_records_of_a_file(write, tmp_path):
    file = write(LINES[0], b"", LINES[1], b"  \r", LINES[2])
    records = Records(file)
    assert len(records) == 3 and repr(records) == f"Records({str(file)!r}, 3 records)"
    first, second, third = (ImageFile(tmp_path, name) for name in ("1.png", "2.png", "1.png"))
    assert records[0] == Record("a", (first,), "what?", "red", ("red", "rot"))
    assert records[1] == Record("7", (second, third), "{image} or {image}?", "", None, ("x", "y"))
    assert records[2] == Record("5", (), "", "é\n")  # the number of its line
    assert records[-1] == records[2] and records[1:] == [records[1], records[2]]
    assert [record.id for record in records] == ["a", "7", "5"]
    assert records[1].place == f"{file}:3"
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"index is {index}, expected -3 to 2"):
            records[index]


def test_demonstration(write):
    records = Records(write(*LINES))
    assert records[1].demonstration() == Demonstration((b"2.png", b"1.png"), "{image} or {image}?", "")
    assert mk.Demonstration is Demonstration and mk.Records is Records


def test_images_elsewhere(write, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(b"elsewhere")
    file = write(line(0))
    assert Records(file, images=tmp_path / "other")[0].image_bytes() == (b"elsewhere",)
    with pytest.raises(FileNotFoundError, match="none does not exist, expected the folder of the images"):
        Records(file, images=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none does not exist, expected a file of JSON lines"):
        Records(tmp_path / "none")


BAD = [
    (b"{", "bad JSON"),
    (b"3", "bad JSON: it is a int, expected an object"),
    (b"\xff{}", "bad JSON"),
    (line(0, text=None), "missing field: text is missing, expected a string, which may be empty"),
    (line(0, answer=3), "bad field: answer is 3, expected a string"),
    (line(0, text=["x"]), "bad field: text is ['x'], expected a string"),
    (line(0, image=None), "missing field: image and images are missing, expected one; [] for no image"),
    (line(0, images=["1.png"]), "bad field: image and images are both there, expected one of them"),
    (line(0, image=None, images="1.png"), "bad field: images is '1.png', expected a list"),
    (line(0, image=[4]), "bad field: image is 4, expected a file's name"),
    (line(0, image={"bytes": "x", "path": "1.png"}), "bad field: image is {'bytes': 'x'"),
    (line(0, image={"path": None}), "bad field: image is {'path': None}"),
    (line(0, answers="red"), "bad field: answers is 'red', expected a list of at least one string"),
    (line(0, answers=[]), "bad field: answers is (), expected a list of at least one string"),
    (line(0, answers=["a", 1]), "bad field: answers[1] is 1, expected a string"),
    (line(0, choices={"a": "b"}), "bad field: choices is {'a': 'b'}, expected a list"),
    (line(0, id=True), "bad field: id is True, expected a string or an integer"),
    (line(0, id=1.5), "bad field: id is 1.5, expected a string or an integer"),
    (line(0, id=""), "bad field: id is '', expected a name"),
    (line(0, text="{image} {image}"), "bad field: text '{image} {image}' has {image} 2 times, "
     "expected never or once for each of its 1 images"),
    (line(0, text="\ud800"), "not Unicode: text is '\\ud800'"),
    (line(0, choices=["\udfff"]), "not Unicode: choices[0] is '\\udfff'"),
    (line(0, id="first"), "duplicate id: id is 'first', which line 1 has already"),
]  # fmt: skip


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_lines(write, bad, message):
    good = [line(1, id="first"), b"", line(2)]
    file = write(good[0], bad, *good[1:])
    with pytest.raises(BadRecord) as error:
        Records(file)
    assert str(error.value).startswith(f"{file}:2: {message}")
    records = Records(file, skip_bad=True)
    assert [record.text for record in records] == ["text 1", "text 2"]
    assert records.skipped == {error.value.reason: 1}
    assert records[1].id == "4"  # lines keep their numbers


def test_images_that_cannot_be_read(write, tmp_path):
    (tmp_path / "set").mkdir()
    file = write(line(0), line(1, image="2.png"), line(2, image="../1.png"), line(3, image="/1.png"))
    records = Records(file, images=tmp_path / "set")  # does not look at them
    for i, message in enumerate(
        ["missing image: '1.png'", "missing", "path outside: '../1.png'", "path out"]
    ):
        with pytest.raises(BadRecord) as error:
            records[i].demonstration()
        assert str(error.value).startswith(f"{file}:{i + 1}: {message}")
    (tmp_path / "set" / "2.png").write_bytes(b"there")
    records = Records(file, images=tmp_path / "set", skip_bad=True)
    assert [record.image_bytes() for record in records] == [(b"there",)]
    assert records.skipped == {"missing image": 1, "path outside": 2}
    (tmp_path / "set" / "2.png").unlink()
    (tmp_path / "set" / "2.png").symlink_to(tmp_path / "2.png")
    with pytest.raises(BadRecord, match="path outside"):
        records[0].image_bytes()


def test_every_repeated_id_is_found(write, monkeypatch):
    rows = [line(i, id=f"id {i % 600}") for i in range(1000)]
    records = Records(write(*rows), skip_bad=True)
    assert [record.text for record in records] == [f"text {i}" for i in range(600)]
    assert records.skipped == {"duplicate id": 400}
    with pytest.raises(BadRecord, match=r"data\.jsonl:601: duplicate id: id is 'id 0', which line 1 has"):
        Records(write(*rows))
    with pytest.raises(BadRecord, match="data.jsonl:3: duplicate id: id is '3', which line 1 has already"):
        Records(write(line(0, id=3), line(1), line(2)))  # the third is named by its number
    # Equal hashes of different ids are no repetition.
    monkeypatch.setattr(builtins, "hash", lambda value: 5)
    assert len(Records(write(*rows[:600]))) == 600
    assert Records(write(*rows[:601]), skip_bad=True).skipped == {"duplicate id": 1}


def test_long_lines(write, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 200)
    file = write(line(0), line(1, text="a" * 1000), line(2))
    records = Records(file, skip_bad=True)
    assert [record.id for record in records] == ["1", "3"] and records.skipped == {"line too long": 1}
    with pytest.raises(BadRecord, match=r":2: line too long: expected at most 200 bytes"):
        Records(file)


class Counting(io.FileIO):
    """A file that counts the bytes that are read from it."""

    read_bytes = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counting.read_bytes += count
        return count


def test_opening_reads_once_and_an_access_one_line(write, monkeypatch):
    file = write(*[line(i, text="x" * 1000) for i in range(500)])
    size = os.path.getsize(file)

    def counted(path, mode="r", *arguments, **options):
        assert os.fspath(path) == str(file) and mode == "rb"
        return io.BufferedReader(Counting(path, "rb"), 256)

    monkeypatch.setattr(builtins, "open", counted)
    Counting.read_bytes = 0
    records = Records(file)
    assert Counting.read_bytes == size
    Counting.read_bytes = 0
    assert records[400].text == "x" * 1000
    assert Counting.read_bytes < 2500


def test_memory_does_not_have_the_text(write):
    count, size = 4000, 2000
    file = write(*[line(i, text="x" * size) for i in range(count)])
    Records(file)
    tracemalloc.start()
    records = Records(file)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == count
    arrays = 16 * count * 1.125 + 10_000  # arrays have up to an eighth to spare
    assert kept < arrays + 64 * BUCKETS and peak < 40 * count + 150 * BUCKETS + 100_000
    assert len(pickle.dumps(records)) < 16 * count + 1000


def test_a_file_that_changed_is_refused(write):
    file = write(*LINES)
    records = Records(file)
    write(*LINES, LINES[0])
    with pytest.raises(ValueError, match=r"data\.jsonl has changed since it was opened"):
        records[0]


def test_threads_and_pickles(write):
    records = Records(write(*[line(i) for i in range(300)]))
    copied = pickle.loads(pickle.dumps(records))
    assert list(copied) == list(records)
    order = [i * 7 % 300 for i in range(3000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: records[i].text, order))
    assert found == [f"text {i}" for i in order]
    error = pickle.loads(pickle.dumps(BadRecord("reason", "detail", "place")))
    assert str(error) == "place: reason: detail" and error.reason == "reason"


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_rows_with_images_of_every_kind(write, tmp_path, monkeypatch):
    write()
    red = Image.new("RGB", (3, 2), "red")
    images = [
        "1.png",
        tmp_path / "1.png",
        b"bytes",
        red,
        {"bytes": b"x", "path": "y"},
        {"bytes": None, "path": "2.png"},
    ]
    monkeypatch.chdir(tmp_path)
    records = as_records([line(i, image=image) for i, image in enumerate(images)])
    found = [record.image_bytes()[0] for record in records]
    assert found == [b"1.png", b"1.png", b"bytes", png(red), b"x", b"2.png"]
    assert [record.id for record in records] == list("012345")
    monkeypatch.chdir("/")
    (record,) = as_records([line(0, image=[{"path": "2.png"}, red])], images=tmp_path)
    assert record.image_bytes() == (b"2.png", png(red))
    with pytest.raises(BadRecord, match=r"row 0: path outside: '/etc/x' leads out of"):
        as_records([line(0, image="/etc/x")], images=tmp_path)[0].image_bytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_a_pillow_image_shows_what_its_file_shows(mode):
    """Its bytes decode to what a bank and a prompt see of the file that Pillow would write of it."""
    ramp = Image.linear_gradient("L").resize((16, 9))
    if mode == "I;16":
        image = Image.frombytes(mode, (16, 9), bytes(range(144)) * 2)
    else:
        image = ramp.convert("RGB").convert(mode) if mode not in ("1", "L", "F") else ramp.convert(mode)
    (record,) = as_records([line(0, image=image)])
    (data,) = record.image_bytes()
    with Image.open(io.BytesIO(data)) as read:
        assert read.size == (16, 9)
        if mode not in ("I;16", "F"):
            assert read.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    if mode == "F":
        with pytest.raises(ValueError, match="floats"):
            decode_image(data, "x")
    elif mode == "I;16":
        values = list(decode_image(data, "x").tobytes()[::3])
        stored = bytes(range(144)) * 2
        samples = [stored[i] + 256 * stored[i + 1] for i in range(0, 288, 2)]
        assert values == [(x * 255 + 32767) // 65535 for x in samples]
    else:
        decode_image(data, "x")


def test_the_orientation_of_a_pillow_image_is_kept():
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    file = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(file, "JPEG", exif=exif)
    (record,) = as_records([line(0, image=Image.open(file))])
    assert (
        decode_image(record.image_bytes()[0], "x").size == (4, 8) == decode_image(file.getvalue(), "x").size
    )


def test_a_pillow_image_is_loaded_at_once(tmp_path):
    """An open file would be shared by forked workers, and a damaged one is an error here, not there."""
    Image.linear_gradient("L").save(tmp_path / "a.png")
    records = as_records([line(0, image=Image.open(tmp_path / "a.png"))])
    os.remove(tmp_path / "a.png")
    assert decode_image(records[0].image_bytes()[0], "x").size == (256, 256)
    noise = Image.effect_noise((64, 64), 90)
    (tmp_path / "b.png").write_bytes(png(noise)[:900])
    with pytest.raises(BadRecord, match="row 0: unreadable image"):
        as_records([line(0, image=Image.open(tmp_path / "b.png"))])


class Table:
    """As a HuggingFace Dataset: rows by number, columns by name, and all that is read is counted."""

    def __init__(self, rows):
        self.rows, self.read = rows, []
        self.column_names = sorted({key for row in rows for key in row})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        self.read.append(key)
        if isinstance(key, str):
            return [row.get(key) for row in self.rows]
        return {name: self.rows[key].get(name) for name in self.column_names}  # None for what is not there


def test_a_table(tmp_path):
    red = Image.new("RGB", (3, 2), "red")
    table = Table([line(0, image=red, id=5, answers=["x"]), line(1, image=red), line(2, image=3)])
    records = as_records(table)
    assert table.read == ["id"] and len(records) == 3
    assert records[0] == Record("5", (red,), "text 0", "x", ("x",)) and table.read == ["id", 0]
    assert [record.id for record in records[:2]] == ["5", "1"] and records[-2].text == "text 1"
    with pytest.raises(BadRecord, match="row 2: bad field: image is 3"):
        records[2]
    with pytest.raises(IndexError, match="index is 3, expected -3 to 2"):
        records[3]
    with pytest.raises(BadRecord, match="row 2: duplicate id: id is '0', which row 0 has already"):
        as_records(Table([line(0), line(1), line(2, id="0")]))
    assert len(as_records(Table([line(0), line(0)]))) == 2  # no column of ids


def test_rows_are_checked(write, tmp_path):
    with pytest.raises(BadRecord, match="row 1: missing field: text is missing"):
        as_records([line(0), {"image": []}])
    with pytest.raises(BadRecord, match="row 1: duplicate id: id is 'a', which row 0 has already"):
        as_records((line(0, id="a"), line(1, id="a")))
    with pytest.raises(TypeError, match="row 0 is a str, expected a dict or a Record"):
        as_records(["x"])
    record = Record("a", (), "", "")
    assert as_records([record])[0] is record
    records = Records(write(*LINES))
    assert as_records(records) is records
    assert list(as_records(str(records.file))) == list(records)
    with pytest.raises(TypeError, match="images is 'x', expected None: these records have"):
        as_records(records, images="x")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        as_records([], images=tmp_path / "none")
    for source in (3, iter([]), b"x", {"train": [], "test": []}):
        with pytest.raises(TypeError, match="expected a path, Records, or a sequence of rows"):
            as_records(source)
    with pytest.raises(TypeError, match="source is a dict of 'train', 'test'"):
        as_records({"train": [], "test": []})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "{image}",
        "{{image}}",
        "{{{image}}}",
        "{image}}",
        "{{image}",
        "{ image}",
        "{image}{{image}}{image}",
    ],
)
def test_placeholders_are_those_of_prompts(text):
    record = Record("a", (b"x",) * (len(text_pieces(text)) - 1), text, "")
    assert record.text == text


def test_record_checks_what_it_is_given():
    for fields, message in [
        ({"id": 3}, "id is 3, expected a string"),
        ({"images": [b""]}, "images is .*, expected a tuple"),
        ({"answers": ["a"]}, "answers is .*, expected a list of at least one string, or none"),
        ({"text": None}, "text is None, expected a string"),
    ]:
        with pytest.raises(BadRecord, match=message):
            Record(**{"id": "a", "images": (), "text": "", "answer": "", **fields})


def test_data_needs_nothing_but_python():
    blocked = ["torch", "numpy", "PIL", "transformers", "safetensors", "tqdm"]
    script = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import mmicl_kernels.data, mmicl_kernels.data.formats\n"
        "from mmicl_kernels.data import as_records\n"
        "print(as_records([{'image': [b'x'], 'text': 'a', 'answer': 'b'}])[0].demonstration())\n"
        "print({x.split('.')[1] for x in sys.modules if x.startswith('mmicl_kernels.')})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Demonstration(text='a', answer='b')", "{'data'}"], done.stderr
