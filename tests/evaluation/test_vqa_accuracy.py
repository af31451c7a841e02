"""VQA accuracy against what the original functions gave (ICLTestbed, GT-Vision-Lab, lmms-eval 0.7.3)."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmicl_kernels.evaluation.metrics import VARIANTS, normalize_answer, vqa_accuracy
from mmicl_kernels.evaluation.metrics.vqa import CONTRACTIONS

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "vqa.json").read_text())
CASES = FIXTURE["accuracies"]


def said(case):
    return [answer for answer, times in case["answers"].items() for _ in range(times)]


@pytest.mark.parametrize("text, expected", FIXTURE["normalized"].items())
def test_normalization_is_the_official_one(text, expected):
    assert normalize_answer(text) == expected


def test_every_contraction_of_the_official_table():
    for text, expected in FIXTURE["contractions"].items():
        assert normalize_answer(text) == expected, text
    # What the built table has beyond the official one would be an invention.
    assert CONTRACTIONS.keys() <= FIXTURE["contractions"].keys()


@pytest.mark.parametrize("periods, left", [(31, 0), (32, 0), (33, 1), (40, 8)])
def test_no_more_than_32_periods_are_removed(periods, left):
    assert normalize_answer("a" + "." * periods + "b") == "a" + "." * left + "b"


@pytest.mark.filterwarnings("ignore:.*fewer than 4 answers")
@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracies_are_the_originals(variant):
    score = vqa_accuracy([x["prediction"] for x in CASES], [said(x) for x in CASES], variant=variant)
    expected = np.array([case[variant] for case in CASES])
    # Ten terms of at most one are summed in another order.
    assert np.abs(score.samples - expected).max() <= 10 * np.finfo(np.float64).eps
    assert score.value == pytest.approx(expected.mean(), rel=1e-15)
    assert score.samples.dtype == np.float64


def test_variants_differ_on_the_fixture():
    """Else the test above could not tell them apart."""
    columns = {variant: tuple(case[variant] for case in CASES) for variant in VARIANTS}
    assert len({columns["testbed"], columns["official"], columns["if_disagreeing"]}) == 3
    only_lmms = vqa_accuracy(["men 's"], [["men's"] * 10], variant="lmms_okvqa").value
    assert only_lmms == 1 and vqa_accuracy(["men 's"], [["men's"] * 10]).value == 0
    for text, expected in FIXTURE["lmms_okvqa"].items():
        assert vqa_accuracy([expected], [[text] * 10], variant="lmms_okvqa").value == 1, text


@pytest.mark.parametrize("count, best", [(1, 0), (2, 1 / 3), (3, 2 / 3), (4, 1)])
def test_few_answers_bound_the_accuracy(count, best):
    if count < 4:
        with pytest.warns(UserWarning, match="1 of 1 samples have fewer than 4 answers.*exact_match"):
            score = vqa_accuracy(["dog"], [["dog"] * count])
    else:
        score = vqa_accuracy(["dog"], [["dog"] * count])
    assert score.value == pytest.approx(best)


@pytest.mark.parametrize(
    "predictions, answers, options, error, message",
    [
        (["a"], [["a"] * 10], {"variant": "strict"}, ValueError, "variant must be one of .*got 'strict'"),
        (["a", "b"], [["a"] * 10], {}, ValueError, "answers has 1 samples, but predictions has 2"),
        ([], [], {}, ValueError, "predictions is empty"),
        (["a"], [[]], {}, ValueError, r"answers\[0\] is empty"),
        (["a"], ["dog"], {}, TypeError, r"answers\[0\] must be a list of strings, got 'dog'"),
        (["a"], [["a", 2]], {}, TypeError, r"answers\[0\]\[1\] must be a string, got int 2"),
        ([None], [["a"]], {}, TypeError, r"predictions\[0\] must be a string, got NoneType None"),
        ("dog", [["a"]] * 3, {}, TypeError, "predictions must be a sequence of samples, got str 'dog'"),
    ],
)
def test_bad_arguments_are_named(predictions, answers, options, error, message):
    with pytest.raises(error, match=message):
        vqa_accuracy(predictions, answers, **options)
