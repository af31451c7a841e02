"""What all batches have: labels of a prompt, inputs that move together, checks in one go; and AIM's."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

IGNORE = -100  # a label that is not predicted

Self = TypeVar("Self", bound="Batch")

# Whether something is wrong, a bool [], and what to say of it then.
Check = tuple[Tensor, Callable[[], str]]


class Batch:
    """A dataclass of inputs and of the labels of one prompt."""

    labels: Tensor

    def arguments(self) -> dict[str, object]:
        """``labels`` and, as ``inputs``, all else: what :class:`TrainedModule` is called with."""
        inputs = {name: _mapped(value, lambda x: x) for name, value in vars(self).items()}
        return {"labels": inputs.pop("labels"), "inputs": inputs}

    def to(self: Self, device: torch.device | str) -> Self:
        """The same batch with every tensor on ``device``."""
        return self._changed(lambda x: x.to(device))

    def pin_memory(self: Self) -> Self:
        """The same batch in pinned memory; a ``DataLoader`` with ``pin_memory=True`` calls this."""
        return self._changed(lambda x: x.pin_memory())

    def _changed(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = copy.copy(self)
        vars(changed).update({name: _mapped(x, change) for name, x in vars(self).items()})
        return changed


def _mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """``value`` with its tensors changed, and plain dicts for what a processor may have returned."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(x, change) for name, x in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(x, change) for x in value)
    return value


def raise_first(checks: list[Check]) -> None:
    """Raise ValueError for the first that failed. Where all are fine, this synchronises once."""
    failed = torch.stack([bad.to(checks[0][0].device) for bad, _ in checks])
    if failed.any():
        raise ValueError(checks[failed.tolist().index(True)][1]())


def check_form(what: str, x: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise TypeError unless ``x`` is a tensor, ValueError unless it has this dtype and shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}, expected a tensor")
    if x.dtype != dtype or x.shape != shape:
        raise ValueError(f"{what} is {x.dtype} {list(x.shape)}, expected {dtype} {list(shape)}")


def prompt_shape(what: str, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """``(B, T)`` of a prompt's inputs.

    Raises:
        TypeError, ValueError: ``inputs`` is no dict of inputs, or its ``attention_mask`` is of other tokens.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{what} is a {type(inputs).__name__}, expected inputs of model(**inputs)")
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise ValueError(f"{what} has {sorted(inputs)}, expected input_ids [B, T] (or inputs_embeds)")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != tokens.shape[:2]:
        shapes = f"{list(mask.shape)}, expected {list(tokens.shape[:2])}"
        raise ValueError(f"attention_mask of {what} is {shapes} like its tokens")
    return tuple(tokens.shape[:2])


def label_checks(labels: Tensor, what: str, inputs: Mapping[str, Tensor]) -> list[Check]:
    """``labels`` are those of the prompt ``inputs``: its own ids, but at position 0, which nothing predicts.

    Raises TypeError or ValueError if they are not int64 ``[B, T]`` as the prompt is.
    """
    check_form("labels", labels, torch.int64, prompt_shape(what, inputs))
    if "input_ids" not in inputs:
        return []
    ids = inputs["input_ids"].to(labels.device)
    wrong = (labels != IGNORE) & (labels != ids)
    wrong[:, 0] = False

    def complaint() -> str:
        row, position = wrong.nonzero()[0].tolist()
        return (
            f"labels has {int(labels[row, position])} in row {row} at position {position}, expected "
            f"{int(ids[row, position])} as input_ids of {what} has there, or {IGNORE}"
        )

    return [(wrong.any(), complaint)]


@dataclass(frozen=True)
class AggregationBatch(Batch):
    """Demonstrations, each a prompt of its own, and the queries that they come before.

    Attributes:
        demonstrations: inputs of ``model(**inputs)``, N prompts.
        positions: bool ``[N, T]``, the tokens that are fused; None is the text after the last image.
        queries: inputs of R prompts, answers included.
        labels: int64 ``[R, T]`` of the queries' prompts: their ids, -100 where no token is to be predicted.
        chosen: for each query its demonstrations, of 0 to N - 1.

    Raises:
        TypeError, ValueError: ``labels`` or ``positions`` has another dtype or shape, or a label is not the
        queries' id.
    """

    demonstrations: dict[str, Tensor]
    positions: Tensor | None
    queries: dict[str, Tensor]
    labels: Tensor
    chosen: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        shape = prompt_shape("demonstrations", self.demonstrations)
        if self.positions is not None:
            check_form("positions", self.positions, torch.bool, shape)
        raise_first(label_checks(self.labels, "queries", self.queries))
