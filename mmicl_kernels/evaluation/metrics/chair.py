"""CHAIR: objects that a caption names and its image lacks (Rohrbach et al., EMNLP 2018, arXiv:1809.02156)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .score import Ratio, Score, check_lengths, check_text, mean_score
from .words import singular


@dataclass(frozen=True, eq=False)
class Chair:
    """Lower is better.

    ``instance`` (CHAIR_i): mentions of absent objects per mention of any. ``sentence`` (CHAIR_s): share of
    captions with one. ``mentioned[n]``, ``absent[n]``: a caption's objects, in order, repeats included.
    """

    instance: Ratio
    sentence: Score
    mentioned: list[list[str]]
    absent: list[list[str]]


def chair(
    captions: Sequence[str],
    objects: Sequence[Iterable[str]],
    synonyms: Mapping[str, Sequence[str]],
    *,
    phrases: Mapping[str, str | None] | None = None,
) -> Chair:
    """CHAIR_i and CHAIR_s.

    ``objects[n]``: names of all that image ``n`` shows (the paper: COCO's segmentations, and what people's
    captions mention; ``mentions`` finds the latter). ``synonyms``: an object's other names by its name, such
    as the paper's ``synonyms.txt`` (``read_synonyms``). ``phrases``: word groups that mean another object,
    or with ``None`` none at all; the paper's are ``"baby"`` and ``"adult"`` before animals, ``{"baby bear":
    "bear"}``, ``"passenger"`` before ``jet`` and ``train``, ``"bow tie": "tie"``, ``"toilet seat":
    "toilet"``, ``"home plate": None``.

    Plurals: a name counts if its last word, or that word's singular by rule (``words.singular``), is in the
    table. The original makes every word singular with ``pattern.en``; irregular plurals can differ. A name
    of several words is found if it is in the table (the original: if it is also on a list of 28), the
    longest first. A name of two objects is the later one's, as in the original, which also forgets every
    ``seat`` of a caption with a ``toilet`` (here: the phrase alone). A name of ``objects`` that the table
    lacks is an object by itself.

    ``instance.value`` is nan if no caption names an object (the original divides by zero).

    Raises ``ValueError`` (lengths, a phrase that means no known name) and ``TypeError`` (not strings).
    """
    check_lengths(captions=captions, objects=objects)
    shown = [_names(i, group) for i, group in enumerate(objects)]
    table = _table(synonyms, phrases or {})
    for name in (name for group in shown for name in group):
        table.setdefault(name, name)
    mentioned = [_mentions(check_text("captions", i, caption), table) for i, caption in enumerate(captions)]
    absent = []
    for found, group in zip(mentioned, shown, strict=True):
        present = {table[name] for name in group}
        absent.append([x for x in found if x not in present])
    wrong, total = (np.array([len(x) for x in lists], dtype=np.float64) for lists in (absent, mentioned))
    return Chair(Ratio.of(wrong, total), mean_score(wrong > 0), mentioned, absent)


def mentions(
    caption: str, synonyms: Mapping[str, Sequence[str]], *, phrases: Mapping[str, str | None] | None = None
) -> list[str]:
    """The objects that ``caption`` names, in order, repeats included; arguments as in ``chair``."""
    return _mentions(check_text("captions", 0, caption), _table(synonyms, phrases or {}))


def read_synonyms(file: str | Path) -> dict[str, list[str]]:
    """``{object: other names}`` of a text file: one object a line, its names separated by commas."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    rows = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    table: dict[str, list[str]] = {}
    for row in filter(None, rows):
        table.setdefault(row[0], []).extend(row[1:])
    return table


def _names(position: int, group: object) -> list[str]:
    if isinstance(group, str) or not isinstance(group, Iterable):
        raise TypeError(f"objects[{position}] must be a collection of names, got {group!r}")
    return [_plain(check_text(f"objects[{position}]", i, name)) for i, name in enumerate(group)]


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def _table(synonyms: Mapping[str, Sequence[str]], phrases: Mapping[str, str | None]) -> dict[str, str | None]:
    """The object of every name; ``None`` for words that are none."""
    table: dict[str, str | None] = {}
    for target, others in synonyms.items():
        if isinstance(others, str):
            raise TypeError(f"synonyms[{target!r}] must be a list of names, got the string {others!r}")
        for name in (target, *others):
            table[_plain(name)] = _plain(target)
    for phrase, target in phrases.items():
        if target is not None and _plain(target) not in table:
            raise ValueError(f"phrases[{phrase!r}] must be a name in synonyms or None, got {target!r}")
        table[_plain(phrase)] = None if target is None else table[_plain(target)]
    return table


def _mentions(caption: str, table: Mapping[str, str | None]) -> list[str]:
    # A mark is a word too: "hot, dogs" are not hot dogs.
    words = re.findall(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]", re.sub(r"['’]s\b", "", caption.lower()))
    longest = max((len(name.split()) for name in table), default=0)
    found, start = [], 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            *head, last = words[start : start + length]
            name = next(
                (x for x in (" ".join([*head, y]) for y in (last, singular(last))) if x in table), None
            )
            if name is not None:
                found.append(table[name])
                start += length
                break
        else:
            start += 1
    return [name for name in found if name is not None]
