"""Which examples of a pool become the demonstrations of a query."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.data import (
    Demonstration,
    ImageFile,
    Record,
    as_records,
    content_digest,
    image_bytes,
    read_image,
)  # fmt: skip
from mmicl_kernels.data.images import ImageSource, image_path


class Example(Protocol):
    """What is no ``Demonstration`` itself, but makes one, such as a record of a file.

    Attributes:
        id: what it is known by, or None. It is the same example as another with this id.
    """

    id: str | None

    def demonstration(self) -> Demonstration:
        """Reads the images."""


# Indices of a pool's examples for a query, in the order of the prompt; how many, and what to draw with.
Draw = Callable[[Sequence[Any], Any, int, torch.Generator], Sequence[int]]


def demonstration_of(example: Demonstration | Example) -> Demonstration:
    """Raises TypeError: it is none and makes none."""
    if isinstance(example, Demonstration):
        return example
    make = getattr(example, "demonstration", None)
    if not callable(make):
        raise TypeError(
            f"an example is a {type(example).__name__}, expected Demonstration or what has .demonstration()"
        )
    return make()


def examples_of(source: Any) -> Sequence[Demonstration | Example]:
    """``source`` itself if it is a sequence of examples, else its records, as ``as_records`` reads them.

    Raises as ``as_records``: it is none of these.
    """
    rows = not isinstance(source, str | os.PathLike | Mapping) and hasattr(source, "__getitem__")
    first = source[0] if rows and len(source) > 0 else None
    own = isinstance(first, Demonstration) or hasattr(first, "demonstration")
    return source if own else as_records(source)


def key_of(example: Demonstration | Example) -> str:
    """What an example is told from others by: its ``id`` if it has one, else its content."""
    name = getattr(example, "id", None)
    if name is not None:
        return f"id {name}"
    x = demonstration_of(example)
    return content_digest((x.text.encode(), x.answer.encode(), *x.images)).hex()


def question_of(example: Demonstration | Example) -> str:
    """A digest of a record's images and text: who has the same is the same question, whatever its id.

    For lines without one are numbered, in every file from 1. Files of images are read once. Examples of
    other kinds are known by their id, if they have one.
    """
    if isinstance(example, Record):
        images, text = [_digest(x) for x in example.images], example.text
    elif getattr(example, "id", None) is not None:
        return key_of(example)
    else:
        x = demonstration_of(example)
        images, text = [hashlib.sha256(data).digest() for data in x.images], x.text
    return hashlib.sha256(b"".join(images) + text.encode()).hexdigest()


def _digest(image: ImageSource) -> bytes:
    if not isinstance(image, ImageFile):
        return hashlib.sha256(image_bytes(image)).digest()
    path = image_path(image.folder, image.name)
    state = os.stat(path)
    return _file_digest(path, state.st_size, state.st_mtime_ns)


@cache
def _file_digest(path: str, size: int, changed: int) -> bytes:
    return hashlib.sha256(read_image(None, path)).digest()


def generator_of(*queries: Demonstration | Example, seed: int, epoch: int = 0) -> torch.Generator:
    """What to draw the demonstrations of queries with; it depends on these alone, not on their order."""
    return generator_of_text(f"{seed} {epoch} {' '.join(sorted(key_of(x) for x in queries))}")


def generator_of_text(text: str) -> torch.Generator:
    """Seeded by a digest of ``text``, so that no two of them begin alike."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


