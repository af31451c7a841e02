"""Where generated texts are cut, and that the metrics need numpy alone."""

import subprocess
import sys

import pytest

from mmicl_kernels.evaluation.metrics import postprocess


@pytest.mark.parametrize(
    "preset, text, expected",
    [
        ("vqa", " red\nQuestion: what", "red"),
        ("vqa", "red Question:", "red"),
        ("vqa", "red, blue", "red, blue"),
        ("vqa", "a question", "a question"),  # case counts
        ("vqa", "red Image Answer", "red"),
        ("vqa", "Short answer", ""),
        ("vqa", "no stop word", "no stop word"),
        ("caption", "a dog Caption: a cat", "a dog"),
        ("caption", "a dog <image>", "a dog"),
        ("caption", "An Answer", "An Answer"),
        ("hificl-vqa", "red IMAGE: x", "red"),
        ("vqa", "red IMAGE: x", "red IMAGE: x"),
        ("live-vqa", "red, blue", "red"),
        ("live-vqa", "red,blue\nShort", "red,blue"),
        ("live-vqa", "red\nblue", "red\nblue"),
        ("none", " a\n", "a"),
        (["."], "a. b", "a"),
        ([], "a. b", "a. b"),
    ],
)
def test_cut(preset, text, expected):
    assert postprocess([text, "x"], preset) == [expected, "x"]


@pytest.mark.parametrize(
    "preset, ending, text, expected",
    [
        ("vqa", ";", "red; blue\n", "red"),
        ("vqa", ";", "red\nblue;", "red"),
        (["."], ";", "a; b.", "a"),
        ("none", ".\n\n", "3.5.\n\nQuestion: what", "3.5"),
        ("none", "\n", "a\nb", "a"),
        ("none", " ", "a b", "a b"),
        ("live-vqa", "|", "a|b, c", "a"),
    ],
)
def test_cut_where_a_demonstration_ends(preset, ending, text, expected):
    assert postprocess([text], preset, ending) == [expected]


@pytest.mark.parametrize(
    "predictions, preset, error, message",
    [
        (["a"], "vqav2", ValueError, "preset must be one of none, vqa, .*got 'vqav2'"),
        (["a"], ["", "x"], ValueError, "no empty stop word"),
        ("abc", "vqa", TypeError, "one string 'abc'"),
    ],
)
def test_bad_arguments_are_named(predictions, preset, error, message):
    with pytest.raises(error, match=message):
        postprocess(predictions, preset)


def test_metrics_need_numpy_alone():
    script = """
import sys
for name in ("torch", "transformers", "nltk", "inflection", "scipy", "sklearn", "PIL"):
    sys.modules[name] = None
from mmicl_kernels.evaluation import METRICS, bootstrap_interval, wilson_interval
score = METRICS["vqa"](["a dog"], [["dog"] * 10])
assert score.value == 1 and sorted(METRICS) == ["caption", "choice", "exact", "okvqa", "vqa", "yes-no"]
layers = {name.split(".")[1] for name in sys.modules if name.startswith("mmicl_kernels.")}
assert layers == {"evaluation"}, layers
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
