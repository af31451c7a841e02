"""`mmicl data`: from the folder of the official files to a file of records."""

import copy
import json
import os

import pytest

from mmicl_kernels.cli import main
from mmicl_kernels.data import Records
from mmicl_kernels.data.formats import FORMATS
from tests.support.official import FILES, MEMES, ROWS, write_images, write_official


@pytest.fixture
def mmicl_data(run):
    """Runs the command; its exit code, lines of output and own messages."""

    def of_data(*arguments):
        code, out, err = run("data", *arguments)
        return code, out.splitlines(), [x for x in err.splitlines() if "mmicl data:" in x]

    return of_data


@pytest.fixture
def official(tmp_path):
    """Writes the official files of a format and its images into a folder, and returns that."""

    def official(format, files=None, images=None):
        source = tmp_path / "source"
        write_official(source, FILES[format] if files is None else files)
        write_images(source if images is None else images, ROWS[format])
        return source

    return official


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def within(rows, folder):
    return [{**row, "image": f"{folder}{row['image']}"} for row in rows]


@pytest.mark.parametrize("format", FORMATS)
def test_convert_then_read(mmicl_data, official, tmp_path, format):
    source, out = official(format), tmp_path / "train.jsonl"
    count = len(ROWS[format])
    code, output, errors = mmicl_data(format, source, "--split", "train", "--out", out)
    assert (code, output, errors) == (0, [f"{count} records in {out}, 0 skipped"], [])
    assert lines_of(out) == within(ROWS[format], "source/")
    for record, row in zip(Records(out), ROWS[format], strict=True):
        assert record.image_bytes() == (row["image"].encode(),)
        assert (record.id, record.answers) == (row["id"], tuple(row["answers"]))
    assert sorted(os.listdir(tmp_path)) == ["source", "train.jsonl"]


def test_into_the_folder_of_the_official_files(mmicl_data, official):
    source = official("vqav2")
    assert mmicl_data("vqav2", source, "--split", "train", "--out", source / "vqa.jsonl")[0] == 0
    assert lines_of(source / "vqa.jsonl") == ROWS["vqav2"]


def test_images_elsewhere(mmicl_data, official, tmp_path):
    source, images = official("coco", images=tmp_path / "deep" / "images"), tmp_path / "deep" / "images"
    given = ["coco", source, "--split", "train", "--images", images]
    assert mmicl_data(*given, "--out", tmp_path / "a.jsonl")[0] == 0
    assert lines_of(tmp_path / "a.jsonl") == within(ROWS["coco"], "deep/images/")
    # What is not in the output's folder nobody would read: then names are relative to the images.
    (tmp_path / "out").mkdir()
    code, output, _ = mmicl_data(*given, "--out", tmp_path / "out" / "a.jsonl")
    note = f"names of images are relative to {images}: give it as --images with this file"
    assert code == 0 and output[1] == note
    assert lines_of(tmp_path / "out" / "a.jsonl") == ROWS["coco"]
    (record,) = Records(tmp_path / "out" / "a.jsonl", images=images)
    assert record.image_bytes() == (ROWS["coco"][0]["image"].encode(),)


