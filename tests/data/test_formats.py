"""Converters of official files: what their records become, and how a bad one is named."""

import copy
import json
import os

import pytest

from mmicl_kernels.data import BadRecord, record_of
from mmicl_kernels.data.formats import FORMATS, convert, official_files
from tests.support.official import (
    ANSWERS,
    COCO_ROWS,
    FILES,
    MEMES,
    MEMES_ROWS,
    ROWS,
    TEXTS,
    VIZWIZ,
    VQA_QUESTIONS,
    write_official,
)


def converted(folder, format, files=None, split="train"):
    """Rows and bad records of a split, with their places."""
    write_official(folder, FILES[format] if files is None else files)
    return list(convert(format, official_files(format, folder, split), split))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_split(tmp_path, format):
    found = [row for _, row in converted(tmp_path, format)]
    assert found == ROWS[format]
    for row in found:
        record = record_of(row, tmp_path, 0)
        assert (record.id, record.text, record.answer) == (row["id"], row["text"], row["answer"])


def test_the_most_common_answer_and_the_first_annotators(tmp_path):
    rows = [row for _, row in converted(tmp_path, "vqav2")]
    assert rows[1]["answers"] == ANSWERS[458752001]  # "catcher" and "pitcher" twice: the first of them
    assert rows[1]["answer"] == "catcher" and rows[0]["answer"] == "net"
    questions = copy.deepcopy(FILES["vqav2"])
    answers = questions["v2_mscoco_train2014_annotations.json"]["annotations"][1]["answers"]
    answers[0]["answer"] = "first"
    row = converted(tmp_path, "vqav2", questions)[0][1]
    assert (row["answer"], row["answers"][0]) == ("net", "first")  # which MimIC's own code learns


@pytest.mark.parametrize("split", ["test", "restval", "train"])
def test_karpathys_splits(tmp_path, split):
    assert [row for _, row in converted(tmp_path, "coco", split=split)] == [COCO_ROWS[split]]
    assert converted(tmp_path, "coco", split="val") == []


@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_questions_without_annotations(tmp_path, split):
    name = f"v2_OpenEnded_mscoco_{split}2015_questions.json"
    (row, *_) = [row for _, row in converted(tmp_path, "vqav2", {name: VQA_QUESTIONS}, split)]
    image = "test2015/COCO_test2015_000000458752.jpg"
    assert row == {"id": "458752000", "image": image, "text": TEXTS[0], "answer": ""}


def test_the_folder_of_val(tmp_path):
    files = {name.replace("train", "val"): value for name, value in FILES["okvqa"].items()}
    rows = converted(tmp_path, "okvqa", files, "val")
    assert rows[2][1]["image"] == "val2014/COCO_val2014_000000262146.jpg"
    assert rows[2][0] == f"{tmp_path / 'OpenEnded_mscoco_val2014_questions.json'}: questions[2]"


def test_vizwiz_beside_the_images_and_its_test_split(tmp_path):
    assert [row for _, row in converted(tmp_path, "vizwiz", {"train.json": VIZWIZ})] == ROWS["vizwiz"]
    test = [{"image": "VizWiz_test_00000003.jpg", "question": "What is this?"}]
    ((_, row),) = converted(tmp_path, "vizwiz", {"Annotations/test.json": test}, "test")
    name = "VizWiz_test_00000003"
    assert row == {"id": name, "image": f"test/{name}.jpg", "text": "What is this?", "answer": ""}


def test_memes_of_two_files(tmp_path):
    changed = {**MEMES[2], "label": 1}
    files = {"dev_seen.jsonl": MEMES[:2], "dev_unseen.jsonl": [MEMES[1], MEMES[2], changed]}
    rows = [row for _, row in converted(tmp_path, "hateful-memes", files, "dev")]
    assert rows[:3] == MEMES_ROWS  # the second one once
    assert [row["id"] for row in rows] == ["42953", "23058", "13894", "13894"]  # another label: no repetition


def test_memes_without_labels(tmp_path):
    meme = {key: value for key, value in MEMES[0].items() if key != "label"}
    ((_, row),) = converted(tmp_path, "hateful-memes", {"test_seen.jsonl": [meme]}, "test_seen")
    assert row == {**{k: v for k, v in MEMES_ROWS[0].items() if k != "answers"}, "answer": ""}
    ((_, error),) = converted(tmp_path, "hateful-memes", {"dev_seen.jsonl": [meme]}, "dev_seen")
    assert str(error) == "missing field: label is missing, expected an integer"


