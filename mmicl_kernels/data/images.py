"""Where the bytes of an image come from: a file, read when it is asked for, bytes, or a Pillow image."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mmicl_kernels.data.lines import BadRecord

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_MODES = ("1", "L", "LA", "I;16", "I;16B", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class ImageFile:
    """The file ``name``, within ``folder`` or, if that is None, wherever it is."""

    folder: Path | None
    name: str

    def read(self) -> bytes:
        """Raises BadRecord: as :func:`read_image`."""
        return read_image(self.folder, self.name)


ImageSource: TypeAlias = "ImageFile | bytes | Image"  # what a record has of an image


def image_source(value: Any, folder: Path | None = None) -> ImageSource:
    """What ``value`` is: a file within ``folder``, bytes, a Pillow image, HuggingFace's {"bytes", "path"}.

    A Pillow image is loaded: one that is not shares its open file with other threads and processes.

    Raises:
        BadRecord: anything else, or an image that cannot be loaded.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        return image_source(value["path"], folder)
    if isinstance(value, ImageFile | bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return ImageFile(folder, os.fspath(value))
    if not _is_pillow(value):
        expected = "expected a file's name, bytes, a Pillow image or {'bytes', 'path'}"
        raise BadRecord("bad field", f"image is {value!r:.80}, {expected}")
    try:
        value.load()
    except MemoryError:
        raise
    except Exception as error:  # the decoders of a damaged file raise what they like
        raise BadRecord("unreadable image", f"{value!r:.80}: {error}") from error
    return value


def image_bytes(source: ImageSource) -> bytes:
    """The bytes of an image file: a Pillow image becomes a PNG, or a TIFF where PNG cannot have its samples.

    Raises:
        BadRecord: a file that cannot be read.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, ImageFile):
        return source.read()
    sixteen_bits = source.mode == "I" and source.format in ("PNG", "PPM")
    kind = "PNG" if sixteen_bits or source.mode in PNG_MODES else "TIFF"
    file = io.BytesIO()
    source.save(file, kind, exif=source.getexif())
    return file.getvalue()


def read_image(folder: Path | None, name: str) -> bytes:
    """The bytes of what :func:`image_path` finds. Raises BadRecord: as that, or it cannot be read."""
    path = image_path(folder, name)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadRecord("unreadable image", f"{name!r:.80}: {error}") from error


def image_path(folder: Path | None, name: str) -> str:
    """The path of a file within ``folder``, links followed; without a folder, of any.

    Raises:
        BadRecord: the path leads out of the folder, or there is no file.
    """
    try:
        path = os.path.realpath(name if folder is None else folder / name)
        root = "" if folder is None else os.path.realpath(folder)
    except (OSError, ValueError) as error:  # a NUL in the name
        raise BadRecord("missing image", f"{name!r:.80}: {error}") from error
    if folder is not None and (os.path.isabs(name) or not path.startswith(os.path.join(root, ""))):
        raise BadRecord("path outside", f"{name!r:.80} leads out of {folder}")
    if not os.path.isfile(path):
        place = "" if folder is None else f" in {folder}"
        raise BadRecord("missing image", f"{name!r:.80} is no file{place}")
    return path


def _is_pillow(value: object) -> bool:
    """Who has a Pillow image has imported Pillow."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)
