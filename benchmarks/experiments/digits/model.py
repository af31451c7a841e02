"""The tiny LVLM: HuggingFace's LLaVA class, Siglip tower and Llama text, 1.1 M parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from . import data

NAME = "mmicl/digits-llava"
WEIGHTS = Path(__file__).with_name("weights.safetensors")


def build_model() -> LlavaForConditionalGeneration:
    """The model with random weights (fp32, CPU), drawn from torch's global generator."""
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=data.IMAGE_SIZE,
        patch_size=data.PATCH_SIZE,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(data.VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.07,  # with 0.02 so narrow a model is late to compare demonstrations
        pad_token_id=data.PAD_ID,
        bos_token_id=data.BOS_ID,
        eos_token_id=data.END_ID,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=data.IMAGE_ID,
        image_seq_length=data.IMAGE_TOKENS,
        initializer_range=0.02,  # projector and output layer
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        pad_token_id=data.PAD_ID,
        bos_token_id=data.BOS_ID,
        eos_token_id=data.END_ID,
    )
    config.name_or_path = NAME
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=data.PAD_ID,
        bos_token_id=data.BOS_ID,
        eos_token_id=data.END_ID,
        do_sample=False,
        max_new_tokens=4,
    )
    return model


def load_model(weights: Path = WEIGHTS) -> LlavaForConditionalGeneration:
    """The pretrained model in fp32, frozen, in eval mode; ``FileNotFoundError`` if missing."""
    if not weights.is_file():
        raise FileNotFoundError(
            f"no weights at {weights}; make them: python -m benchmarks.experiments.digits.pretrain"
        )
    with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten at once
        model = build_model()
    model.load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    return model.eval().requires_grad_(False)


def save_weights(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Writes the weights as fp16 safetensors."""
    save_file({name: w.detach().half().contiguous() for name, w in model.state_dict().items()}, path)
