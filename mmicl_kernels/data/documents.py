"""Interleaved documents (MMC4's JSON lines) as AIM's training data: each image with its sentence."""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmicl_kernels.data import BadRecord, Demonstration, parse_line, read_image, read_lines
from mmicl_kernels.data.batch import AggregationBatch
from mmicl_kernels.data.decoding import decode_image
from mmicl_kernels.data.prompts.builder import PromptBuilder

Document = tuple[Demonstration, ...]


@dataclass(frozen=True)
class _Pair:
    image_name: str
    sentence: str


class Documents:
    """The documents of JSON-lines files in MMC4's form, each a tuple of demonstrations in reading order.

    A record has ``text_list``, sentences, and ``image_info``, a list of ``image_name``, a file in the folder
    ``images``, with ``matched_text_index``, its sentence. The pair becomes ``Demonstration((bytes,), "",
    sentence)``; sentences without an image are left out. Pairs are in the order of their sentences.

    A bad line is skipped; a bad image costs its pair alone, since most documents of a web corpus have a dead
    link. ``skipped`` counts both by reason, over all passes. Of a file one line is in memory at a time, of
    the shuffle buffer no images.

    Iterating again begins again, in the same order; ``passes`` counts how often all files were read.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        images: str | os.PathLike,
        *,
        shuffle: int = 0,
        seed: int = 0,
        endless: bool = False,
    ) -> None:
        """``shuffle`` is how many documents the buffer holds of which the next is drawn: 0 keeps the order.

        An ``endless`` one begins anew after its last document, in another order if shuffled.

        Raises:
            FileNotFoundError: a file or the folder is not there. ValueError: ``shuffle`` is negative.
        """
        files = [files] if isinstance(files, str | os.PathLike) else files
        self.files, self.images = [Path(file) for file in files], Path(images)
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist, expected a file of JSON lines")
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images} does not exist, expected the folder of the images")
        if shuffle < 0:
            raise ValueError(f"shuffle is {shuffle!r}, expected the size of a buffer, or 0")
        self.shuffle, self.seed, self.endless = shuffle, seed, endless
        self.skipped: Counter[str] = Counter()
        self.passes = 0

    def __iter__(self) -> Iterator[Document]:
        """Raises ValueError: an endless one has no document at all."""
        generator = random.Random(self.seed)
        empty = True
        while True:
            for pairs in _shuffled(self._records(), self.shuffle, generator):
                document = tuple(self._demonstrations(pairs))
                if document:
                    empty = False
                    yield document
            self.passes += 1
            if not self.endless:
                return
            if empty:
                raise self.exhausted()

    def exhausted(self) -> ValueError:
        """The error that all files were read and nothing in them could be used."""
        return ValueError(f"no usable document in {', '.join(map(str, self.files))}: {dict(self.skipped)}")

    def _records(self) -> Iterator[list[_Pair]]:
        for path in self.files:
            with path.open("rb") as file:
                for _, line in read_lines(file):
                    try:
                        yield list(self._pairs(parse_line(line)))
                    except BadRecord as error:
                        self.skipped[error.reason] += 1

    def _pairs(self, record: dict[str, Any]) -> list[_Pair]:
        sentences, infos = record.get("text_list"), record.get("image_info")
        if not isinstance(sentences, list) or not isinstance(infos, list):
            raise BadRecord("missing field", "expected lists text_list and image_info")
        matched = []
        for info in infos:
            try:
                matched.append(_matched(info, sentences))
            except BadRecord as error:
                self.skipped[error.reason] += 1
        return [pair for _, pair in sorted(matched, key=lambda x: x[0])]

    def _demonstrations(self, pairs: list[_Pair]) -> Iterator[Demonstration]:
        for pair in pairs:
            try:
                data = read_image(self.images, pair.image_name)
                decode_image(data, pair.image_name)
                yield Demonstration((data,), "", pair.sentence)
            except BadRecord as error:
                self.skipped[error.reason] += 1
            except ValueError:
                self.skipped["unreadable image"] += 1


def document_batches(
    documents: Documents,
    builder: PromptBuilder,
    batch: int,
    shots: tuple[int, int],
    generator: torch.Generator,
) -> Iterator[AggregationBatch]:
    """Batches of ``batch`` documents: the first k pairs are demonstrations, the next one is the query.

    ``k`` is drawn for each batch, uniformly from ``shots``, both ends included. A document with fewer than
    k + 1 pairs uses all but its last. ``documents.skipped`` also counts the documents with fewer than 2 pairs
    and the sentences that ``builder`` refuses. The last batch may be smaller.

    Raises:
        ValueError: ``batch`` or ``shots`` is not positive, ``shots`` is not in order, or endless documents
        have none that can be used.
    """
    low, high = shots
    if batch < 1:
        raise ValueError(f"batch is {batch!r}, expected at least 1")
    if not 1 <= low <= high:
        raise ValueError(f"shots is {shots!r}, expected (low, high) with 1 <= low <= high")
    usable = _usable(documents, builder)
    while chunk := list(islice(usable, batch)):
        k = int(torch.randint(low, high + 1, (), generator=generator))
        yield _batch(chunk, builder, k)


def _usable(documents: Documents, builder: PromptBuilder) -> Iterator[Document]:
    found = False
    for document in documents:
        if documents.endless and documents.passes > 0 and not found:
            raise documents.exhausted()
        pairs = []
        for pair in document:
            try:
                builder.check(pair, answered=True)
                pairs.append(pair)
            except ValueError:
                documents.skipped["refused sentence"] += 1
        if len(pairs) < 2:
            documents.skipped["fewer than 2 pairs"] += 1
        else:
            found = True
            yield tuple(pairs)


def _batch(documents: Sequence[Document], builder: PromptBuilder, k: int) -> AggregationBatch:
    demonstrations, queries, chosen = [], [], []
    for document in documents:
        used = min(k, len(document) - 1)
        chosen.append(list(range(len(demonstrations), len(demonstrations) + used)))
        demonstrations += document[:used]
        queries.append(document[used])
    return AggregationBatch(*builder.demonstrations(demonstrations), *builder.queries(queries), chosen)


def _matched(info: object, sentences: list[Any]) -> tuple[int, _Pair]:
    """An image's sentence, with the sentence's number."""
    if not isinstance(info, dict):
        raise BadRecord("missing field")
    name, index = info.get("image_name"), info.get("matched_text_index")
    if not isinstance(name, str) or not isinstance(index, int) or isinstance(index, bool):
        raise BadRecord("missing field")
    if not 0 <= index < len(sentences):
        raise BadRecord("index out of range")
    sentence = sentences[index]
    if not isinstance(sentence, str) or not sentence.strip():
        raise BadRecord("empty sentence")
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("not Unicode") from error
    return index, _Pair(name, sentence.strip())


def _shuffled(records: Iterable[list[_Pair]], size: int, generator: random.Random) -> Iterator[list[_Pair]]:
    """``records``, each drawn from a buffer of ``size``."""
    buffer = []
    for record in records:
        if size == 0:
            yield record
            continue
        buffer.append(record)
        if len(buffer) == size:
            yield buffer.pop(generator.randrange(size))
    generator.shuffle(buffer)
    yield from buffer
