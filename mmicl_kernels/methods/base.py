"""What every method's adapter shares: the backbone it was made for, and its two files on disk."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from mmicl_kernels.durable import is_file, replacing
from mmicl_kernels.methods.sites import AttentionSite, EmbeddingSite, ResidualSite
from mmicl_kernels.ops._core.checks import FLOAT_DTYPES

if TYPE_CHECKING:
    from mmicl_kernels.methods.objective import Objective

FORMAT_VERSION = 1
CONFIG_FILE = "mmicl_adapter.json"
TENSORS_FILE = "mmicl_adapter.safetensors"
DESCRIPTION_FILE = "training.json"  # beside them: how it was trained, its prompts for instance
DTYPE = torch.float32  # of a new adapter, whatever the default
# bf16 rounds by 2^-9; a different checkpoint of the same shape differs by the size of its weights.
FINGERPRINT_TOLERANCE = 2.0**-7


class CheckpointError(ValueError):
    """A file that cannot be read as an adapter, or an adapter that does not fit the model."""


@dataclass(frozen=True)
class Backbone:
    """The model an adapter was made for.

    ``layers`` maps the index of each patched decoder layer to its ``(num_heads, head_dim)``, ``(0, 0)`` for
    a layer without softmax attention. ``fingerprint`` samples some weights, so that another checkpoint of
    the same architecture is seen whatever it is called; empty where the weights cannot be read (quantised,
    offloaded).
    """

    model_class: str
    model_type: str
    text_model_type: str
    hidden_size: int
    name: str
    revision: str
    layers: dict[int, tuple[int, int]]
    fingerprint: tuple[float, ...] = ()

    @property
    def attention_layers(self) -> dict[int, tuple[int, int]]:
        """Those of ``layers`` that have softmax attention."""
        return {index: geometry for index, geometry in self.layers.items() if geometry != (0, 0)}

    @property
    def geometry(self) -> tuple[int, int] | None:
        """``(num_heads, head_dim)`` of all layers, None where they differ or one has no softmax attention."""
        found = set(self.layers.values())
        return found.pop() if len(found) == 1 and (0, 0) not in found else None

    def differences(self, other: "Backbone") -> list[str]:
        """Readable differences that make an adapter of ``self`` meaningless on ``other``.

        ``name`` and ``revision`` are not compared: the same weights live in many places; nor is
        ``model_class``: a subclass, or the model without its head, has them too.
        """
        found = [
            f"{field} is {getattr(self, field)!r} in the adapter and {getattr(other, field)!r} in the model"
            for field in ("model_type", "text_model_type", "hidden_size", "layers")
            if getattr(self, field) != getattr(other, field)
        ]
        if not found and self.fingerprint and other.fingerprint:
            options = {"dtype": torch.float64, "device": "cpu"}
            mine, theirs = (torch.tensor(x.fingerprint, **options) for x in (self, other))
            # Infinity, to which hostile numbers overflow, is close to everything; NaN is close to nothing.
            if mine.shape != theirs.shape or not (
                (mine - theirs).norm() <= FINGERPRINT_TOLERANCE * mine.norm() < math.inf
            ):
                found.append(
                    "the model's weights are not those the adapter was trained on "
                    f"({self.name or 'unnamed'} against {other.name or 'unnamed'})"
                )
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Backbone":
        """What ``asdict`` and JSON made of a backbone; raises unless every field has its type."""
        for name in ("model_class", "model_type", "text_model_type", "name", "revision"):
            if not isinstance(data[name], str):
                raise TypeError(f"{name} is {data[name]!r}, expected a string")
        layers = {int(index): (h, d) for index, (h, d) in data["layers"].items()}
        sizes = [data["hidden_size"], *(size for pair in layers.values() for size in pair)]
        wrong = [pair for pair in layers.values() if min(pair) < 1 and pair != (0, 0)]
        if any(type(size) is not int for size in sizes) or data["hidden_size"] < 1 or wrong:
            raise ValueError(f"sizes are {sizes}, expected positive integers")
        fingerprint = tuple(float(x) for x in data["fingerprint"])
        if not all(map(math.isfinite, fingerprint)):
            raise ValueError("fingerprint has infinities or NaN, expected finite numbers")
        return cls(**{**data, "layers": layers, "fingerprint": fingerprint})


class Adapter(nn.Module):
    """Parameters of one method for one backbone, in ``layers``, keyed by decoder layer index.

    Subclasses set ``method``, ``config_class``, ``tensor_shapes`` and ``objective_class``, and build
    ``layers`` in ``__init__(config, backbone)``. Where they act they say by sites, each with a method that
    gives what acts there: ``attention_site`` with ``attention_shift``, ``residual_sites`` with
    ``residual_shift``, ``embedding_site`` with ``fuse``, or without positions with ``learned_tokens``. Of a
    batch row at most one adapter may shift attention, of a model's at most one may have an
    ``embedding_site``. ``source`` is the folder or file that an adapter was loaded from, or None.
    """

    method: ClassVar[str]
    config_class: ClassVar[type]

    # Nowhere, unless a method's class or ``__init__`` says otherwise. Read for every layer and token.
    attention_site: AttentionSite | None = None
    residual_sites: tuple[ResidualSite, ...] = ()
    embedding_site: EmbeddingSite | None = None

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.source: Path | None = None
        self.layers = nn.ModuleDict()

    @staticmethod
    def tensor_shapes(config: Any, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the state dict, known without allocating it."""
        raise NotImplementedError

    @classmethod
    def objective_class(cls) -> "type[Objective]":
        """What is minimised in training, imported when it is asked for."""
        raise NotImplementedError(f"{cls.__name__} has no objective_class, expected one to be trained with")

    def attention_shift(self, index: str) -> tuple[Tensor, Tensor, Tensor]:
        """Weight ``[H, D]``, bias ``[H]`` and shift ``[H, D]`` of layer ``index``; or of N virtual keys
        ``[H, N, D]``, ``[H, N]``, ``[H, N, D]``."""
        raise NotImplementedError

    def attention_parts(self, index: str) -> tuple[Tensor, ...]:
        """What :meth:`attention_shift` computes its tensors of; these themselves where it computes nothing.

        Asked for every token: while none of them changes, no other tensors are.
        """
        return self.attention_shift(index)

    def residual_shift(self, site: ResidualSite, index: str) -> tuple[Tensor, Tensor | float]:
        """The vector ``[C]`` (two, ``[2, C]``, where there is a ``readout``) and the scale ``[]`` of layer
        ``index`` at one of ``residual_sites``."""
        raise NotImplementedError

    def fuse(self, hidden: Tensor, positions: Tensor, *, num_rows: int, impl: str) -> Tensor:
        """Tokens ``[num_rows, C]`` of last hidden states ``[B, T, C]`` at ``positions``, bool ``[B, T]``."""
        raise NotImplementedError

    def learned_tokens(self) -> Tensor:
        """Tokens ``[k, C]`` that stand before every prompt."""
        raise NotImplementedError

    @property
    def fuses(self) -> bool:
        """Whether its tokens are demonstrations', which it fuses."""
        return self.embedding_site is not None and self.embedding_site.positions is not None

    @property
    def has_strength(self) -> bool:
        """Whether all that it does is to add vectors, which can be added more or less strongly."""
        return self.attention_site is None and self.embedding_site is None

    def beside_layers(self) -> dict[str, nn.Parameter]:
        """The parameters that belong to no layer, by name."""
        return {name: x for name, x in self.named_parameters() if not name.startswith("layers.")}

    def digest(self) -> str:
        """Hexadecimal SHA-256 of what decides fused tokens: backbone, config, parameters.

        Synchronises with the device.
        """
        # Not what the backbone is called: the same weights live in many places.
        backbone = asdict(replace(self.backbone, name="", revision=""))
        described = json.dumps([backbone, asdict(self.config)], sort_keys=True)
        digest = hashlib.sha256(described.encode())
        for name, parameter in sorted(self.state_dict().items()):
            parameter = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            digest.update(parameter.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``mmicl_adapter.json`` and ``mmicl_adapter.safetensors`` into ``folder``.

        Both are written beside their predecessors first and then take their places, so an error leaves
        the old ones. Tensors that share memory, a tied one for instance, are stored apart.

        Raises:
            CheckpointError: what could not be read back, such as NaN or the placeholder of a parameter that
            is elsewhere; nothing is written then. OSError: the disk.
        """
        folder = Path(folder)
        tensors = stored("adapter", self.state_dict(), self.tensor_shapes(self.config, self.backbone))
        description = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "config": asdict(self.config),
            "backbone": asdict(self.backbone),
        }
        text = json.dumps(description, indent=2)
        _read_config(self.config_class, json.loads(text), "adapter")
        _read_backbone(json.loads(text), "adapter")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG_FILE, folder / TENSORS_FILE) as (config_file, tensors_file):
            save_file(tensors, tensors_file)
            config_file.write_text(text)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "Adapter":
        """Read an adapter back, bit for bit, on the CPU.

        Raises:
            FileNotFoundError: a file is missing. CheckpointError: a file is truncated, is not what it
            claims to be, or its tensors are not those its JSON describes.
        """
        folder = Path(folder)
        description = read_description(folder)
        if description["method"] != cls.method:
            raise CheckpointError(
                f"{folder} holds an adapter of method {description['method']!r}, expected {cls.method!r}"
            )
        config = _read_config(cls.config_class, description, str(folder / CONFIG_FILE))
        backbone = _read_backbone(description, str(folder / CONFIG_FILE))
        tensors = _read_tensors(folder / TENSORS_FILE, cls.tensor_shapes(config, backbone))
        return cls.from_tensors(config, backbone, tensors)

    @classmethod
    def from_tensors(cls, config: Any, backbone: Backbone, tensors: dict[str, torch.Tensor]) -> "Adapter":
        """An adapter whose parameters are ``tensors``, dtype included."""
        with torch.device("meta"):
            adapter = cls(config, backbone)
        adapter.load_state_dict(tensors, assign=True)
        hollow = [name for name, x in adapter.named_buffers() if x.is_meta]
        if hollow:
            raise CheckpointError(
                f"{cls.__name__} has the buffers {hollow}, expected persistent ones, which a file has"
            )
        return adapter.requires_grad_(True)


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """The JSON of an adapter's folder, its format checked. Raises as ``Adapter.from_pretrained``."""
    path = Path(folder) / CONFIG_FILE
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist, expected an adapter's folder")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    expected = {"format_version", "method", "config", "backbone"}
    if not isinstance(description, dict) or not expected <= description.keys():
        raise CheckpointError(f"{path} lacks the fields of an adapter: {', '.join(sorted(expected))}")
    if not isinstance(description["method"], str):
        raise CheckpointError(f"{path} has method {description['method']!r}, expected a name")
    if description["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {description['format_version']!r}, expected {FORMAT_VERSION}"
        )
    return description


def _read_config(config_class: type, description: dict[str, Any], source: str) -> Any:
    data = description["config"]
    known = {field.name for field in fields(config_class)}
    if not isinstance(data, dict) or not data.keys() <= known:
        raise CheckpointError(f"{source} has config {data!r}, expected fields among {sorted(known)}")
    try:
        return stored_config(config_class, data)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source} has a bad config: {error}") from error


