"""One entry of a VLibrary is one file: safetensors whose header carries the rest of the entry as JSON."""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mmicl_kernels.durable import is_file
from mmicl_kernels.methods import ADAPTERS, Adapter, Backbone, CheckpointError
from mmicl_kernels.methods.base import check_tensors, stored_config

FORMAT = "mmicl-vlibrary-entry-1"
SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 2**22
MAX_LABEL = 128  # characters of a name, a task, a tag, a metric
MAX_TAGS = 64
MAX_DEPTH = 64  # of lists and dicts in a record or a config
MAX_DIMENSION = 2**16  # of an embedding
PREFIX, EMBEDDING = "adapter.", "embedding"
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
STORED = ("name", "method", "config", "backbone", "task", "tags", "metrics", "record", "created", "sha256")
# What the values of a JSON file can trip over when they are not what they should be.
BAD_VALUES = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Entry:
    """What a VLibrary knows of a stored adapter, without its tensors.

    Attributes:
        name, task, tags: labels of 1 to 128 printable characters; ``name`` is unique in its library.
        method, config, backbone: of the adapter; ``config`` as JSON has it.
        metrics: finite numbers by label. record: JSON of the training, whatever the caller likes.
        created: UTC, ISO 8601. sha256: of the tensors. num_parameters: without the embedding.
        embedding_dim: None without an embedding. score: cosine with the query of the ``search`` that
            returned this entry, else None; not compared.
    """

    name: str
    method: str
    config: dict[str, Any]
    backbone: Backbone
    task: str | None
    tags: tuple[str, ...]
    metrics: dict[str, float]
    record: Any
    created: str
    sha256: str = ""
    num_parameters: int = 0
    embedding_dim: int | None = None
    score: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.task is not None:
            check_label("task", self.task)
        if not isinstance(self.tags, tuple) or len(self.tags) > MAX_TAGS:
            raise ValueError(f"tags are {self.tags!r:.80}, expected at most {MAX_TAGS} of them")
        if not isinstance(self.metrics, dict):
            raise TypeError(f"metrics is a {type(self.metrics).__name__}, expected a dict of numbers")
        for kind, labels in (("tag", self.tags), ("metric", self.metrics)):
            for label in labels:
                check_label(kind, label)
        for label, value in self.metrics.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"metric {label!r} is {value!r:.80}, expected a finite number")
        _check_depth("record", self.record)
        _check_depth("config", self.config)
        for name in ("method", "created", "sha256"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > MAX_LABEL or not text.isprintable():
                raise ValueError(f"{name} is {text!r:.80}, expected a short text")


def check_label(kind: str, label: str) -> None:
    """Raise unless ``label`` is 1 to 128 printable characters in normal form C, no space around them."""
    if not isinstance(label, str):
        raise TypeError(f"{kind} is {label!r:.80}, expected a string")
    if not (1 <= len(label) <= MAX_LABEL and label.isprintable() and label == label.strip()):
        raise ValueError(
            f"{kind} is {label!r:.80}, expected 1 to {MAX_LABEL} printable characters, no space around them"
        )
    if not unicodedata.is_normalized("NFC", label):
        raise ValueError(f"{kind} is {label!r}, expected Unicode's normal form C")


def normal_form(label: str | None) -> str | None:
    """A string in normal form C; what is none, for others to refuse, as it is."""
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


def check_name(name: str) -> None:
    """Raise unless ``name`` is a label without path separators that starts with neither "." nor "-"."""
    check_label("name", name)
    if name[0] in ".-" or "/" in name or "\\" in name:
        raise ValueError(f"name is {name!r}, expected no '/' or '\\' in it, and no '.' or '-' to start with")


def file_name(name: str) -> str:
    """Where the entry ``name`` lies. The hash keeps names apart that a file system may not."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return f"{slug or 'entry'}-{_sha256(name.encode())[:32]}{SUFFIX}"


def pack(entry: Entry, tensors: Mapping[str, Tensor], embedding: Tensor | None) -> tuple[Entry, str, bytes]:
    """``entry`` completed, the digest of its JSON, and the bytes of its file.

    Args:
        tensors: state dict of the adapter. embedding: ``[D]`` fp32.

    Raises:
        ValueError: what does not fit into a header, or into JSON, or could not be read back.
    """
    # Clones, because adapters may hold views of one tensor and safetensors refuses shared memory.
    named = {PREFIX + name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, x in tensors.items()}  # fmt: skip
    if embedding is not None:
        named[EMBEDDING] = embedding
    blob = save(named)
    start = 8 + int.from_bytes(blob[:8], "little")
    table, data = json.loads(blob[8:start]), memoryview(blob)[start:]
    entry = replace(entry, sha256=_tensors_digest(table, data))
    try:
        text = json.dumps({name: _plain(getattr(entry, name)) for name in STORED}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"record or config of {entry.name!r} is not JSON: {error}") from error
    digest = _sha256(text.encode())
    metadata = {"format": FORMAT, "entry": text, "sha256": digest}
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"record of {entry.name!r} is too long: the header has {len(header)} bytes, "
                         f"expected at most {MAX_HEADER_BYTES}")  # fmt: skip
    entry = _completed(_entry(json.loads(text)), table)  # as it will be read: JSON has lists for tuples
    _expected(entry, table, entry.name)
    return entry, digest, len(header).to_bytes(8, "little") + header + data


def read_entry(path: Path) -> tuple[Entry, str]:
    """The entry in ``path`` and the digest of its JSON. The tensors are not read.

    Raises:
        FileNotFoundError. CheckpointError: not an entry, or damaged where it was read.
    """
    with _opened(path) as file:
        entry, digest, _, _ = _read_header(file, path)
    return entry, digest


def read_embedding(path: Path) -> tuple[Entry, str, Tensor | None]:
    """As ``read_entry``, and the embedding ``[D]`` fp32. Raises as ``read_entry``."""
    with _opened(path) as file:
        entry, digest, table, start = _read_header(file, path)
        if EMBEDDING not in table:
            return entry, digest, None
        begin, end = table[EMBEDDING]["data_offsets"]
        file.seek(start + begin)
        embedding = torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.float32)
    _check_embedding(embedding, path)
    return entry, digest, embedding


def read_all(path: Path) -> tuple[Entry, Adapter, Tensor | None]:
    """The entry in ``path``, its adapter on the CPU, and its embedding; every byte checked.

    Raises:
        FileNotFoundError. CheckpointError: not an entry, damaged, or of an unknown method.
    """
    with _opened(path) as file:
        entry, _, table, start = _read_header(file, path)
        adapter_class, config, shapes = _expected(entry, table, path)
        file.seek(0)
        raw = file.read()
    if _tensors_digest(table, memoryview(raw)[start:]) != entry.sha256:
        raise CheckpointError(f"{path}: the tensors are not those whose checksum the entry has")
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    embedding = tensors.pop(EMBEDDING, None)
    if embedding is not None:
        _check_embedding(embedding, path)
    tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
    check_tensors(str(path), tensors, shapes)
    return entry, adapter_class.from_tensors(config, entry.backbone, tensors), embedding


def parse_json(text: bytes | str, source: str) -> Any:
    """JSON without NaN and infinities. Raises CheckpointError, whatever ``text`` is."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # made once: a log has many lines


def _opened(path: Path) -> BinaryIO:
    if not is_file(path):  # a pipe would block, a folder raise something else
        raise FileNotFoundError(f"{path} does not exist, expected the file of an entry")
    return open(path, "rb")


def _read_header(file: BinaryIO, path: Path) -> tuple[Entry, str, dict[str, Any], int]:
    """Entry, digest of its JSON, table of tensors, and where the tensors' bytes start."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path} has {size} bytes and a header of {length}, expected an entry's file")
    table = parse_json(file.read(length), str(path))
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an entry of a VLibrary, expected the format {FORMAT!r}")
    text, digest = metadata.get("entry"), metadata.get("sha256")
    # A lone surrogate is a string to JSON, but has no UTF-8.
    if not isinstance(text, str) or _sha256(text.encode(errors="surrogatepass")) != digest:
        raise CheckpointError(f"{path}: the entry's JSON is not the one whose checksum the header has")
    try:
        _check_table(table, size - 8 - length)
        return _completed(_entry(parse_json(text, str(path))), table), digest, table, 8 + length
    except BAD_VALUES as error:
        reason = str(error) if isinstance(error, CheckpointError) else f"{path} is no entry: {error!r:.200}"
        raise CheckpointError(reason) from error


def _entry(data: dict[str, Any]) -> Entry:
    if data.keys() != set(STORED) or not isinstance(data["config"], dict):
        raise ValueError(f"fields are {sorted(data)!s:.120}, expected {sorted(STORED)}")
    return Entry(**{**data, "backbone": Backbone.from_json(data["backbone"]), "tags": tuple(data["tags"])})


def _check_table(table: dict[str, Any], data_bytes: int) -> None:
    """Raise unless ``table`` lays out floating tensors of this format that fill ``data_bytes`` exactly."""
    position = 0
    for name, tensor in sorted(table.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        shape, dtype, (begin, end) = tensor["shape"], tensor["dtype"], tensor["data_offsets"]
        if any(type(x) is not int or x < 0 for x in (*shape, begin, end)):
            raise ValueError(f"{name} has shape {shape!r:.80}, expected sizes")
        if begin != position or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name} lies at {begin}:{end}, expected {dtype} of shape {shape!r:.80}")
        if name == EMBEDDING:
            if dtype != "F32" or len(shape) != 1 or not 1 <= shape[0] <= MAX_DIMENSION:
                raise ValueError(f"embedding is {dtype} of shape {shape!r:.80}, expected F32 [D]")
        elif not name.startswith(PREFIX):
            raise ValueError(f"tensor {name!r:.80} is not an entry's")
        position = end
    if position != data_bytes:
        raise ValueError(f"tensors have {data_bytes} bytes, expected {position}")


def _completed(entry: Entry, table: dict[str, Any]) -> Entry:
    sizes = {name: math.prod(tensor["shape"]) for name, tensor in table.items()}
    embedding_dim = sizes.pop(EMBEDDING, None)
    return replace(entry, num_parameters=sum(sizes.values()), embedding_dim=embedding_dim)


def _expected(entry: Entry, table: dict[str, Any], path: Path | str) -> tuple[type[Adapter], Any, dict]:
    """Class, config and tensor shapes of the entry's adapter; the table is held against them."""
    if entry.method not in ADAPTERS:
        raise CheckpointError(f"{path} has method {entry.method!r}, expected one of {sorted(ADAPTERS)}")
    adapter_class = ADAPTERS[entry.method]
    try:
        unknown = entry.config.keys() - {known.name for known in fields(adapter_class.config_class)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)!s:.80}")
        config = stored_config(adapter_class.config_class, entry.config)
        shapes = adapter_class.tensor_shapes(config, entry.backbone)
    except BAD_VALUES as error:
        raise CheckpointError(f"{path} has a bad config: {error!r:.200}") from error
    found = {name: tuple(tensor["shape"]) for name, tensor in table.items() if name != EMBEDDING}
    if found != {PREFIX + name: tuple(shape) for name, shape in shapes.items()}:
        raise CheckpointError(f"{path} has {len(found)} tensors, expected those of a {entry.method} adapter: "
                              f"{len(shapes)} of other names or shapes")  # fmt: skip
    return adapter_class, config, shapes


def _check_embedding(embedding: Tensor, path: Path) -> None:
    if not bool(torch.isfinite(embedding).all()) or not bool(embedding.any()):
        raise CheckpointError(f"{path} has an embedding of NaN, infinities or nothing but zeros")


def _check_depth(kind: str, value: Any, depth: int = 0) -> None:
    """Raise where ``value`` is nested so deep that a JSON parser could give up, or has keys JSON changes."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{kind} is nested deeper than {MAX_DEPTH} levels")
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise TypeError(f"{kind} has the key {key!r:.80}, expected strings, because JSON has no others")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for child in children:
        _check_depth(kind, child, depth + 1)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Backbone) else value


def _tensors_digest(table: dict[str, Any], data: memoryview) -> str:
    layout = json.dumps(table, sort_keys=True).encode()
    return _sha256(len(layout).to_bytes(8, "little"), layout, data)


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
