"""Where a generated text ends: the papers cut it at words of their templates."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Stop words by preset, in the order in which they are applied: each group cuts at its first hit.
PRESETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "none": (),
    "vqa": (("\n", "Question", "Answer", "Image", "Short"),),  # MimIC
    "caption": (("\n", "Caption", "Image", "<", "Short"),),  # MimIC
    "hificl-vqa": (("\n", "Question", "Answer", "Image", "Short", "IMAGE:"),),
    "live-vqa": (("Question", "Answer", "Short"), (", ",)),
}


def postprocess(
    predictions: Sequence[str], preset: str | Sequence[str] = "vqa", ending: str = ""
) -> list[str]:
    """Each prediction up to the first stop word, without outer spaces; stop words are case-sensitive.

    ``preset``: a name in ``PRESETS``, or stop words of your own. A prediction that begins with a stop word
    becomes empty. ``ending``: what a template writes after the answers of demonstrations, another stop word
    unless it is nothing but spaces. LIVE also cuts at ``", "``, MimIC does not: an answer of two parts keeps
    the first alone.

    Raises ``ValueError`` for an unknown preset or an empty stop word, ``TypeError`` for a single string.
    """
    if isinstance(predictions, str):
        raise TypeError(f"predictions must be a sequence of strings, got one string {predictions!r}")
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)} or stop words, got {preset!r}")
        groups = PRESETS[preset]
    else:
        groups = (tuple(preset),) if preset else ()
    if any(not word for group in groups for word in group):
        raise ValueError(f"preset must have no empty stop word, got {preset!r}")
    if ends_answers(ending):
        first, *others = groups or ((),)
        groups = ((*first, ending), *others)
    cuts = [re.compile("|".join(map(re.escape, group))) for group in groups]
    return [_cut(text, cuts) for text in predictions]


def ends_answers(ending: str) -> bool:
    """Whether what a template has after an answer can be told from the answer's own spaces."""
    return bool(ending.strip()) or "\n" in ending


def _cut(text: str, cuts: Sequence[re.Pattern[str]]) -> str:
    for cut in cuts:
        text = cut.split(text, maxsplit=1)[0]
    return text.strip()
