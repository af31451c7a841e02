"""CIDEr-D of captions (Vedantam et al., CVPR 2015, arXiv:1411.5726, section 3 and 5), without Java."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from .score import Score, check_lengths, check_text, check_texts, mean_score
from .tokens import caption_tokens

LONGEST = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the Gaussian that punishes another length

Gram = tuple[str, ...]


def cider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokens: Callable[[str], Sequence[str]] = caption_tokens,
) -> Score:
    """CIDEr-D, the score that pycocoevalcap and the papers call CIDEr: 0 to 10, often printed times 100.

    ``references[n]``: the captions of image ``n`` by people, one or more. ``tokens`` cuts a caption into
    words; with ``str.split`` and text from pycocoevalcap's own tokenizer the value is its scorer's to
    rounding.

    n-grams are weighed by how few of *these* images have them among their references, so a sample's score
    depends on the others: only equal sets of records compare, and one image alone scores 0. An interval made
    from ``samples`` keeps the weights as they are.

    Raises ``ValueError`` (lengths, an image without references) and ``TypeError`` (not strings).
    """
    check_lengths(predictions=predictions, references=references)
    hypotheses = [_count(tokens(check_text("predictions", i, x))) for i, x in enumerate(predictions)]
    captions = [
        [_count(tokens(x)) for x in check_texts("references", i, group)] for i, group in enumerate(references)
    ]
    images = Counter(gram for group in captions for gram in set().union(*group))
    log_total = math.log(len(predictions))
    return mean_score(
        [
            _score(_Vector(hypothesis, images, log_total), [_Vector(x, images, log_total) for x in group])
            for hypothesis, group in zip(hypotheses, captions, strict=True)
        ]
    )


def _count(words: Sequence[str]) -> Counter[Gram]:
    """How often each run of 1 to 4 words occurs."""
    words = tuple(words)
    return Counter(
        words[start : start + length]
        for length in range(1, LONGEST + 1) for start in range(len(words) - length + 1)
    )  # fmt: skip


class _Vector:
    """A caption's n-grams by their length, times log(images / images that have the n-gram)."""

    def __init__(self, counts: Mapping[Gram, int], images: Mapping[Gram, int], log_total: float):
        self.weights: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            self.weights[len(gram) - 1][gram] = count * (log_total - math.log(max(1, images[gram])))
        self.norms = [math.sqrt(sum(x * x for x in weights.values())) for weights in self.weights]
        self.length = sum(count for gram, count in counts.items() if len(gram) == 1)


def _score(hypothesis: _Vector, references: Sequence[_Vector]) -> float:
    total = sum(_similarity(hypothesis, reference) for reference in references)
    return 10 * total / LONGEST / len(references)


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Cosines, summed over lengths of n-grams; one counts at most as often as the reference has it."""
    total = 0.0
    for own, other, *norms in zip(
        hypothesis.weights, reference.weights, hypothesis.norms, reference.norms, strict=True
    ):
        if all(norms):
            dots = (min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other)
            total += sum(dots) / math.prod(norms)
    return total * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * SIGMA**2))
