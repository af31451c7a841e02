"""The images of prompts, in the order of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.decoding import decode_image

if TYPE_CHECKING:
    from PIL.Image import Image


def images_of(
    queries: Sequence[Demonstration],
    shots: Sequence[Sequence[Demonstration]] | None = None,
) -> list[list[Image]]:
    """The images of each prompt, those of its demonstrations first."""
    made: list[list[Image]] = []
    for i, query in enumerate(queries):
        row = () if shots is None else shots[i]
        named = [(f"demonstration {j} of query {i}", x) for j, x in enumerate(row)]
        named.append((f"demonstration {i}" if shots is None else f"query {i}", query))
        made.append([])
        for name, x in named:
            made[-1] += [decode_image(data, f"image {j} of {name}") for j, data in enumerate(x.images)]
    return made


def interleaved(text: str, images: Sequence[Image], image_token: str) -> list[str | Image]:
    """Texts and images in turn. Raises ValueError: a text is an address, which would be opened."""
    first, *others = text.split(image_token)
    items: list[str | Image] = [first] if first else []
    for image, part in zip(images, others, strict=True):
        items += [image, *([part] if part else [])]
    for item in items:
        if isinstance(item, str) and " " not in item and all(urlparse(item)[:2]):
            raise ValueError(f"text {item!r:.80} is an address, which IdeficsProcessor opens")
    return items
