"""The image that a file's bytes show, as eight bits of red, green and blue."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow reads these with eight bits a sample, but a transparent colour of theirs (tRNS) with the file's.
OTHER_DEPTH = ("L;2", "L;4", "RGB;16B")


def decode_image(data: bytes, name: str) -> Image:
    """The RGB image of a file's bytes, turned as its EXIF orientation says.

    Integers of 16 bits, or a TIFF's 12, are scaled to 8 and rounded: 65535 becomes 255. What is transparent
    is laid on white, as browsers show it. Of several frames or pages the first is taken.

    Raises:
        ValueError: it cannot be decoded; or its colours are not evident: floats, signed or 32-bit integers,
            nothing but transparency; or it has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``. The text
            says that it is ``name``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # names the object that the bytes are in
        raise ValueError(f"{name} cannot be decoded: it is no image that Pillow knows") from error
    except Exception as error:  # the decoders of a damaged file raise what they like
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _rgb(image: Image) -> Image:
    from PIL import ImageOps

    _refuse_before_it_is_read(image)
    largest, inverted = _range(image)
    upright = ImageOps.exif_transpose(image)
    if largest is not None:
        upright = _eight_bits(upright, largest, inverted)
    if upright.mode in ("F", "I"):
        raise ValueError(
            f"its samples are {upright.mode!r}, floats or 32-bit integers, expected 8 or 16 bits"
        )
    return _on_white(upright) if upright.has_transparency_data else upright.convert("RGB")


def _refuse_before_it_is_read(image: Image) -> None:
    from PIL import Image

    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, expected at most {Image.MAX_IMAGE_PIXELS}")
    if image.format == "EPS":
        raise ValueError("it is a PostScript program, expected an image")
    if 2 in _tag(image, 339) or (image.format == "FITS" and image.mode.startswith("I;16")):
        raise ValueError("its samples are signed, expected unsigned ones")
    samples = image.tile[0][3] if image.tile else None
    samples = samples[0] if isinstance(samples, tuple) else samples
    if "transparency" in image.info and samples in OTHER_DEPTH:
        raise ValueError(f"it is {samples!r} with a transparent colour, which Pillow does not find")


def _range(image: Image) -> tuple[int | None, bool]:
    """Which value is white, or black if inverted; None with 8 bits or where it is not known."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, 258)
        return 2 ** (bits[0] if bits else 16) - 1, 0 in _tag(image, 262)
    return (65535 if image.mode == "I" and image.format in ("PNG", "PPM") else None), False


def _tag(image: Image, number: int) -> tuple[int, ...]:
    """The values of a TIFF's tag; none of another image."""
    value = getattr(image, "tag_v2", {}).get(number, ())
    return value if isinstance(value, tuple) else (value,)


def _eight_bits(image: Image, largest: int, inverted: bool) -> Image:
    """``L``, or ``LA`` if a value is transparent."""
    from PIL import Image

    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > largest:
        raise ValueError(f"it has samples {values.min()} to {values.max()}, expected 0 to {largest}")
    scaled = (values * 255 + largest // 2) // largest
    grey = Image.fromarray((255 - scaled if inverted else scaled).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey = Image.merge("LA", (grey, Image.fromarray(alpha)))
    return grey


def _on_white(image: Image) -> Image:
    from PIL import Image

    colours = image.convert("RGBA")
    if colours.getextrema()[3] == (0, 0):
        raise ValueError("it is transparent everywhere, expected something to see")
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")
