"""The official files of data sets, as rows of the record format.

A converter is a generator. Of each official record it yields its place, ``questions.json: questions[3]``,
with a row (a dict that ``record_of`` takes) or the ``BadRecord`` that says why there is none. Names of images
are relative to the folder that has the official folders of images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmicl_kernels.data.lines import BadRecord, parse_line, read_lines

Row = dict[str, Any]
Rows = Iterator["tuple[str, Row | BadRecord]"]
KINDS = {str: "a string", int: "an integer", list: "a list"}


@dataclass(frozen=True)
class Official:
    """What an official file has: ``value`` is its JSON or, of JSON lines, numbers with lines."""

    name: str
    value: Any

    def items(self, key: str) -> list[tuple[str, Any]]:
        """Those of the list ``key``, each with its place; with "" the file is the list.

        Raises:
            BadRecord: there is no such list.
        """
        try:
            values = _get(self.value, key, list) if key else self.value
            if not isinstance(values, list):
                raise BadRecord("bad field", f"it is a {type(values).__name__}, expected a list")
        except BadRecord as error:
            raise error.at(self.name) from error
        return [(f"{self.name}: {key}[{i}]", x) for i, x in enumerate(values)]

    def lines(self) -> list[tuple[str, bytes]]:
        """Those of a file of JSON lines, each with its place."""
        return [(f"{self.name}:{number}", line) for number, line in self.value]


def vqa(split: str, questions: Official, annotations: Official | None = None) -> Rows:
    """VQAv2 and OK-VQA. ``answers`` are the annotators', in their order, ``answer`` the most common one.

    Of answers that are equally common the first is taken. The official MimIC code learns from the first
    annotator's, ``answers[0]``, and shows the most common one in demonstrations. OK-VQA's are its stemmed
    ``answer``, as its metric wants them, not ``raw_answer``. Without ``annotations`` (test) ``answer`` is "".
    """
    folder = f"{split}2014" if split in ("train", "val") else "test2015"
    found = {}
    for place, annotation in [] if annotations is None else annotations.items("annotations"):
        if isinstance(annotation, dict) and isinstance(annotation.get("question_id"), int):
            found[annotation["question_id"]] = place, annotation

    def row(question: Any) -> Row:
        id, image = _get(question, "question_id", int), _get(question, "image_id", int)
        name = f"{folder}/COCO_{folder}_{image:012d}.jpg"
        text = _get(question, "question", str)
        if annotations is None:
            return _row(id, name, text, None)
        if id not in found:
            expected = f"expected one of those in {annotations.name}"
            raise BadRecord("missing annotation", f"question_id is {id}, {expected}")
        place, annotation = found[id]
        return _row(id, name, text, _answers(annotation, "answers", "answer", place))

    return _each(questions.items("questions"), row)


def coco(split: str, dataset: Official) -> Rows:
    """Karpathy's ``dataset_coco.json``: of each image all captions, of which the first is learnt."""

    def row(image: Any) -> Row | None:
        if _get(image, "split", str) != split:
            return None
        name = f"{_get(image, 'filepath', str)}/{_get(image, 'filename', str)}"
        return _row(_get(image, "cocoid", int), name, "", _captions(image), common=False)

    return _each(dataset.items("images"), row)


def flickr30k(split: str, dataset: Official) -> Rows:
    """Karpathy's ``dataset_flickr30k.json``, as :func:`coco`; the id is the photograph's at Flickr."""

    def row(image: Any) -> Row | None:
        if _get(image, "split", str) != split:
            return None
        name = _get(image, "filename", str)
        return _row(Path(name).stem, f"flickr30k-images/{name}", "", _captions(image), common=False)

    return _each(dataset.items("images"), row)


def vizwiz(split: str, questions: Official) -> Rows:
    """VizWiz-VQA; ``answer`` as in :func:`vqa`, empty in the test split. The id is the image's name."""

    def row(question: Any) -> Row:
        name, text = _get(question, "image", str), _get(question, "question", str)
        answers = None if split == "test" else _answers(question, "answers", "answer")
        return _row(Path(name).stem, f"{split}/{name}", text, answers)

    return _each(questions.items(""), row)


def hateful_memes(split: str, *files: Official) -> Rows:
    """Hateful Memes, asked as the official MimIC code does, answered yes or no.

    Of several files (``dev`` is dev_seen and dev_unseen, which share memes) a line that an earlier one has is
    left out. A test file may have no labels.
    """
    seen: dict[str, Row] = {}

    def row(line: bytes) -> Row | None:
        meme = parse_line(line)
        id, name = _get(meme, "id", int, str), _get(meme, "img", str)
        text = f'is an image with written "{_get(meme, "text", str)}" on it. Is it hateful?'
        label = None if split.startswith("test") and meme.get("label") is None else _get(meme, "label", int)
        if label not in (None, 0, 1):
            raise BadRecord("bad field", f"label is {label}, expected 0 or 1")
        made = _row(id, name, text, None if label is None else [("no", "yes")[label]])
        made["choices"] = ["no", "yes"]
        first = seen.setdefault(made["id"], made)
        return made if first is made or first != made else None

    return _each((item for file in files for item in file.lines()), row)


