"""Models and processors from a folder, or from the hub by their name."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Which files say of which class a processor is, as AutoProcessor reads them; else it is the model's type.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantization: Literal["4bit", "8bit"] | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of images and text in ``folder``, in evaluation mode.

    Args:
        folder: that ``save_pretrained`` wrote; where there is none, a name on the hub ("owner/name").
        dtype: of the weights, or "auto": as they are stored.
        device: by default the GPU if there is one.
        quantization: of the linear layers by bitsandbytes, "4bit" (NF4) or "8bit".
        attn_implementation: as ``from_pretrained`` takes it; by default transformers' choice.

    Raises:
        FileNotFoundError: no such folder, and no name of the hub. OSError, ValueError: there is no model in
            it, or none of images and text, or the hub has none of that name; another ``quantization``.
            ImportError: that needs bitsandbytes and accelerate.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

    if quantization not in (None, "4bit", "8bit"):
        raise ValueError(f"quantization is {quantization!r}, expected '4bit', '8bit' or None")
    if isinstance(dtype, str) and dtype != "auto":
        known = getattr(torch, dtype, None)
        if not isinstance(known, torch.dtype) or not known.is_floating_point:
            raise ValueError(f"dtype is {dtype!r}, expected 'auto', 'float32', 'bfloat16' or 'float16'")
        dtype = known
    name, local = _source(folder)
    config = AutoConfig.from_pretrained(name, local_files_only=local)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{folder} has a {config.model_type!r}, expected a model of images and text")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": local}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options |= {"device_map": {"": device}, "quantization_config": _quantized(quantization, dtype)}
    model = AutoModelForImageTextToText.from_pretrained(name, **options).eval()
    return model if quantization is not None else model.to(device)


def load_processor(folder: str | Path) -> ProcessorMixin:
    """The processor in ``folder``: tokenizer, image processor, chat template.

    Without torchvision, which transformers wants for videos, one whose family reads videos too is loaded for
    images alone, with a warning. What it has for videos is kept as it is when it is saved.

    Args:
        folder: that ``save_pretrained`` wrote; where there is none, a name on the hub ("owner/name").

    Raises:
        FileNotFoundError, OSError: as :func:`load_model`. TypeError: it has no processor of images and text.
        ImportError, ValueError: as transformers says it, for instance that another package is missing.
    """
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import is_torchvision_available

    name, local = _source(folder)
    family = None if is_torchvision_available() else _family(name, local)
    roles = () if family is None else family.get_attributes()
    if "video_processor" in roles:
        warnings.warn(
            f"{folder}: {family.__name__} is loaded for images alone, videos need torchvision", stacklevel=2
        )
        return _for_images(family, name, local)
    processor = AutoProcessor.from_pretrained(name, local_files_only=local)
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(f"{folder} has a {type(processor).__name__}, expected a processor of images and text")
    return processor


class NoVideos(dict):
    """Stands where a processor has its part for videos: that part's settings, which are saved with it."""

    _auto_class = None  # as transformers asks each part
    model_input_names = ()

    def __call__(self, *videos: object, **options: object) -> None:
        raise ImportError("this processor is for images alone, videos need torchvision")


def image_only(
    family: type[ProcessorMixin], parts: Sequence[Any], settings: Mapping[str, Any]
) -> ProcessorMixin:
    """A processor of ``family`` whose part for videos is :class:`NoVideos`.

    Args:
        parts: in the order of ``family.get_attributes()``.
        settings: its other arguments.
    """

    def check(self: ProcessorMixin, role: str, part: object) -> type:
        if isinstance(part, NoVideos):
            return NoVideos
        return family.check_argument_for_proper_class(self, role, part)

    tolerant = type(family.__name__, (family,), {"check_argument_for_proper_class": check})
    made = tolerant.from_args_and_dict(list(parts), dict(settings))
    made.__class__ = family  # which pickle finds
    return made


def _source(folder: str | Path) -> tuple[str, bool]:
    """What ``from_pretrained`` is given, and whether it is a folder, which the hub is not asked for."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return str(path), True
    if HUB_NAME.fullmatch(str(folder)) is None:
        raise FileNotFoundError(f"{folder} does not exist, expected a folder or a name on the hub")
    return str(folder), False


def _quantized(quantization: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _family(name: str, local: bool) -> type[ProcessorMixin] | None:
    """The class of the processor, if it is one of transformers'."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for file in PROCESSOR_FILES:
        family = _read(name, local, file).get("processor_class")
        if family is not None:
            return processor_class_from_name(family)
    if not _read(name, local, "config.json"):
        return None
    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name, local_files_only=local)), None)


def _for_images(family: type[ProcessorMixin], name: str, local: bool) -> ProcessorMixin:
    from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING as loaders

    settings, _ = family.get_processor_dict(name, local_files_only=local)
    videos = settings.get("video_processor") or _read(name, local, "video_preprocessor_config.json")
    parts = [
        NoVideos(videos)
        if role == "video_processor"
        else loaders[role].from_pretrained(name, local_files_only=local)
        for role in family.get_attributes()
    ]
    return image_only(family, parts, settings)


def _read(name: str, local: bool, file: str) -> dict[str, Any]:
    """What a JSON file has; nothing if there is none."""
    from transformers.utils import cached_file

    path = cached_file(name, file, local_files_only=local, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
