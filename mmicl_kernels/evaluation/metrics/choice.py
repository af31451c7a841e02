"""Exact match, multiple choice, yes or no, and the area under the ROC curve."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .score import Score, check_lengths, check_text, check_texts, mean_score
from .vqa import normalize_answer


def exact_match(
    predictions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    *,
    normalize: Callable[[str], str] = normalize_answer,
) -> Score:
    """Share of predictions that equal an answer of theirs, both after ``normalize``.

    ``answers[n]``: one string, or several of which one must match. ``normalize``: by default VQA's
    normalization (case, punctuation, articles, number words); ``str.strip`` compares the text itself. Of a
    text that it leaves nothing of, such as "A", the words are compared, or else the text.

    Raises ``ValueError`` (lengths, a sample without answers) and ``TypeError`` (not strings).
    """
    check_lengths(predictions=predictions, answers=answers)
    samples = []
    for i, (prediction, accepted) in enumerate(zip(predictions, answers, strict=True)):
        accepted = check_texts("answers", i, [accepted] if isinstance(accepted, str) else accepted)
        said = _normalized(check_text("predictions", i, prediction), normalize)
        samples.append(said in {_normalized(answer, normalize) for answer in accepted})
    return mean_score(samples)


def _normalized(text: str, normalize: Callable[[str], str]) -> str:
    return normalize(text) or " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def choice_accuracy(
    predictions: Sequence[str],
    answers: Sequence[str | int],
    choices: Sequence[Sequence[str]],
    *,
    first_index: int = 0,
) -> Score:
    """Share of predictions that mean the right one of their choices, by the rule of ``choice_of``.

    ``answers[n]``: the right choice's text, letter (``"B"``) or index, an int or its digits. ``choices[n]``:
    at least two distinct texts. ``first_index``: the index of the first choice, in predictions and answers.
    A prediction that means no choice, or more than one, is wrong; nothing is guessed.

    Raises ``ValueError`` (lengths, fewer than two choices, equal choices, an answer that is none of them) and
    ``TypeError`` (not strings).
    """
    check_lengths(predictions=predictions, answers=answers, choices=choices)
    samples = []
    for i, (prediction, answer, texts) in enumerate(zip(predictions, answers, choices, strict=True)):
        texts = check_texts("choices", i, texts)
        if len(texts) < 2 or len({_plain(x) for x in texts}) < len(texts):
            raise ValueError(f"choices[{i}] must be at least two different texts, got {texts}")
        right = _right_choice(answer, texts, first_index)
        if right is None:
            raise ValueError(f"answers[{i}] must be a text, letter or index of {texts}, got {answer!r}")
        samples.append(choice_of(check_text("predictions", i, prediction), texts, first_index) == right)
    return mean_score(samples)


def choice_of(prediction: str, choices: Sequence[str], first_index: int = 0) -> int | None:
    """Position of the choice that ``prediction`` means, from 0, or ``None``.

    The first rule that fits decides:

    1. the whole prediction is a choice's text (case, outer spaces and a last period aside);
    2. it is, or begins with, a letter set apart: ``B``, ``b``, ``(B)``, ``B.``, ``B) red``, ``B: red``;
    3. it is a whole number: the choice's index, counted from ``first_index``;
    4. it says ``answer is B``, ``option (b)`` or ``choice B`` of one letter, and a mark or nothing follows;
    5. the text of exactly one choice stands in it as whole words; a choice that is part of a longer one there
       does not count.
    """
    texts = [_plain(choice) for choice in choices]
    said = _plain(prediction)
    if said in texts:
        return texts.index(said)
    letter = re.match(r"\(?([a-z])(?:\)|[.:](?!\w)|$)", said)
    if letter:
        return _letter(letter[1], len(texts))
    if re.fullmatch(r"-?\d+", said):
        return _inside(int(said) - first_index, len(texts))
    named = set(re.findall(r"\b(?:answer is|option|choice):?\s*\(?([a-z])\s*(?=[).,:;]|$)", said))
    if len(named) == 1 and (position := _letter(*named, len(texts))) is not None:
        return position
    return _only_text(said, texts)


def _right_choice(answer: object, texts: Sequence[str], first_index: int) -> int | None:
    if isinstance(answer, str):
        plain = _plain(answer)
        wanted = [_plain(text) for text in texts]
        if plain in wanted:
            return wanted.index(plain)
        if re.fullmatch(r"\(?[a-z]\)?", plain):
            return _letter(plain.strip("()"), len(texts))
        answer = int(plain) if re.fullmatch(r"\d+", plain) else None
    if isinstance(answer, int | np.integer) and not isinstance(answer, bool):
        return _inside(int(answer) - first_index, len(texts))
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def _letter(letter: str, count: int) -> int | None:
    return _inside(ord(letter) - ord("a"), count)


def _inside(position: int, count: int) -> int | None:
    return position if 0 <= position < count else None


def _only_text(said: str, texts: Sequence[str]) -> int | None:
    found = [i for i, text in enumerate(texts) if _stands_in(text, said)]
    widest = [i for i in found if not any(j != i and _stands_in(texts[i], texts[j]) for j in found)]
    return widest[0] if len(widest) == 1 else None


def _stands_in(words: str, text: str) -> bool:
    return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def yes_no_accuracy(predictions: Sequence[str], answers: Sequence[str | bool | int]) -> Score:
    """Share of predictions whose first word, ``yes`` or ``no``, is the answer's.

    ``answers[n]``: ``"yes"`` or ``"no"`` (or a sentence that begins so), a bool, or 1 and 0 as Hateful Memes
    has them. A prediction that begins with neither is wrong (see ``yes_no_of``).

    Raises ``ValueError`` (lengths, an answer that is neither) and ``TypeError`` (a prediction that is no
    string).
    """
    check_lengths(predictions=predictions, answers=answers)
    samples = []
    for i, (prediction, answer) in enumerate(zip(predictions, answers, strict=True)):
        right = yes_no_of(answer) if isinstance(answer, str) else _truth(answer)
        if right is None:
            raise ValueError(f"answers[{i}] must be yes or no, a bool, or 1 or 0, got {answer!r}")
        samples.append(yes_no_of(check_text("predictions", i, prediction)) == right)
    return mean_score(samples)


def yes_no_of(text: str) -> bool | None:
    """Whether the first word of ``text`` is yes (True) or no (False); ``None`` if it is neither."""
    first = re.search(r"\w+", text.casefold())
    return {"yes": True, "no": False}.get(first[0]) if first else None


def _truth(answer: object) -> bool | None:
    return (
        bool(answer) if isinstance(answer, bool | int | np.bool_ | np.integer) and answer in (0, 1) else None
    )


@dataclass(frozen=True, eq=False)
class AurocScore(Score):
    """``ranks`` int ``[N]``: each score's place among the distinct ones; ``labels`` bool ``[N]``."""

    ranks: np.ndarray
    labels: np.ndarray

    def resampled(self, indices: np.ndarray) -> float:
        """nan if the samples at ``indices`` are all of one class."""
        return _auroc(self.ranks[indices], self.labels[indices])


