"""Which of a prompt's tokens stand for images, and which are text."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Ids of these names in a configuration stand for images or frames, not for text.
VISUAL = ("image", "video", "vision", "visual", "boi", "eoi")
_IDS = ("_token_id", "_token_ids", "_token_index", "_patch_id")


def text_positions(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Bool ``[B, T]``: the text tokens after each prompt's last image, or all where there is none.

    Neither padding nor what begins a text is among them; what ends it is: there all of it has been read.
    """
    ids = inputs["input_ids"]
    after = visual_tokens(model, ids).flip(-1).cumsum(-1).flip(-1) == 0
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
    """Where ``ids`` stand for images or frames, or begin or end them."""
    return _among(ids, visual_ids(model))


def visual_ids(model: nn.Module) -> list[int]:
    """The ids that stand for images or frames, or begin or end them, as the configuration names them."""
    named = [token for name, token in named_ids(model.config) if name.startswith(VISUAL)]
    additional = getattr(model.config, "additional_vocab_size", 0)  # Idefics v1 keeps its image markers there
    first = model.config.vocab_size if additional else 0
    return [*named, *range(first, first + additional)]


def _among(ids: Tensor, values: list[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(values, dtype=ids.dtype, device=ids.device))
