"""VQA accuracy (Antol et al., ICCV 2015, arXiv:1505.00468, section 3) and the variants in use."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

from .score import Score, check_lengths, check_text, check_texts, mean_score

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(digits)
    for digits, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
# The official table repairs a contraction that lacks one of its apostrophes ("dont", "couldnt've"). Its
# entries with a capital I are left out: they are looked up in lower case and never found.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS.split() for i, character in enumerate(word) if character == "'"
} | {"somebody'd": "somebodyd"}  # this one the table spoils  # fmt: skip

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Written to spare the periods of decimals on both sides, but its first half is void: only a digit after
# spares one.
_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE where `sub` takes a count: no more periods than its value are removed.
_MOST_PERIODS = int(re.UNICODE)


def strip_punctuation(text: str) -> str:
    """The official first step: marks become nothing or a space, and periods (32 at most) vanish.

    A mark becomes nothing if it stands beside a space anywhere in ``text``, or if ``text`` has a number with
    a comma in it; else a space. ``'`` and ``:`` stay.
    """
    number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if number or beside_space else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def normalize_words(text: str) -> str:
    """The official second step: lower case, number words to digits, articles out, contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_answer(text: str) -> str:
    """An answer as VQA accuracy compares it: both official steps.

    >>> normalize_answer("The two dogs, I dont know.")
    "2 dogs i don't know"
    """
    return normalize_words(strip_punctuation(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _both_sides(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    return normalize_answer(_one_line(prediction)), [normalize_answer(answer) for answer in answers]


def _official(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    return normalize_answer(_one_line(prediction)), answers


def _if_disagreeing(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(answers)) == 1:
        return prediction, answers
    return normalize_answer(prediction), [normalize_answer(answer) for answer in answers]


def _lmms_okvqa(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    def normalize(text: str) -> str:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        return normalize_answer(_one_line(text))

    return normalize(prediction), [normalize(answer) for answer in answers]


# Prepares a prediction and its answers for a comparison character by character.
VARIANTS: dict[str, Callable[[str, list[str]], tuple[str, list[str]]]] = {
    "testbed": _both_sides,
    "official": _official,
    "if_disagreeing": _if_disagreeing,
    "lmms_okvqa": _lmms_okvqa,
}


def vqa_accuracy(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], *, variant: str = "testbed"
) -> Score:
    """Mean over all ways to leave one annotator out of ``min(1, matches / 3)``.

    ``answers[n]``: what the annotators said of sample ``n``, ten in VQAv2 and OK-VQA. ``variant`` says what
    is normalized before the comparison:

    - ``"testbed"``: both sides, always, by both official steps (``normalize_answer``). ICLTestbed's
      ``vqa_accuracy`` (MimIC, HiFICL), LIVE's, and lmms-eval's for VQAv2: the papers' numbers.
    - ``"official"``: GT-Vision-Lab's ``vqaEval.py``. The prediction always, by both steps; the answers only
      where they differ, and their punctuation only, so that capitals, articles and number words among them
      never match.
    - ``"if_disagreeing"``: both sides by both steps where the answers differ, else neither; the form that
      copies of the official script circulate.
    - ``"lmms_okvqa"``: lmms-eval's for OK-VQA and VizWiz, after MMF's EvalAI processor: as ``"testbed"``,
      but first in lower case ``,`` and ``?`` vanish and ``'s`` becomes a word. No stemming.

    Warns where fewer than four answers make an accuracy of 1 impossible: one answer always scores 0, two 1/3,
    three 2/3. ``exact_match`` is the metric of records with one answer.

    Raises ``ValueError`` (unknown variant, lengths, a sample without answers) and ``TypeError`` (not
    strings).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    check_lengths(predictions=predictions, answers=answers)
    samples, few = [], 0
    for i, (prediction, said) in enumerate(zip(predictions, answers, strict=True)):
        said = check_texts("answers", i, said)
        few += len(said) < 4
        prediction, said = VARIANTS[variant](check_text("predictions", i, prediction), said)
        samples.append(_leave_one_out(said.count(prediction), len(said)))
    if few:
        warnings.warn(
            f"{few} of {len(samples)} samples have fewer than 4 answers: with n of them VQA accuracy is at "
            "most (n - 1) / 3. For records with one answer use exact_match",
            stacklevel=2,
        )
    return mean_score(samples)


def _leave_one_out(matches: int, count: int) -> float:
    """``matches`` of the ``count`` annotators lose a match when they are left out, the others do not."""
    without, with_all = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without + (count - matches) * with_all) / count
