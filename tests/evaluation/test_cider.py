"""CIDEr-D against numbers of pycocoevalcap 1.2 (Stanford's tokenizer 3.4.1), and live where that runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmicl_kernels.evaluation.metrics import caption_tokens, cider

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "cider.json").read_text())


def columns(cases):
    return [x["prediction"] for x in cases], [x["references"] for x in cases], [x["score"] for x in cases]


@pytest.mark.parametrize("name, tokens", [("captions", caption_tokens), ("generated", str.split)])
def test_scores_are_pycocoevalcaps(name, tokens):
    predictions, references, expected = columns(FIXTURE[name])
    score = cider(predictions, references, tokens=tokens)
    assert np.abs(score.samples - expected).max() < 1e-12
    assert abs(score.value - FIXTURE[f"{name}_value"]) < 1e-12
    assert min(expected) < 0.2 and max(expected) > 1


@pytest.mark.parametrize("text, expected", [*FIXTURE["caption_tokens"].items(), *FIXTURE["tokens"].items()])
def test_tokens_are_stanfords(text, expected):
    assert caption_tokens(text) == expected.split()


def test_known_differences_from_stanfords_tokens():
    """Whoever repairs one moves it in the fixture from `other_tokens` to `tokens`."""
    assert len(FIXTURE["other_tokens"]) == 11
    for text, stanford in FIXTURE["other_tokens"].items():
        assert caption_tokens(text) != stanford.split(), text


def test_a_score_depends_on_the_set():
    predictions, references, _ = columns(FIXTURE["captions"])
    whole = cider(predictions, references).samples
    half = cider(predictions[:6], references[:6]).samples
    assert np.abs(whole[:6] - half).min() > 1e-3
    assert cider(["a man on a wave"], [["a man on a wave"]]).value == 0 == FIXTURE["one"][0]


def test_a_caption_equal_to_all_references_scores_ten():
    captions = ["a man rides a wave", "two dogs play in grass"]
    assert cider(captions, [[x, x] for x in captions]).samples == pytest.approx([10, 10], rel=1e-12)


@pytest.mark.parametrize(
    "predictions, references, error, message",
    [
        (["a"], [[]], ValueError, r"references\[0\] is empty"),
        (["a"], ["a caption"], TypeError, r"references\[0\] must be a list of strings"),
        (["a"], [], ValueError, "references has 0 samples, but predictions has 1"),
    ],
)
def test_bad_arguments_are_named(predictions, references, error, message):
    with pytest.raises(error, match=message):
        cider(predictions, references)


LIVE = """
import json, sys
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
predictions, references = json.load(sys.stdin)
wrap = lambda groups: {i: [{"caption": x} for x in group] for i, group in enumerate(groups)}
tokenize = PTBTokenizer().tokenize
scores = Cider().compute_score(tokenize(wrap(references)), tokenize(wrap([[x] for x in predictions])))[1]
print(json.dumps(list(scores)))
"""


def test_live_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("its tokenizer needs Java")
    predictions, references, _ = columns(FIXTURE["captions"])
    done = subprocess.run(
        [sys.executable, "-c", LIVE],
        input=json.dumps([predictions, references]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    assert np.abs(cider(predictions, references).samples - expected).max() < 1e-12