def stored_config(config_class: type, data: Mapping[str, Any]) -> Any:
    """A config of what a file has.

    JSON has no tuples: in fields that are some its lists are tuples again. In a file older than a field that
    was which ``OLDER`` says, if it does.
    """
    tuples = {field.name for field in fields(config_class) if "tuple" in str(field.type).lower()}
    read = {name: _tuples(x) if name in tuples else x for name, x in data.items()}
    return config_class(**{**getattr(config_class, "OLDER", {}), **read})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_backbone(description: dict[str, Any], source: str) -> Backbone:
    try:
        return Backbone.from_json(description["backbone"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{source} has a bad backbone: {error!r}") from error


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    if not is_file(path):
        raise FileNotFoundError(f"{path} does not exist, expected the tensors of an adapter")
    try:
        tensors = load(path.read_bytes())  # load_file calls every error of the disk a missing file
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    check_tensors(str(path), tensors, expected)
    return tensors


def check_tensors(source: str, tensors: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless ``tensors`` are dense, floating, finite and of the expected shapes."""
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        raise CheckpointError(
            f"{source} lacks {sorted(missing)[:3]} and has the unknown {sorted(extra)[:3]}, "
            f"expected {len(expected)} tensors and found {len(tensors)}"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if not is_plain(tensor):
            raise CheckpointError(
                f"{source}: {name} is a {type(tensor).__name__} without numbers of its own (meta, sparse, "
                "sharded, freed or the like), expected a dense tensor"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{source}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in FLOAT_DTYPES or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} is not a tensor of finite floating numbers")


def stored(
    source: str, tensors: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """What is written of ``tensors``: checked, on the CPU, each with memory of its own.

    Raises CheckpointError as ``check_tensors``, which reads them again one day.
    """
    check_tensors(source, tensors, expected)
    return {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
    }


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a dense tensor whose numbers are all in its memory, and this process has it."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return False
    if x.is_meta or x.is_nested or x.is_quantized:
        return False
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or (last + 1) * x.element_size() <= x.untyped_storage().nbytes()


def tensors_of(adapter: nn.Module, path: tuple[str, ...], *names: str) -> tuple[Tensor, ...]:
    """Parameters of a module of ``adapter.layers``, asked for every layer and token.

    By the dicts of modules, whose attributes are looked up by functions of Python.
    """
    module = adapter._modules["layers"]
    for name in path:
        module = module._modules[name]
    try:
        return tuple(map(module._parameters.__getitem__, names))
    except KeyError:  # parametrized
        return tuple(getattr(module, name) for name in names)


def check_count(config: Any, *names: str) -> None:
    """Raise unless these fields are ints of at least 1."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, expected an int")
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def check_non_negative(config: Any, *names: str) -> None:
    """Raise TypeError unless the fields ``names`` are numbers, ValueError unless finite and at least 0."""
    for name in names:
        if not 0 <= _number(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)!r}, expected a finite number of at least 0")


def check_positive(config: Any, *names: str) -> None:
    """Raise TypeError unless the fields ``names`` are numbers, ValueError unless finite and above 0."""
    for name in names:
        if not 0 < _number(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)!r}, expected a finite number above 0")


def _number(config: Any, name: str) -> float:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number")
    return value
