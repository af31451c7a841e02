"""Idefics2 at its real size with random weights, prompts for it, and the variants that are compared on it."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Idefics2Config, PreTrainedModel

import mmicl_kernels as mk
from benchmarks.peers import published
from mmicl_kernels.models.anchors import find_anchors

FIRST_TEXT_ID = 3  # after the padding's and the sequence's own tokens
GATE_STD, SHIFT_STD = 0.02, 0.5


@dataclass(frozen=True)
class Prompt:
    """``tokens`` in all, the ``images``' latents among them, with ``shots`` demonstrations."""

    shots: int
    tokens: int
    images: int = 0


@dataclass(frozen=True)
class Size:
    """A model's configuration, and how long its prompts are.

    text, vision, perceiver: what differs from the classes' defaults. image: pixels, height and width.
    lengths: prompt tokens by number of demonstrations. compile_seconds: about what one compiled
    variant costs.
    """

    text: Mapping[str, int | float | None]
    vision: Mapping[str, int]
    perceiver: Mapping[str, int]
    image_token_id: int
    image: tuple[int, int]
    lengths: Mapping[int, int]
    compile_seconds: float

    def config(self) -> Idefics2Config:
        return Idefics2Config(
            text_config={"model_type": "mistral", **self.text},
            vision_config=dict(self.vision),
            perceiver_config=dict(self.perceiver),
            image_token_id=self.image_token_id,
        )


SIZES = {
    # HuggingFaceM4/idefics2-8b. Its decoder's window of 4096 is left out: no prompt here reaches it, and a
    # static cache with a window counts its rows in Python, which torch.compile would meet as a constant.
    # A COCO photograph is 480 x 640 and is not resized by the processor (edges between 378 and 980).
    # Lengths: one demonstration-free prompt and 8, 16, 32 shots of VQAv2, as in the table of published times.
    "real": Size(
        text={
            "vocab_size": 32003,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "pad_token_id": 0,
        },
        vision={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
        perceiver={
            "hidden_size": 4096,
            "resampler_depth": 3,
            "resampler_n_latents": 64,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
        image_token_id=32001,
        image=(480, 640),
        lengths={0: 128, 8: 1026, 16: 1922, 32: 3717},
        compile_seconds=60.0,
    ),
    "tiny": Size(
        text={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "sliding_window": None,
            "pad_token_id": 0,
        },
        vision={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        perceiver={
            "hidden_size": 32,
            "resampler_depth": 1,
            "resampler_n_latents": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=60,
        image=(8, 8),
        lengths={0: 12, 8: 40, 16: 72, 32: 140},
        compile_seconds=0.0,
    ),
}


def build_model(size: Size, *, device: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """The model with its own initialisation, made on ``device`` in ``dtype``: nothing passes the host."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            size.config(), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def prompt_inputs(
    size: Size, prompt: Prompt, *, device: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Random tokens ``[1, tokens]``; with images also their pixels, their tokens evenly spread."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TEXT_ID, size.image_token_id - 1, (1, prompt.tokens), generator=generator)
    inputs = {}
    if prompt.images:
        latents, spacing = size.perceiver["resampler_n_latents"], prompt.tokens // prompt.images
        if spacing <= latents:
            raise ValueError(f"prompt is {prompt}, expected more than {latents} tokens for each image")
        for start in range(1, 1 + prompt.images * spacing, spacing):
            ids[:, start : start + latents] = size.image_token_id
        pixels = torch.randn(1, prompt.images, 3, *size.image, generator=generator)
        inputs["pixel_values"] = pixels.to(device, dtype)
    return {"input_ids": ids.to(device), **inputs}


def random_adapter(
    model: nn.Module, *, keys: int, normalizer: str = "visible", seed: int = 0
) -> mk.MimICAdapter:
    """A MimIC adapter whose gates are about half open for a query that sees ``keys`` keys."""
    adapter = mk.create(model, mk.MimICConfig(normalizer=normalizer))
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.layers.values():
        layer.weight.data.copy_(GATE_STD * torch.randn(layer.weight.shape, generator=generator))
        layer.bias.data.fill_(math.log(keys))
        layer.shift.data.copy_(SHIFT_STD * torch.randn(layer.shift.shape, generator=generator))
    return adapter.requires_grad_(False)


class Subject:
    """A model and its variants, one of them in use at a time; within a ``with`` block.

    "plain" has no shift, "published" the authors' formulation, and each name in ``impls`` is ours with
    that implementation. Changing the variant changes configs that exist already, so that what was
    compiled for one stays valid.
    """

    def __init__(self, model: nn.Module, adapter: mk.MimICAdapter, impls: Mapping[str, str]) -> None:
        self.model = model
        self._impls = dict(impls)
        self._attentions = [anchor.self_attn for anchor in find_anchors(model)]
        self._configs = {"plain": self._current()}
        # In the model's dtype, as in a model that was loaded with its parameters: no casts at every call.
        with published(model, copy.deepcopy(adapter).to(model.dtype)):
            self._configs["published"] = self._current()
        self._handle = mk.attach(model, adapter)
        self.use("plain")

    def use(self, variant: str) -> None:
        """Patch the model as ``variant`` is. KeyError: no such variant."""
        if variant in self._impls:
            self._handle.impl = self._impls[variant]
            self._handle.enable()
            return
        self._handle.disable()
        for attention, config in zip(self._attentions, self._configs[variant], strict=True):
            attention.config = config

    def __enter__(self) -> "Subject":
        return self

    def __exit__(self, *exception: object) -> None:
        self.use("plain")
        self._handle.detach()

    def _current(self) -> list:
        return [attention.config for attention in self._attentions]
