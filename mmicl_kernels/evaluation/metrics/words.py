"""Plurals of English words by rule: what metrics use where no dictionary is at hand."""

from __future__ import annotations

import re

_IRREGULAR = {
    "axes": "axe", "birdies": "birdie", "brownies": "brownie", "buses": "bus", "caches": "cache",
    "calves": "calf", "canoes": "canoe", "children": "child", "cookies": "cookie", "elves": "elf",
    "feet": "foot", "geese": "goose", "halves": "half", "headaches": "headache", "hoodies": "hoodie",
    "hooves": "hoof", "knives": "knife", "leaves": "leaf", "lenses": "lens", "lives": "life",
    "loaves": "loaf", "men": "man", "menus": "menu", "mice": "mouse", "movies": "movie", "oxen": "ox",
    "people": "person", "pies": "pie", "quizzes": "quiz", "scarves": "scarf", "selfies": "selfie",
    "shelves": "shelf", "shoes": "shoe", "smoothies": "smoothie", "teeth": "tooth", "thieves": "thief",
    "ties": "tie", "toes": "toe", "wives": "wife", "wolves": "wolf", "women": "woman",
    "zombies": "zombie",
}  # fmt: skip
_SAME = """
    always as bus chess christmas clothes deer dress electronics fish gas glass grass has his is
    its jeans las lens mathematics news pants paris perhaps physics plus scissors series sheep shorts
    species sunglasses tennis texas this trousers us vegas was yes
"""
_ENDINGS = (
    (r"(?<=..)ies$", "y"),
    (r"(?<=ss|sh|ch)es$|(?<=[xz])es$|(?<=[^aeiou]o)es$", ""),
    (r"(?<=[^ao]us)es$", ""),
    (r"(?<=[^su])s$", ""),
    (r"(?<=[aeo]u)s$", ""),
)


def singular(word: str) -> str:
    """A lower-case noun's singular: irregular forms of common nouns, else the spelling's rules.

    A word that ends in ``ss`` or ``us``, or is in a short list (``jeans``, ``sheep``, ``tennis``), stays
    as it is. There is no dictionary: a rare irregular plural stays wrong.
    """
    if word in _SAME.split():
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, replacement in _ENDINGS:
        found = re.sub(ending, replacement, word)
        if found != word:
            return found
    return word
