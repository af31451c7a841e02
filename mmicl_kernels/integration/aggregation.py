"""Demonstrations through the frozen model: whose hidden states become fused tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from mmicl_kernels.library import Demonstration
from mmicl_kernels.methods import AIMAdapter

# Makes demonstrations into a batch of prompts, and says which of its tokens are fused, bool [B, T]; None is
# the text after the last image.
Collate = Callable[[Sequence[Demonstration]], tuple[Mapping[str, Tensor], Tensor | None]]

# Ids of these names in a configuration stand for images or frames, not for text.
VISUAL = ("image", "video", "vision", "visual", "boi", "eoi")
_IDS = ("_token_id", "_token_ids", "_token_index", "_patch_id")


def text_positions(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Bool ``[B, T]``: the text tokens after each prompt's last image, or all where there is none.

    Neither padding nor what begins a text is among them; what ends it is: there all of it has been read.
    """
    ids = inputs["input_ids"]
    visual = visual_tokens(model, ids)
    additional = getattr(model.config, "additional_vocab_size", 0)  # Idefics v1 keeps its image markers there
    if additional:
        visual |= ids >= model.config.vocab_size
    after = visual.flip(-1).cumsum(-1).flip(-1) == 0
    chosen = after & ~_among(ids, special_ids(model.config.get_text_config(), "bos_token_id"))
    mask = inputs.get("attention_mask")
    return chosen if mask is None else chosen & mask.bool()


def special_ids(config: object, name: str) -> list[int]:
    """The ids of a configuration's entry, which may be one, a list of them or None."""
    value = getattr(config, name, None)
    return [] if value is None else value if isinstance(value, list) else [value]


def named_ids(config: object) -> Iterator[tuple[str, int]]:
    """Every id that a configuration, or one within it, names."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from named_ids(value)
        elif name.endswith(_IDS):
            yield from ((name, token) for token in special_ids(config, name))


def visual_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """Where ``ids`` stand for images or frames, or begin or end them, as the configuration names them."""
    return _among(ids, [token for name, token in named_ids(model.config) if name.startswith(VISUAL)])


def _among(ids: Tensor, values: list[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(values, dtype=ids.dtype, device=ids.device))


@torch.no_grad()
def last_hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states ``[B, T, C]`` in eval mode, after the final norm, without the language head.

    Raises:
        ValueError: they are not one per token of ``input_ids``. NotImplementedError: ``model`` is sharded.
    """
    if isinstance(model, FSDPModule):
        # Its weights are gathered when the whole of it is called, language head and all.
        raise NotImplementedError(
            "the model is sharded by fully_shard, expected a whole one: aggregate before"
        )
    with evaluating(model):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    if hidden.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"{type(model).__name__} has hidden states {list(hidden.shape)}, expected one per token of "
            f"input_ids {list(inputs['input_ids'].shape)}"
        )
    return hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of ``model`` in eval mode within a ``with`` block."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def aggregate(
    model: nn.Module, adapter: AIMAdapter, inputs: Mapping[str, Tensor], positions: Tensor | None, impl: str
) -> list[Tensor]:
    """See ``Handle.aggregate``; ``model`` is plain."""
    shape = inputs["input_ids"].shape
    chosen = adapter.config.positions
    if positions is None and chosen != "text":
        raise ValueError(f"positions is None, expected a mask of what the adapter fuses, {chosen!r}")
    if positions is None:
        positions = text_positions(model, inputs)
    if positions.shape != shape or positions.dtype != torch.bool:
        raise ValueError(
            f"positions is {positions.dtype} {list(positions.shape)}, expected torch.bool {list(shape)}"
        )
    if "attention_mask" in inputs and (positions & ~inputs["attention_mask"].bool()).any():
        raise ValueError("positions marks padding, expected tokens that attention_mask keeps")
    counts = positions.sum(-1).tolist()
    hidden = last_hidden(model, inputs)
    device = adapter.fuser.weight.device
    rows = adapter.fuser(hidden.to(device), positions.to(device), num_rows=sum(counts), impl=impl)
    return list(rows.split(counts))
