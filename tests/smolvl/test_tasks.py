"""What the real model is asked: records that belong to one split, and drawings that are what they say."""

import io
import json
import random

import pytest
from PIL import Image

from benchmarks.experiments.smolvl import export, project, sheets, tasks
from benchmarks.experiments.smolvl.pictures import DRAWINGS, all_pictures
from mmicl_kernels.data import Records, as_records


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_split_has_what_another_has(task):
    of = {split: tasks.records(task, split) for split in tasks.SPLITS}
    shown = [{(row.get("image"), row["text"]) for row in rows} for rows in of.values()]
    ids = [{row["id"].partition(",")[0] for row in rows} for rows in of.values()]  # a thing, in both drawings
    assert all(of.values())
    if task not in ("colour", "shapes"):  # there images of tests have numbers of their own
        assert sum(map(len, ids)) == len(set.union(*ids))
    images = [{image for image, _ in x} for x in shown] if task in tasks.IMAGE_TASKS else shown
    assert sum(map(len, images)) == len(set.union(*images))
    assert len(as_records(of["train"])) == len(of["train"])  # whose ids differ


def test_every_answer_of_tests_is_in_the_demonstrations():
    for task in ("kind", "shapes", "feeling"):
        train, test = ({row["answer"] for row in tasks.records(task, x)} for x in ("train", "test"))
        assert test <= train


def test_kinds_are_as_frequent_and_nothing_asks_for_them():
    rows = tasks.records("kind", "test")
    counts = {kind: sum(row["answer"] == kind for row in rows) for kind in tasks.KINDS}
    assert len(set(counts.values())) == 1 and {row["text"] for row in rows} == {""}


def test_tests_of_kinds_ask_for_each_thing_once():
    names = [row["id"].partition(",")[0] for row in tasks.records("kind", "test")]
    assert len(set(names)) == len(names)


def test_the_list_is_what_the_sheets_were_made_of():
    things = {x.name: x for x in all_pictures()}
    assert not sheets.LEFT_OUT & things.keys()
    assert {x.kind for x in things.values()} == sheets.KINDS.keys()
    assert not {word for name in things for word in name.split()} & set(tasks.KINDS)
    for kind in sheets.KINDS:
        own = [x.split for x in things.values() if x.kind == kind]
        assert own.count("test") == len(own) // 3
        assert own.count("test") + own.count("validation") == len(own) // 2


def test_the_projector_is_taught_none_of_the_words_that_are_asked_for():
    words = {word for own in project.KIND_WORDS.values() for word in own}
    assert not words & set(tasks.KINDS)
    assert all(len(set(own)) == 3 for own in project.KIND_WORDS.values())


@pytest.mark.parametrize(("task", "split"), [("size", "test"), ("kind", "dev")])
def test_what_there_is_not(task, split):
    with pytest.raises(ValueError, match=r"(task is 'size'|split is 'dev'), expected one of "):
        tasks.records(task, split)


def test_two_hands_draw_the_same_things():
    pictures = all_pictures()
    for first, second in zip(pictures[::2], pictures[1::2], strict=True):
        assert (first.drawing, second.drawing) == DRAWINGS
        assert (first.name, first.kind, first.split) == (second.name, second.kind, second.split)
    assert len({x.name for x in pictures}) == len(pictures) // 2
    images = [x.file(64) for x in pictures]
    assert len(set(images)) == len(images)


def test_a_drawing_is_on_white_and_varies():
    x = next(x for x in all_pictures() if x.name == "banana")
    image = x.image(64)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = image.resize((1, 1)).getpixel((0, 0))
    assert red > green > blue  # yellow
    assert Image.open(io.BytesIO(x.file(64))).tobytes() == image.tobytes()
    one, two = (x.varied(64, random.Random(seed)).tobytes() for seed in (0, 1))
    assert one != two and one == x.varied(64, random.Random(0)).tobytes()


def test_captions_say_what_the_questions_do():
    captions = dict(tasks.captions())
    for row in tasks.records("shapes", "train"):
        if row["image"] in captions:
            assert row["answer"] in captions[row["image"]].split()
    assert len(captions) > 100
    asked = {row["image"] for split in ("validation", "test") for row in tasks.records("shapes", split)}
    assert not asked & captions.keys()


@pytest.mark.parametrize("task", ["kind", "past"])
def test_the_files_have_the_records(task, tmp_path):
    export.export_task(task, tmp_path / task)
    for split in tasks.SPLITS:
        rows = tasks.records(task, split)
        found = Records(tmp_path / task / f"{split}.jsonl")
        for row, record in zip(rows, found, strict=True):
            made = record.demonstration()
            assert (record.id, made.text, made.answer) == (row["id"], row["text"], row["answer"])
            assert made.images == ((row["image"],) if "image" in row else ())
    assert json.loads((tmp_path / task / "test.jsonl").read_text().splitlines()[0])["id"]