REMOVED = object()
QUESTIONS, ANNOTATIONS = FILES["vqav2"]
# Format; file; where in it; what is there instead; place and message.
BROKEN = [
    ("vqav2", QUESTIONS, ("questions", 1, "image_id"), REMOVED,
     "questions[1]: missing field: image_id is missing, expected an integer"),
    ("vqav2", QUESTIONS, ("questions", 1, "question"), 7,
     "questions[1]: bad field: question is 7, expected a string"),
    ("vqav2", QUESTIONS, ("questions", 1, "question_id"), True,
     "questions[1]: bad field: question_id is True, expected an integer"),
    ("vqav2", QUESTIONS, ("questions", 1), "text",
     "questions[1]: bad field: it is 'text', expected an object"),
    ("vqav2", ANNOTATIONS, ("annotations", 2, "answers"), [],
     "annotations.json: annotations[2]: bad field: answers is [], expected at least one"),
    ("vqav2", ANNOTATIONS, ("annotations", 2, "answers", 3), {},
     "annotations.json: annotations[2]: missing field: answers[3].answer is missing, expected a string"),
    ("vqav2", ANNOTATIONS, ("annotations", 2, "question_id"), [1],
     "questions[1]: missing annotation: question_id is 458752001, expected one of those in "),
    ("vqav2", ANNOTATIONS, ("annotations", 2), None,
     "questions[1]: missing annotation: question_id is 458752001, expected one of those in "),
    ("okvqa", "mscoco_train2014_annotations.json", ("annotations", 2, "answers", 0, "answer"), 3,
     "annotations[2]: bad field: answers[0].answer is 3, expected a string"),
    ("coco", "dataset_coco.json", ("images", 2, "sentences", 1), None,
     "dataset_coco.json: images[2]: bad field: sentences[1] is None, expected an object"),
    ("coco", "dataset_coco.json", ("images", 2, "sentences", 1, "raw"), " \n",
     "images[2]: bad field: sentences[1].raw is empty, expected a caption"),
    ("coco", "dataset_coco.json", ("images", 0, "split"), REMOVED,
     "images[0]: missing field: split is missing, expected a string"),
    ("coco", "dataset_coco.json", ("images", 2, "cocoid"), "57870",
     "images[2]: bad field: cocoid is '57870', expected an integer"),
    ("flickr30k", "dataset_flickr30k.json", ("images", 2, "filename"), REMOVED,
     "dataset_flickr30k.json: images[2]: missing field: filename is missing, expected a string"),
    ("vizwiz", "Annotations/train.json", (1, "answers"), REMOVED,
     "train.json: [1]: missing field: answers is missing, expected a list"),
    ("hateful-memes", "train.jsonl", (1, "label"), 2,
     "train.jsonl:2: bad field: label is 2, expected 0 or 1"),
    ("hateful-memes", "train.jsonl", (1,), b'{"id": 1',
     "train.jsonl:2: bad JSON: "),
    ("hateful-memes", "train.jsonl", (1, "img"), REMOVED,
     "train.jsonl:2: missing field: img is missing, expected a string"),
]  # fmt: skip


@pytest.mark.parametrize("format, name, where, value, message", BROKEN)
def test_a_broken_record_is_named_and_the_others_converted(tmp_path, format, name, where, value, message):
    files = copy.deepcopy(FILES[format])
    *path, last = where
    place = files[name]
    for key in path:
        place = place[key]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    found = converted(tmp_path, format, files)
    bad = [(place, row) for place, row in found if isinstance(row, BadRecord)]
    good = [row for _, row in found if not isinstance(row, BadRecord)]
    assert len(bad) == 1 and message in str(bad[0][1].at(bad[0][0]))
    assert str(tmp_path) in bad[0][0]
    whole = ROWS[format]
    assert good == [row for row in whole if row in good] and len(good) >= len(whole) - 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "dataset_coco.json: bad JSON: "),
        (b"\xff\xfe\xff", "dataset_coco.json: bad JSON: "),
        (b"[" * 100_000, "dataset_coco.json: bad JSON: "),
        (b"[]", "dataset_coco.json: bad field: it is [], expected an object"),
        (b'{"images": {}}', "dataset_coco.json: bad field: images is {}, expected a list"),
        (b"{}", "dataset_coco.json: missing field: images is missing, expected a list"),
    ],
)
def test_a_file_that_is_another(tmp_path, content, message):
    (tmp_path / "dataset_coco.json").write_bytes(content)
    with pytest.raises(BadRecord) as error:
        list(convert("coco", official_files("coco", tmp_path, "train"), "train"))
    assert str(error.value).startswith(str(tmp_path)) and message in str(error.value)


def test_a_file_that_is_no_list(tmp_path):
    with pytest.raises(BadRecord, match=r"train\.json: bad field: it is a dict, expected a list"):
        converted(tmp_path, "vizwiz", {"train.json": {}})


def test_a_file_that_is_not_there(tmp_path):
    write_official(tmp_path, {QUESTIONS: VQA_QUESTIONS})
    with pytest.raises(FileNotFoundError, match=f"{ANNOTATIONS} does not exist, expected the official file"):
        official_files("vqav2", tmp_path, "train")


def test_json_with_a_mark_of_its_encoding(tmp_path):
    text = json.dumps(FILES["flickr30k"]["dataset_flickr30k.json"], ensure_ascii=False)
    (tmp_path / "dataset_flickr30k.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    files = official_files("flickr30k", tmp_path, "train")
    assert [row for _, row in convert("flickr30k", files, "train")] == ROWS["flickr30k"]
    assert os.path.basename(files[0]) == "dataset_flickr30k.json"