def auroc(scores: Sequence[float], labels: Sequence[int | bool]) -> AurocScore:
    """Probability that a positive has a higher score than a negative, ties counted half (Mann-Whitney).

    ``scores``: finite numbers ``[N]``, such as the probability of "yes". ``labels``: 1 or True for positives
    ``[N]``. ``samples`` are the placements: of a positive, the share of negatives below it; of a negative,
    of positives above it. Their mean over positives, over negatives, and so over all is the value; but they
    depend on each other: intervals are to be made with ``resampled``.

    Raises ``ValueError`` for other lengths, scores that are not finite, labels that are not 0 or 1, or one
    class.
    """
    check_lengths(scores=scores, labels=labels)
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("scores must be finite numbers in one dimension")
    if marks.ndim != 1 or not np.isin(marks, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {sorted(set(np.ravel(marks).tolist()), key=str)[:5]}")
    positive = marks.astype(bool)
    if positive.all() or not positive.any():
        raise ValueError(f"labels must have both classes, got {len(marks)} samples of {int(positive[0])}")
    ranks = np.unique(values, return_inverse=True)[1]
    flipped = ranks.max() - ranks
    below, same = _below_and_same(ranks, ~positive)
    above, ties = _below_and_same(flipped, positive)
    of_positives = (below[ranks] + same[ranks] / 2) / (~positive).sum()
    of_negatives = (above[flipped] + ties[flipped] / 2) / positive.sum()
    samples = np.where(positive, of_positives, of_negatives)
    return AurocScore(_auroc(ranks, positive), samples, ranks, positive)


def _auroc(ranks: np.ndarray, positive: np.ndarray) -> float:
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    below, same = _below_and_same(ranks, ~positive)
    hits = np.bincount(ranks[positive], minlength=len(below))
    return float((hits * (below + same / 2)).sum() / (positives * negatives))


def _below_and_same(ranks: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each rank, how many of the ``chosen`` lie below it and how many on it, int ``[ranks]``."""
    same = np.bincount(ranks[chosen], minlength=int(ranks.max()) + 1)
    return np.cumsum(same) - same, same