@dataclass(frozen=True)
class Format:
    """A converter and, of each split, its files: a name without its folder is looked for as well."""

    about: str
    convert: Callable[..., Rows]
    splits: dict[str, tuple[str, ...]]


def _vqa_files(version: str, *splits: str) -> dict[str, tuple[str, ...]]:
    names = ("{v}OpenEnded_mscoco_{s}2014_questions.json", "{v}mscoco_{s}2014_annotations.json")
    return {split: tuple(name.format(v=version, s=split) for name in names) for split in splits}


KARPATHY = ("train", "val", "test")
MEMES = ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")

FORMATS = {
    "vqav2": Format(
        "VQAv2: questions, annotations, COCO's images of 2014 and 2015",
        vqa,
        {
            **_vqa_files("v2_", "train", "val"),
            "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json",),
            "test": ("v2_OpenEnded_mscoco_test2015_questions.json",),
        },
    ),
    "okvqa": Format(
        "OK-VQA: questions, annotations, COCO's images of 2014", vqa, _vqa_files("", "train", "val")
    ),
    "coco": Format(
        "COCO captions: Karpathy's dataset_coco.json, COCO's images of 2014",
        coco,
        {split: ("dataset_coco.json",) for split in (*KARPATHY, "restval")},
    ),
    "flickr30k": Format(
        "Flickr30k: Karpathy's dataset_flickr30k.json, flickr30k-images",
        flickr30k,
        {split: ("dataset_flickr30k.json",) for split in KARPATHY},
    ),
    "vizwiz": Format(
        "VizWiz-VQA: Annotations, folders train, val, test of images",
        vizwiz,
        {split: (f"Annotations/{split}.json",) for split in KARPATHY},
    ),
    "hateful-memes": Format(
        "Hateful Memes: JSON lines and img",
        hateful_memes,
        {
            **{split: (f"{split}.jsonl",) for split in MEMES},
            **{split: (f"{split}_seen.jsonl", f"{split}_unseen.jsonl") for split in ("dev", "test")},
        },
    ),
}


def official_files(format: str, source: Path, split: str) -> list[Path]:
    """The files of a split. Raises FileNotFoundError: one is not in ``source``."""
    found = []
    for name in FORMATS[format].splits[split]:
        places = [source / name, source / Path(name).name]
        there = [path for path in places if path.is_file()]
        if not there:
            raise FileNotFoundError(f"{places[0]} does not exist, expected the official file of {format}")
        found.append(there[0])
    return found


def convert(format: str, files: Iterable[Path], split: str) -> Rows:
    """The rows of official files. Raises BadRecord: a file as a whole is not what it should be."""
    return FORMATS[format].convert(split, *map(_read, files))


def _read(path: Path) -> Official:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return Official(str(path), list(read_lines(file)))
    try:
        return Official(str(path), json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad JSON", str(error), str(path)) from error


def _each(items: Iterable[tuple[str, Any]], convert: Callable[[Any], Row | None]) -> Rows:
    """What ``convert`` makes of each item, or why it makes nothing; None is left out."""
    for place, item in items:
        try:
            made = convert(item)
        except BadRecord as error:
            made = error
        if made is not None:
            yield place, made


def _row(id: int | str, image: str, text: str, answers: list[str] | None, *, common: bool = True) -> Row:
    """``answer`` is the most common of the answers, or else the first."""
    made = {"id": str(id), "image": image, "text": text.replace("{image}", "{{image}}"), "answer": ""}
    if answers is None:
        return made
    answer = Counter(answers).most_common(1)[0][0] if common else answers[0]
    return {**made, "answer": answer, "answers": answers}


def _answers(item: Any, name: str, key: str, place: str = "") -> list[str]:
    """The strings ``key`` of the objects in the list ``name``."""
    try:
        values = _get(item, name, list)
        if not values:
            raise BadRecord("bad field", f"{name} is [], expected at least one")
        return [_get(x, key, str, within=f"{name}[{i}].") for i, x in enumerate(values)]
    except BadRecord as error:
        raise error.at(place) from error


def _captions(image: Any) -> list[str]:
    """Those of Karpathy's files, some of which end with a line break."""
    captions = [x.strip() for x in _answers(image, "sentences", "raw")]
    if "" in captions:
        raise BadRecord("bad field", f"sentences[{captions.index('')}].raw is empty, expected a caption")
    return captions


def _get(item: Any, name: str, *kinds: type, within: str = "") -> Any:
    if not isinstance(item, dict):
        raise BadRecord("bad field", f"{within.rstrip('.') or 'it'} is {item!r:.80}, expected an object")
    value = item.get(name)
    expected = f"expected {' or '.join(KINDS[kind] for kind in kinds)}"
    if value is None:
        raise BadRecord("missing field", f"{within}{name} is missing, {expected}")
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise BadRecord("bad field", f"{within}{name} is {value!r:.80}, {expected}")
    return value
