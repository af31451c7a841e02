"""Drawings of 837 things by two hands, with names and kinds; ``pictures/`` has them, and whose they are.

A thing belongs to one split, in both drawings: what is asked of tests was never seen in training, neither
the picture nor the thing.
"""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).with_name("pictures")
LIST = FOLDER / "pictures.jsonl"
DRAWINGS = ("google", "twitter")
SIDE, COLUMNS = 64, 32  # pixels of a picture, pictures in a row of a sheet
SHARE = 0.9  # of the canvas, in each direction


@dataclass(frozen=True)
class Picture:
    """A drawing of a thing.

    Attributes:
        place: of the thing in the list. drawing: whose, one of ``DRAWINGS``.
        name, kind: of the thing. split: "train", "validation" or "test".
    """

    place: int
    drawing: str
    name: str
    kind: str
    split: str

    def image(self, size: int) -> Image.Image:
        """On white, in the middle of ``size`` pixels in each direction."""
        return self._drawn(size, SHARE, 0.0, (255, 255, 255), (0.5, 0.5))

    def varied(self, size: int, generator: random.Random) -> Image.Image:
        """As in training: smaller or larger, turned, perhaps mirrored, somewhere on a light colour."""
        colour = tuple(generator.randint(160, 255) for _ in range(3))
        scale, angle = generator.uniform(0.7, 1.0), generator.uniform(-20, 20)
        place = (generator.random(), generator.random())
        image = self._drawn(size, scale, angle, colour, place)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else image

    def file(self, size: int) -> bytes:
        """The image as a PNG file."""
        file = io.BytesIO()
        self.image(size).save(file, "PNG")
        return file.getvalue()

    def _drawn(
        self, size: int, share: float, angle: float, colour: tuple[int, ...], place: tuple[float, float]
    ) -> Image.Image:
        left, top = self.place % COLUMNS * SIDE, self.place // COLUMNS * SIDE
        own = _sheet(self.drawing).crop((left, top, left + SIDE, top + SIDE))
        own = own.resize((round(size * share),) * 2, Image.Resampling.BICUBIC)
        own = own.rotate(angle, Image.Resampling.BICUBIC)
        canvas = Image.new("RGBA", (size, size), colour)
        canvas.alpha_composite(own, tuple(round(x * (size - own.width)) for x in place))
        return canvas.convert("RGB")


@cache
def all_pictures() -> tuple[Picture, ...]:
    """Both drawings of each thing, one after the other."""
    rows = [json.loads(line) for line in LIST.read_text().splitlines()]
    return tuple(Picture(i, drawing, **row) for i, row in enumerate(rows) for drawing in DRAWINGS)


def sheet(drawing: str) -> Path:
    """The file with all pictures of one hand."""
    return FOLDER / f"{drawing}.webp"


@cache
def _sheet(drawing: str) -> Image.Image:
    with Image.open(sheet(drawing)) as image:
        return image.convert("RGBA")
