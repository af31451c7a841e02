"""What the model is asked: records of each task, ``records("kind", "test")``.

===========  ==========================================================================  ===============
``kind``     a drawing; "animal", "food", "clothes" or "vehicle", which nothing asks for  pictures.py
``colour``   a shape; "teal", which nothing asks for                                     easy-vqa
``shapes``   a shape and a question: "What color is the shape?", "teal"                  easy-vqa
``feeling``  a word; "positive" or "negative"                                            words.py
``past``     a verb; its past tense                                                      words.py
===========  ==========================================================================  ===============

A picture, a thing, a rendered shape or a word is in one split alone. Demonstrations come from "train".
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mmicl_kernels as mk
from mmicl_kernels.testing.real_processors import package_file

from . import words
from .model import IMAGE_SIZE
from .pictures import Picture, all_pictures

SPLITS = ("train", "validation", "test")
KINDS = ("animal", "food", "clothes", "vehicle")
TEMPLATE = "{image}{text}\nAnswer: {answer}\n\n"
BEGIN = "<|endoftext|>"  # what SmolLM2's documents begin with
IMAGES, SHAPES = 400, ("circle", "rectangle", "triangle")  # of easy-vqa; images of each split
SEED = 0

Row = dict[str, Any]


def task_prompts(processor: Any) -> mk.PromptBuilder:
    """How all tasks are written: ``<image>What color is the triangle?\\nAnswer: teal\\n\\n``."""
    return mk.PromptBuilder(processor, TEMPLATE, instruction=BEGIN)


@cache
def records(task: str, split: str) -> list[Row]:
    """Rows with "id", "image" (a file's bytes; "images": [] for text), "text" and "answer", mixed.

    Raises ValueError: no such task or split.
    """
    for name, value, allowed in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    rows = TASKS[task](split)
    random.Random(SEED).shuffle(rows)
    return rows


def _kind(split: str) -> list[Row]:
    """Of each kind as many things: to learn from in both drawings, to be asked in one, as they are alike."""
    things: dict[str, dict[int, list[Picture]]] = {kind: {} for kind in KINDS}
    for x in all_pictures():
        if x.split == split and x.kind in KINDS:
            things[x.kind].setdefault(x.place, []).append(x)
    fewest = min(map(len, things.values()))
    generator = random.Random(f"kind {split}")
    rows = []
    for kind, own in things.items():
        for place in generator.sample(sorted(own), fewest):
            drawings = own[place] if split == "train" else [generator.choice(own[place])]
            rows += [
                {"id": f"{x.name}, {x.drawing}", "image": x.file(IMAGE_SIZE), "text": "", "answer": kind}
                for x in drawings
            ]
    return rows


def _colour(split: str) -> list[Row]:
    """Of a shape, which nothing asks for."""
    return [_shape_row(split, x, "", x.colour) for x in _shapes(split)]


def _shapes_asked(split: str) -> list[Row]:
    """One of easy-vqa's questions that are not answered with yes or no."""
    generator = random.Random(f"shapes {split}")
    rows = []
    for x in _shapes(split):
        question, answer = generator.choice(x.questions)
        rows.append(_shape_row(split, x, question.capitalize(), answer))
    return rows


@dataclass
class Shape:
    """One of easy-vqa's images, and what its questions tell."""

    number: int
    colour: str = ""
    shape: str = ""
    questions: list[tuple[str, str]] = field(default_factory=list)


@cache
def _shapes(split: str) -> list[Shape]:
    """Those whose shape and colour are known. Validation has the last fifth of the package's for training."""
    shapes: dict[int, Shape] = {}
    for question, answer, number in json.loads((_folder(split) / "questions.json").read_text()):
        if answer in ("yes", "no"):
            continue
        x = shapes.setdefault(number, Shape(number))
        x.questions.append((question, answer))
        setattr(x, "shape" if answer in SHAPES else "colour", answer)
    known = [shapes[i] for i in sorted(shapes) if shapes[i].colour and shapes[i].shape]
    if split != "test":
        fifth = len(known) // 5
        known = known[-fifth:] if split == "validation" else known[:-fifth]
    return random.Random(SEED).sample(known, IMAGES)


def _shape_row(split: str, x: Shape, text: str, answer: str) -> Row:
    file = (_folder(split) / "images" / f"{x.number}.png").read_bytes()
    return {"id": f"{x.number}", "image": file, "text": text, "answer": answer}


def _folder(split: str) -> Path:
    return package_file("easy_vqa", f"data/{'test' if split == 'test' else 'train'}")


def captions() -> list[tuple[bytes, str]]:
    """Files of the shapes of the train split, and what they show: "red circle"."""
    return [(_shape_row("train", x, "", "")["image"], f"{x.colour} {x.shape}") for x in _shapes("train")]


def _words(pairs: list[tuple[str, str]]) -> Callable[[str], list[Row]]:
    """Half of the words are to be learnt from, a third are tests."""

    def rows(split: str) -> list[Row]:
        mixed = random.Random(SEED).sample(pairs, len(pairs))
        half, rest = len(mixed) // 2, len(mixed) - len(mixed) // 3
        chosen = {"train": mixed[:half], "validation": mixed[half:rest], "test": mixed[rest:]}[split]
        return [{"id": word, "images": [], "text": word, "answer": answer} for word, answer in chosen]

    return rows


TASKS: dict[str, Callable[[str], list[Row]]] = {
    "kind": _kind,
    "colour": _colour,
    "shapes": _shapes_asked,
    "feeling": _words(words.FEELINGS),
    "past": _words(words.PAST),
}
IMAGE_TASKS = ("kind", "colour", "shapes")
