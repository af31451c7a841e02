"""OK-VQA's stemming: the papers' procedure on a stand-in for nltk, and the stemmer read off annotations."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from mmicl_kernels.evaluation.metrics import METRICS, learned_stemmer, nltk_stemmer, okvqa_accuracy


@pytest.fixture
def fake_nltk(monkeypatch):
    """Tags a word that ends in s as a plural; the lemma and the singular are marked by what made them."""
    nltk, inflection = ModuleType("nltk"), ModuleType("inflection")
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [
        (x, "NNPS" if x[0].isupper() else "NNS" if x[-1] == "s" else "NN") for x in words
    ]
    lemmatizer = SimpleNamespace(lemmatize=lambda word, part: f"lemma({word},{part})")
    nltk.stem = SimpleNamespace(WordNetLemmatizer=lambda: lemmatizer)
    inflection.singularize = lambda word: f"singular({word})"
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "inflection", inflection)
    return nltk


@pytest.mark.parametrize(
    "text, expected",
    [
        ("dog", "dog"),
        ("dogs", "singular(dogs)"),
        ("Dogs", "singular(Dogs)"),
        ("surfing", "lemma(surfing,v)"),
        ("riding", "ride"),  # the table comes before the lemma
        ("waves", "wave"),  # and before the singular
        ("tennis", "tennis"),
        ("Riding", "lemma(Riding,v)"),  # its words are lower case
        ("riding  big waves", "ride big wave"),
    ],
)
def test_the_papers_order(fake_nltk, text, expected):
    assert nltk_stemmer()(text) == expected


def test_only_predictions_are_stemmed(fake_nltk):
    score = okvqa_accuracy(["riding", "riding"], [["ride"] * 10, ["riding"] * 10])
    assert score.samples.tolist() == [1, 0]
    assert METRICS["okvqa"](["riding"], [["ride"] * 10]).value == 1


def test_missing_nltk_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"mmicl-kernels\[okvqa\].*learned_stemmer"):
        okvqa_accuracy(["dog"], [["dog"] * 10])
    assert okvqa_accuracy(["dog"], [["dog"] * 10], stem=str).value == 1


def test_missing_data_says_how_to_get_it(fake_nltk):
    def no_data(words):
        raise LookupError("Resource punkt not found")

    fake_nltk.pos_tag = no_data
    with pytest.raises(LookupError, match=r"(?s)nltk.downloader punkt .*Resource punkt not found"):
        nltk_stemmer()("dog")


def test_learned_stemmer_repeats_the_annotations():
    raw = ["Riding waves", "surfboards", "the dogs", *["pitching"] * 3, "hot dogs", "ice cream"]
    stems = ["ride wave", "surfboard", "the dog", "pitch", "pitching", "pitch", "hotdog", "ice cream"]
    stem = learned_stemmer(raw, stems)
    assert stem("surfboards") == "surfboard"
    assert stem("Riding the WAVES.") == "ride the wave"
    assert stem("pitching") == "pitch"  # two of three
    assert stem("hot dogs") == "hot dog"  # the pair of unequal length taught nothing
    assert stem("buildings kites") == "build kite"  # unseen: the exceptions, then plurals by rule
    assert stem("juggling") == "juggling"  # unseen -ing words stay
    assert okvqa_accuracy(["surfboards!"], [["surfboard"] * 10], stem=stem).value == 1


@pytest.mark.parametrize(
    "raw, stems, message",
    [
        (["a"], ["a", "b"], "answers has 2 samples, but raw_answers has 1"),
        (["hot dog"], ["hotdog"], "none of 1 pairs"),
    ],
)
def test_learned_stemmer_refuses(raw, stems, message):
    with pytest.raises(ValueError, match=message):
        learned_stemmer(raw, stems)


def test_real_nltk_where_its_data_is():
    pytest.importorskip("nltk", reason="nltk is not installed")
    pytest.importorskip("inflection", reason="inflection is not installed")
    try:
        stemmed = nltk_stemmer()("two dogs surfing the waves")
    except LookupError:
        pytest.skip("nltk's data is not on this machine")
    assert stemmed == "two dog surf the wave"
