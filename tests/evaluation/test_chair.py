"""CHAIR on captions whose objects can be counted by hand."""

import numpy as np
import pytest

from mmicl_kernels.evaluation import bootstrap_interval
from mmicl_kernels.evaluation.metrics import chair, mentions, read_synonyms
from mmicl_kernels.evaluation.metrics.words import singular

SYNONYMS = {
    "person": ["man", "woman", "baby", "people"],
    "dog": ["puppy", "pup"],
    "bear": ["panda"],
    "hot dog": [],
    "traffic light": ["stop light"],
    "chair": ["seat"],
    "toilet": [],
    "knife": [],
    "wine glass": [],
}
PHRASES = {"baby bear": "bear", "toilet seat": "toilet", "home plate": None, "man hole": None}


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A man and his puppies.", ["person", "dog"]),
        ("Two women's dogs; a man-made chair", ["person", "dog", "chair"]),
        ("A hot dog near traffic lights", ["hot dog", "traffic light"]),  # not a dog
        ("hot, dogs", ["dog"]),
        ("people with knives and wine glasses", ["person", "knife", "wine glass"]),
        ("a baby bear and a baby", ["bear", "person"]),
        ("the toilet seat", ["toilet"]),
        ("a man hole at home plate", []),
        ("dog dog DOG", ["dog", "dog", "dog"]),
        ("doghouse, mankind", []),
        ("", []),
    ],
)
def test_what_a_caption_mentions(caption, expected):
    assert mentions(caption, SYNONYMS, phrases=PHRASES) == expected


def test_chair():
    captions = [
        "A man with a dog",
        "A dog and a puppy on a chair",
        "Nothing here",
        "A bear, a dog and a zebra",
    ]
    objects = [["person", "bear"], {"pup", "chair"}, [], ["zebra"]]
    found = chair(captions, objects, SYNONYMS)
    assert found.mentioned == [["person", "dog"], ["dog", "dog", "chair"], [], ["bear", "dog", "zebra"]]
    assert found.absent == [["dog"], [], [], ["bear", "dog"]]
    assert found.instance.value == 3 / 8 and found.sentence.value == 2 / 4
    assert found.instance.samples.tolist() == [1 / 2, 0, 0, 2 / 3]
    assert found.sentence.samples.tolist() == [1, 0, 0, 1]
    assert found.instance.resampled(np.array([0, 0, 1, 2])) == 2 / 7
    assert np.isnan(found.instance.resampled(np.array([2])))
    interval = bootstrap_interval(found.instance.resampled, count=4)
    assert interval.low == 0 and interval.value == 3 / 8 and 0.5 <= interval.high <= 2 / 3


def test_no_mention_at_all_is_not_a_number():
    found = chair(["nothing"], [["dog"]], SYNONYMS)
    assert np.isnan(found.instance.value) and found.sentence.value == 0


def test_synonyms_file(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("person, man,woman\n\ndog, puppy\nperson, chef\nbus\n")
    assert read_synonyms(file) == {"person": ["man", "woman", "chef"], "dog": ["puppy"], "bus": []}


def test_a_name_of_two_objects_is_the_later_ones():
    assert mentions("a bow", {"tie": ["bow"], "weapon": ["bow"]}) == ["weapon"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: chair(["a"], [[], []], SYNONYMS), ValueError, "objects has 2 samples, but captions has 1"),
        (lambda: chair(["a"], ["dog"], SYNONYMS), TypeError, r"objects\[0\] must be a collection"),
        (lambda: chair(["a"], [["dog"]], {"dog": "pup"}), TypeError, r"synonyms\['dog'\] must be a list"),
        (lambda: chair(["a"], [[]], SYNONYMS, phrases={"x y": "cow"}), ValueError, r"phrases\['x y'\]"),
        (lambda: chair([3], [[]], SYNONYMS), TypeError, r"captions\[0\] must be a string"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "plurals, expected",
    [
        ("dogs boxes churches dishes dresses buses horses", "dog box church dish dress bus horse"),
        ("houses vases buzzes causes octopuses glasses", "house vase buzz cause octopus glass"),
        ("cities boys toes tomatoes photos zoos skis", "city boy toe tomato photo zoo ski"),
        ("men women children people mice knives leaves", "man woman child person mouse knife leaf"),
        (
            "bus gas glass grass tennis jeans cactus is this",
            "bus gas glass grass tennis jeans cactus is this",
        ),
        ("waves gloves olives bees bananas giraffes", "wave glove olive bee banana giraffe"),
    ],
)
def test_singulars(plurals, expected):
    assert [singular(word) for word in plurals.split()] == expected.split()