class RandomShots:
    """Drawn uniformly, each at most once, and never the query, by whatever id (:func:`question_of`).

    Args:
        replacement: whether one may come several times, as in MimIC's and LIVE's official code.
        own_query: whether the query may be among them. MimIC's official code lets it, and then leaves out
            that demonstration's answer; here it is shown.
    """

    def __init__(self, *, replacement: bool = False, own_query: bool = False) -> None:
        self.replacement, self.own_query = replacement, own_query

    def __call__(
        self, pool: Sequence[Any], query: Any, shots: int, generator: torch.Generator
    ) -> Sequence[int]:
        """Raises ValueError: the pool has too few others than the query."""
        return self.for_all(pool, [query], shots, generator)

    def for_all(
        self, pool: Sequence[Any], queries: Sequence[Any], shots: int, generator: torch.Generator
    ) -> Sequence[int]:
        """The same demonstrations for several queries, none of which is among them.

        Raises ValueError: the pool has too few others.
        """
        drawn: list[int] = []
        asked = set() if self.own_query else {question_of(x) for x in queries}
        order = torch.randperm(len(pool), generator=generator).tolist() if shots else []
        others = (i for i in order if not asked or question_of(pool[i]) not in asked)
        if not self.replacement:
            for i in others:
                drawn.append(i)
                if len(drawn) == shots:
                    break
        elif next(others, None) is not None:  # there is one, so the loop ends
            while len(drawn) < shots:
                i = int(torch.randint(len(pool), (), generator=generator))
                if not asked or question_of(pool[i]) not in asked:
                    drawn.append(i)
        if len(drawn) < shots:
            raise ValueError(
                f"the pool has {len(pool)} examples, {len(drawn)} of them others than "
                f"{'the query' if len(queries) == 1 else 'the queries'}, expected at least "
                f"{'1' if self.replacement else shots}"
            )
        return drawn


class NearestShots:
    """Those most similar to the query, which is never among them, by whatever id: RICES.

    LIVE's official code takes CLIP's image features, the inner product, and the most similar one first.

    Args:
        features: of the pool's examples ``[N, C]``, floating.
        embed: features ``[C]`` of a query. By default the query must be in the pool, whose features it has.
        similarity: "cosine" or "inner".
        nearest: "last", beside the query, or "first".

    Raises:
        ValueError: another ``similarity`` or ``nearest``, or features of another shape or not finite.
    """

    def __init__(
        self,
        features: Tensor,
        embed: Callable[[Any], Tensor] | None = None,
        *,
        similarity: str = "cosine",
        nearest: str = "last",
    ) -> None:
        if similarity not in ("cosine", "inner"):
            raise ValueError(f"similarity is {similarity!r}, expected 'cosine' or 'inner'")
        if nearest not in ("last", "first"):
            raise ValueError(f"nearest is {nearest!r}, expected 'last' or 'first'")
        if features.dim() != 2 or not features.isfinite().all():
            raise ValueError(f"features has shape {list(features.shape)}, expected finite ones [N, C]")
        features = features.detach().float().cpu()
        self.features = F.normalize(features, dim=-1) if similarity == "cosine" else features
        self.embed, self.similarity, self.nearest = embed, similarity, nearest
        self._places: dict[str, int] | None = None

    def __call__(
        self, pool: Sequence[Any], query: Any, shots: int, generator: torch.Generator
    ) -> Sequence[int]:
        """``generator`` is not used. Raises ValueError: a pool of another size, or with too few examples.

        KeyError: the query is not in the pool and there is no ``embed``.
        """
        if len(self.features) != len(pool):
            raise ValueError(f"features has {len(self.features)} rows, expected {len(pool)} like the pool")
        asked, drawn = question_of(query), []
        scores = self.features @ self._features_of(pool, query, asked)
        for i in scores.argsort(descending=True, stable=True).tolist() if shots else ():
            if question_of(pool[i]) != asked:
                drawn.append(i)
            if len(drawn) == shots:
                break
        if len(drawn) < shots:
            raise ValueError(
                f"the pool has {len(drawn)} other examples than the query, expected at least {shots}"
            )
        return drawn if self.nearest == "first" else drawn[::-1]

    def _features_of(self, pool: Sequence[Any], query: Any, asked: str) -> Tensor:
        if self.embed is not None:
            return self.embed(query).detach().float().cpu()
        if self._places is None:
            self._places = {question_of(pool[i]): i for i in reversed(range(len(pool)))}
        if asked not in self._places:
            name = key_of(query)
            raise KeyError(f"the query {name} is not in the pool, expected embed to make its features")
        return self.features[self._places[asked]]
