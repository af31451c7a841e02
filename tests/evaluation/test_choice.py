"""Exact match, multiple choice, yes or no, AUROC."""

import numpy as np
import pytest

from mmicl_kernels.evaluation.metrics import (
    auroc,
    choice_accuracy,
    choice_of,
    exact_match,
    yes_no_accuracy,
    yes_no_of,
)

COLOURS = ["red", "dark red", "Blue", "a dog."]


def test_exact_match():
    score = exact_match(["The Dog.", "dog", "2", "dogs"], ["dog", ["cat", "a dog"], "two", ["dog"]])
    assert score.samples.tolist() == [1, 1, 1, 0] and score.value == 0.75
    assert exact_match([" dog", "Dog"], ["dog", "dog"], normalize=str.strip).samples.tolist() == [1, 0]


def test_exact_match_of_what_normalization_leaves_nothing_of():
    """Articles and punctuation, such as the choice "A", are not equal to nothing, nor to one another."""
    predictions, answers = ["", "the", "?", "A", "(a).", "?"], ["A", "A", "an", "a", "A", "?"]
    assert exact_match(predictions, answers).samples.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("red", 0), ("Dark  RED.", 1), (" blue\n", 2), ("a dog", 3),
        ("A", 0), ("b", 1), ("(c)", 2), ("D.", 3), ("B) dark red", 1), ("b: red", 1), ("C. it is red", 2),
        ("E", None), ("(z)", None), ("a.m.", None), ("a cat", None), ("I think", None),
        ("0", 0), ("3", 3), ("4", None), ("-1", None),
        ("The answer is B", 1), ("the answer is (C).", 2), ("Option D, of course", 3), ("choice: b", 1),
        ("the answer is a cat", None), ("option A, not option B", None), ("The answer is blue", 2),
        ("It is dark red", 1), ("it is red", 0), ("reddish", None), ("red or blue", None),
        ("a dog on blue grass", None), ("", None), ("none of these", None),
    ],
)  # fmt: skip
def test_what_a_prediction_means(prediction, expected):
    assert choice_of(prediction, COLOURS) == expected


def test_a_text_comes_before_a_letter_and_an_index():
    assert choice_of("B", ["c", "b", "a"]) == 1 and choice_of("a", ["c", "b", "a"]) == 2
    assert choice_of("2", ["1", "2", "3"]) == 1 and choice_of("2", ["x", "y", "z"]) == 2
    assert choice_of("2", ["x", "y", "z"], first_index=1) == 1


def test_choice_accuracy():
    answers = ["dark red", "B", 1, "1", np.int64(1)]
    score = choice_accuracy(["b"] * 5, answers, [COLOURS] * 5)
    assert score.samples.tolist() == [1] * 5
    score = choice_accuracy(["b", "x", "2", "2"], ["A", "B", 2, 1], [COLOURS] * 4, first_index=1)
    assert score.samples.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "answers, choices, error, message",
    [
        (["E"], [COLOURS], ValueError, r"answers\[0\] must be a text, letter or index of .*got 'E'"),
        ([4], [COLOURS], ValueError, r"got 4"),
        ([True], [COLOURS], ValueError, r"got True"),
        (["green"], [COLOURS], ValueError, r"got 'green'"),
        (["red"], [["red"]], ValueError, r"choices\[0\] must be at least two different texts"),
        (["red"], [["red", "Red."]], ValueError, r"choices\[0\] must be at least two different texts"),
        (["red"], [COLOURS, COLOURS], ValueError, "choices has 2 samples, but predictions has 1"),
        (["red"], ["red"], TypeError, r"choices\[0\] must be a list of strings"),
    ],
)
def test_bad_choices_are_named(answers, choices, error, message):
    with pytest.raises(error, match=message):
        choice_accuracy(["red"], answers, choices)


@pytest.mark.parametrize(
    "text, expected",
    [("Yes", True), ("no.", False), (" YES, it is", True), ("No way", False), ("yesterday", None),
     ("not hateful", None), ("", None), ("maybe yes", None), ("*yes*", True)],
)  # fmt: skip
def test_yes_or_no(text, expected):
    assert yes_no_of(text) is expected


def test_yes_no_accuracy():
    score = yes_no_accuracy(["yes", "no", "Yes.", "maybe", "no"], ["yes", True, 1, "no", 0])
    assert score.samples.tolist() == [1, 0, 1, 0, 1]
    for wrong in ("maybe", 2, None):
        with pytest.raises(ValueError, match=r"answers\[1\] must be yes or no"):
            yes_no_accuracy(["yes", "yes"], ["yes", wrong])


@pytest.mark.parametrize("levels", [2, 5, 100, None])
def test_auroc_is_scikit_learns(levels):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(levels or 0)
    for count in (2, 3, 10, 257):
        labels = np.r_[0, 1, generator.integers(2, size=count - 2)]
        scores = generator.normal(size=count) + labels
        scores = scores if levels is None else np.round(scores * levels / 8)
        found = auroc(scores, labels)
        # A few roundings of sums of at most 257 terms.
        assert found.value == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-14)
        for chosen in (labels == 1, labels == 0, slice(None)):
            assert found.samples[chosen].mean() == pytest.approx(found.value, abs=1e-14)
        rows = np.r_[0, 1, generator.integers(count, size=count)]
        resampled = metrics.roc_auc_score(labels[rows], scores[rows])
        assert found.resampled(rows) == pytest.approx(resampled, abs=1e-14)


def test_auroc_by_hand():
    score = auroc([0.1, 0.4, 0.4, 0.8], [0, 1, 0, True])
    assert score.value == 3.5 / 4  # one of four pairs is a tie
    assert score.samples.tolist() == [1, 0.75, 0.75, 1]
    assert np.isnan(score.resampled(np.array([0, 2, 2])))


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([0.1, 0.2], [1, 1], "labels must have both classes, got 2 samples of 1"),
        ([0.1, 0.2], [0, 2], "labels must be 0 or 1"),
        ([0.1, float("nan")], [0, 1], "scores must be finite"),
        ([0.1], [0, 1], "labels has 2 samples, but scores has 1"),
    ],
)
def test_bad_scores_are_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, labels)
