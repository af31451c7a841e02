"""What was answered so far, in files that a killed process leaves usable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from mmicl_kernels.data import Demonstration, Record, content_digest
from mmicl_kernels.durable import append, replacing
from mmicl_kernels.methods import Adapter

SETTINGS, PREDICTIONS = "settings.json", "predictions.jsonl"
SAMPLED = 16  # values of each of a model's tensors that tell it from others
# Of a model's configuration: where it came from and how it runs, not what it is.
_NOT_THE_MODELS = (
    "_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype", "use_cache",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What a system answered to a record.

    Attributes:
        id: the record's. asked: digest of the query and its demonstrations.
        text: as generated, not cut. yes: probability of yes, where it was asked for.
        demonstrations: the names of those before the query, in order.
        prompt_tokens, image_tokens: of the prompt without padding, and those among them that are images'.
        batch_size: of the run that asked it. seconds: of its batch, divided by the number of queries in it.
        first_seconds: until the batch's first tokens.
        peak_bytes: the most that the row allocated on the GPU so far; None on a CPU.
    """

    id: str
    asked: str
    text: str
    yes: float | None
    demonstrations: list[str]
    prompt_tokens: int
    image_tokens: int
    batch_size: int
    seconds: float
    first_seconds: float
    peak_bytes: int | None


# The types that JSON has of a prediction's fields.
KINDS: dict[str, tuple[type, ...]] = {
    "id": (str,), "asked": (str,), "text": (str,), "yes": (float, type(None)), "demonstrations": (list,),
    "prompt_tokens": (int,), "image_tokens": (int,), "batch_size": (int,), "seconds": (float,),
    "first_seconds": (float,), "peak_bytes": (int, type(None)),
}  # fmt: skip


class PredictionFile:
    """The predictions of one row of the table, in ``folder``, or nowhere if that is None.

    A batch is appended and on the disk before the next one is asked. Of an interrupted write the last,
    half-written line is dropped.

    Args:
        settings: whatever the predictions depend on, beside the queries and demonstrations; stored beside
            them.

    Raises:
        ValueError: the folder's predictions were made with other settings, or its file is damaged.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / PREDICTIONS
        self._made: dict[str, Prediction] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        own = json.loads(json.dumps(settings))
        stored = folder / SETTINGS
        if stored.exists():
            _refuse_others(folder, _settings(stored), own)
        else:
            if self._path.exists():
                raise ValueError(f"{folder} has {PREDICTIONS} without {SETTINGS}, expected both or neither")
            with replacing(stored) as (temporary,):
                temporary.write_text(json.dumps(own, indent=1), encoding="utf-8")
        if self._path.exists():
            self._read()

    def find(self, id: str, asked: Callable[[], str]) -> Prediction | None:
        """What was answered to the record of this id. ``asked`` makes the digest of what is asked now.

        Raises ValueError: it is another one than of what was asked.
        """
        found = self._made.get(id)
        if found is not None and found.asked != asked():
            raise ValueError(
                f"{self._path}: record {id!r} is not the one that was asked, or has other demonstrations, "
                "expected the same data and the same draw, or another out"
            )
        return found

    def __getitem__(self, id: str) -> Prediction:
        return self._made[id]

    def add(self, predictions: Sequence[Prediction]) -> None:
        if self._path is not None:
            lines = [json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in predictions]
            append(self._path, "".join(lines).encode())
        self._made |= {x.id: x for x in predictions}

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(self._path, "r+b") as file:
                file.truncate(len(whole))
        names = {field.name for field in fields(Prediction)}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self._path}:{number}: {error}, expected JSON") from error
            if not isinstance(row, dict) or set(row) != names:
                raise ValueError(f"{self._path}:{number}: expected an object of {', '.join(sorted(names))}")
            wrong = [name for name, kinds in KINDS.items() if type(row[name]) not in kinds]
            if wrong:
                name = wrong[0]
                expected = f"expected {' or '.join(x.__name__ for x in KINDS[name])}"
                raise ValueError(f"{self._path}:{number}: {name} is {row[name]!r:.80}, {expected}")
            self._made[row["id"]] = Prediction(**row)


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}, expected JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {found!r:.80}, expected an object")
    return found


def _refuse_others(folder: Path, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in sorted({*stored, *own}):
        if stored.get(name) != own.get(name):
            raise ValueError(
                f"{name} is {own.get(name)!r}, expected {stored.get(name)!r} as the predictions in {folder} "
                "were made with: give another out, or remove that folder"
            )


def digest_of(query: Record, demonstrations: Iterable[Demonstration]) -> str:
    """Of what is asked, with the contents of images; the query's answers aside."""
    parts = [query.id.encode(), query.text.encode(), *query.image_bytes()]
    for x in demonstrations:
        parts += [f"demonstration, {len(x.images)} images".encode(), x.text.encode(), x.answer.encode()]
        parts += x.images
    return _digest(parts)


def model_digest(model: nn.Module) -> str:
    """Of a model's class, its configuration, and of each parameter's name, shape, dtype and 16 values."""
    parts = [type(model).__name__.encode(), json.dumps(_own(model.config.to_dict()), default=str).encode()]
    for name, x in model.named_parameters():
        parts.append(f"{name} {list(x.shape)} {x.dtype}".encode())
        if not x.is_meta:
            flat = x.detach().reshape(-1)
            parts.append(_bytes(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]))
    return _digest(parts)


def processor_digest(processor: ProcessorMixin) -> str:
    """Of its configuration, its chat template, and its tokenizer's vocabulary."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    # A loaded tokenizer has the processor's template, too.
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    return _digest([processor.to_json_string().encode(), json.dumps([template, vocabulary]).encode()])


def adapter_digest(adapter: Adapter) -> str:
    parts = [adapter.method.encode(), json.dumps(asdict(adapter.config), sort_keys=True).encode()]
    for name, x in sorted(adapter.state_dict().items()):
        parts += [name.encode(), _bytes(x.detach())]
    return _digest(parts)


def _own(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _own(x) for key, x in sorted(config.items(), key=str) if key not in _NOT_THE_MODELS}
    return config


def _bytes(x: Tensor) -> bytes:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    return content_digest(parts).hex()[:16]