def test_a_link_to_images_elsewhere(mmicl_data, official, tmp_path):
    """Its files are not in the output's folder either."""
    source = official("flickr30k", images=tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").symlink_to(tmp_path / "elsewhere")
    given = ["--images", tmp_path / "out" / "images", "--out", tmp_path / "out" / "a.jsonl"]
    code, output, _ = mmicl_data("flickr30k", source, "--split", "train", *given)
    assert code == 0 and len(output) == 2
    records = Records(tmp_path / "out" / "a.jsonl", images=tmp_path / "out" / "images")
    assert len([record.image_bytes() for record in records]) == 2


def test_bad_records_and_missing_images(mmicl_data, official, tmp_path):
    files = copy.deepcopy(FILES["vqav2"])
    questions, annotations = files.values()
    del questions["questions"][0]["image_id"]
    annotations["annotations"].append({"question_id": 9, "answers": [{"answer": "x"}]})
    questions["questions"] += [{"question_id": 9, "image_id": 5, "question": f"{i}?"} for i in range(2)]
    questions["questions"].append(questions["questions"][1])
    source, out = official("vqav2", files), tmp_path / "out.jsonl"
    given = ["vqav2", source, "--split", "train", "--out", out]
    out.write_text("as it was")
    code, output, errors = mmicl_data(*given)
    name = source / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert (code, output, out.read_text()) == (1, [], "as it was")
    assert errors == [
        f"mmicl data: {name}: questions[0]: missing field: image_id is missing, expected an integer"
    ]
    code, output, errors = mmicl_data(*given, "--skip-bad")
    reasons = "1 missing field, 2 missing image, 1 duplicate id"
    assert (code, output) == (0, [f"2 records in {out}, 4 skipped: {reasons}"])
    image = "source/train2014/COCO_train2014_000000000005.jpg"
    assert [x.removeprefix(f"mmicl data: skipped: {name}: ") for x in errors] == [
        "questions[0]: missing field: image_id is missing, expected an integer",
        f"questions[3]: id 9: missing image: '{image}' is no file in {tmp_path}",
        "questions[5]: id 458752001: duplicate id: an earlier record has it already",
    ]
    assert lines_of(out) == within(ROWS["vqav2"][1:], "source/")
    assert len(Records(out)) == 2


def test_a_missing_image_is_an_error(mmicl_data, official, tmp_path):
    source = official("hateful-memes")
    (source / "img" / "23058.png").unlink()
    code, output, errors = mmicl_data("hateful-memes", source, "--split", "train", "--out", tmp_path / "a")
    assert (code, output, len(errors)) == (1, [], 1)
    assert f"{source / 'train.jsonl'}:2: id 23058: missing image: 'source/img/23058.png' is no" in errors[0]
    assert os.listdir(tmp_path) == ["source"]


def test_what_no_reader_would_accept_is_not_written(mmicl_data, official, tmp_path):
    files = {"train.jsonl": [MEMES[0], {**MEMES[1], "text": "\ud800"}, {**MEMES[2], "img": "../secret.png"}]}
    source, out = official("hateful-memes", files), tmp_path / "source" / "a.jsonl"
    (tmp_path / "secret.png").write_bytes(b"")
    given = ["hateful-memes", source, "--split", "train", "--out", out, "--skip-bad"]
    assert mmicl_data(*given)[1] == [f"1 records in {out}, 2 skipped: 1 not Unicode, 1 path outside"]
    assert len(Records(out, skip_bad=True)) == 1


def test_nothing_to_write(mmicl_data, official, tmp_path):
    source, out = official("coco"), tmp_path / "a.jsonl"
    code, output, errors = mmicl_data("coco", source, "--split", "val", "--out", out)
    assert (code, output) == (1, [])
    assert errors[0].endswith("dataset_coco.json: no record of 'val': none of 0")
    (source / ROWS["coco"][0]["image"]).unlink()
    errors = mmicl_data("coco", source, "--split", "train", "--out", out, "--skip-bad")[2]
    assert errors[-1].endswith("no record of 'train': 1 missing image") and not out.exists()


def test_official_files_are_not_replaced(mmicl_data, official):
    source = official("hateful-memes", {"train.jsonl": MEMES, "dev_seen.jsonl": MEMES})
    for name in ("train", "dev_seen"):
        path = source / f"{name}.jsonl"
        before = path.read_bytes()
        code, _, errors = mmicl_data("hateful-memes", source, "--split", "train", "--out", path)
        assert code == 1 and "an official file, expected a file that may be replaced" in errors[0]
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["none", "--out", "a"], "source: none is no folder"),
        ([".", "--out", "none/a"], "--out: none is no folder"),
        ([".", "--out", "a", "--images", "none"], "--images: none is no folder"),
        (
            [".", "--out", "a"],
            "v2_OpenEnded_mscoco_train2014_questions.json does not exist, expected the official",
        ),
    ],
)
def test_errors_are_one_line(mmicl_data, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, output, errors = mmicl_data("vqav2", *options, "--split", "train")
    assert (code, output, len(errors)) == (1, [], 1) and message in errors[0]
    assert os.listdir(tmp_path) == []


def test_out_that_is_no_file(mmicl_data, official, tmp_path):
    source = official("coco")
    code, _, errors = mmicl_data("coco", source, "--split", "train", "--out", tmp_path)
    assert code == 1 and "no regular file, expected a file that may be replaced, or none" in errors[0]


@pytest.mark.parametrize(
    "arguments", [["vqav2", "x", "--out", "a"], ["mmc4", "x"], ["okvqa", "x", "--split", "test"]]
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(["data", *arguments])
    assert error.value.code == 2
    assert "required: --split" in (text := capsys.readouterr().err) or "invalid choice" in text
