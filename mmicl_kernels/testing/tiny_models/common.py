"""Sizes and ids that all tiny models share, and what they are built with."""

import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

IMAGE_SIZE = 8
PATCH_SIZE = 4
VOCABULARY = 64
IMAGE_ID = 60
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


Inputs = Callable[[PreTrainedModel, Tensor, Tensor, Tensor], dict[str, Tensor]]


def built(prefix: str, *, model_class: str | None = None, **config) -> Callable[..., PreTrainedModel]:
    """What builds ``{prefix}ForConditionalGeneration``, or ``model_class``, of ``{prefix}Config(**config)``.

    Classes are looked up when a model is built: importing all families takes seconds, and some are new.
    """

    def build(implementation: str | dict[str, str]) -> PreTrainedModel:
        made = getattr(transformers, f"{prefix}Config")(
            **copy.deepcopy(config), attn_implementation=implementation
        )
        return getattr(transformers, model_class or f"{prefix}ForConditionalGeneration")(made)

    return build


def image_inputs(count: int, *around: int) -> Inputs:
    """What makes inputs of ``count`` image tokens, between ``around``'s two if given, and the pixels."""

    def inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
        place_images(ids, attention_mask, count, *around)
        return {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels}

    return inputs


patch_inputs = image_inputs((IMAGE_SIZE // PATCH_SIZE) ** 2)


def place_images(ids: Tensor, attention_mask: Tensor, count: int, *around: int) -> None:
    """Write ``count`` image tokens, between ``around``'s two if given, after each row's first token."""
    tokens = [IMAGE_ID] * count
    place(ids, attention_mask, [around[0], *tokens, around[1]] if around else tokens)


def place(ids: Tensor, attention_mask: Tensor, tokens: list[int]) -> None:
    """Write ``tokens`` after each row's first token."""
    for row in range(ids.shape[0]):
        start = int(attention_mask[row].argmax()) + 1
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)


def patches(pixels: Tensor, size: int) -> Tensor:
    """``pixels [B, 3, H, W]`` as ``[B, N, size * size * 3]``, channels last."""
    squares = pixels.unfold(2, size, size).unfold(3, size, size)
    return squares.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def vary_norms(model: PreTrainedModel) -> None:
    """Norm weights start as the identity, which would hide a norm that is left out."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith(".weight"):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def use_batched_experts(model: PreTrainedModel) -> None:
    """The default, grouped_mm, has no fp64, which references need."""
    model.set_experts_implementation("batched_mm")
