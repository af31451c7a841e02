"""Tiny random LVLMs of real HuggingFace classes, built from configs: no downloads, seconds to run."""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models import (
    gemma,
    gemma4,
    glm,
    hybrid,
    idefics,
    llava,
    llava_like,
    other,
    qwen,
    qwen3,
    text,
)
from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    TEXT,
    VISION,
    VOCABULARY,
)

__all__ = [
    "ALL_MODELS",
    "IMAGE_ID",
    "IMAGE_SIZE",
    "PATCH_SIZE",
    "PRE_NORM_MODELS",
    "TEXT",
    "TINY_MODELS",
    "VISION",
    "VOCABULARY",
    "is_available",
    "tiny_inputs",
    "tiny_model",
]

_MODULES = (idefics, llava, llava_like, qwen, qwen3, gemma, gemma4, glm, hybrid, other, text)
_BUILDERS = {name: builder for module in _MODULES for name, builder in module.BUILDERS.items()}
_INPUTS = {model_type: inputs for module in _MODULES for model_type, inputs in module.INPUTS.items()}
_PREPARE = {name: fn for module in _MODULES for name, fn in getattr(module, "PREPARE", {}).items()}
# Classes that older versions of transformers lack.
_NEEDS = {
    "minicpmv4_7": "MiniCPMV4_7Config",
    "molmo2": "Molmo2Config",
    "molmo2-norm_after": "Molmo2Config",
}
# Every family that is supported: the matrix of tests/families.
ALL_MODELS = tuple(_BUILDERS)
# Those that every other test runs on: each stands for a way in which families differ.
TINY_MODELS = ("gemma3", "idefics", "idefics2", "llava-llama", "llava-qwen2", "qwen2_5_vl")
# What a branch's last linear layer returns joins the stream as it is; Gemma norms it first.
PRE_NORM_MODELS = tuple(name for name in TINY_MODELS if name != "gemma3")


def is_available(name: str) -> bool:
    """Whether the installed transformers has the classes of one of ``ALL_MODELS``."""
    return hasattr(transformers, _NEEDS.get(name, "PreTrainedModel"))


def tiny_model(name: str, *, seed: int = 0, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """One of ``ALL_MODELS``, in eval mode, with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    model = _BUILDERS[name](attn_implementation).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8.0)
            # Idefics v1 gates its cross-attention with zeros, which would hide it from every test.
            if "alpha_" in parameter_name:
                parameter.fill_(0.5)
            # Gemma3 begins with a projection of zeros, which would hide the image.
            if parameter_name.endswith("mm_input_projection_weight"):
                parameter.normal_()
        for prepare in _PREPARE.get(name, ()):
            prepare(model)
    return model


def tiny_inputs(
    model: PreTrainedModel, *, batch: int = 2, length: int = 12, padding: str | None = None
) -> dict[str, Tensor]:
    """A batch of prompts with one image each; with ``padding`` "left" or "right" all but one are shorter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE_ID - 4, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch if padding else 0):
        hidden = slice(0, 2 * row) if padding == "left" else slice(length - 2 * row, length)
        attention_mask[row, hidden] = 0
        ids[row, hidden] = model.config.get_text_config().pad_token_id
    pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return _INPUTS[model.config.model_type](model, ids, attention_mask, pixels)
