"""Tiny random LVLMs of real HuggingFace classes, built from configs: no downloads, seconds to run."""

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

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


def tiny_model(name: str, *, seed: int = 0, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """One of ``TINY_MODELS``, in eval mode, with weights large enough that attention is not uniform."""
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


def _place_images(ids: Tensor, attention_mask: Tensor, count: int, *around: int) -> None:
    """Write ``count`` image tokens, between ``around``'s two if given, after each row's first token."""
    for row in range(ids.shape[0]):
        start = int(attention_mask[row].argmax()) + 1
        tokens = [IMAGE_ID] * count
        if around:
            tokens = [around[0], *tokens, around[1]]
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)


def _idefics(implementation: str) -> PreTrainedModel:
    config = IdeficsConfig(
        **{**TEXT, "num_key_value_heads": None, "num_hidden_layers": 4},
        cross_layer_interval=2,
        use_resampler=False,
        additional_vocab_size=2,
        vision_config={
            "embed_dim": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        attn_implementation=implementation,
    )
    return IdeficsForVisionText2Text(config)


def _idefics_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    image_mask = torch.ones(*ids.shape, 1, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": pixels[:, None],
        "image_attention_mask": image_mask,
    }


def _idefics2(implementation: str) -> PreTrainedModel:
    config = Idefics2Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config=VISION,
        perceiver_config={
            "hidden_size": TEXT["hidden_size"],
            "resampler_n_latents": 2,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE_ID,
        attn_implementation=implementation,
    )
    return Idefics2ForConditionalGeneration(config)


def _idefics2_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    _place_images(ids, attention_mask, 2)
    return {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels[:, None]}


def _llava(text_config) -> "callable":
    def build(implementation: str) -> PreTrainedModel:
        config = LlavaConfig(
            text_config=text_config(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_index=IMAGE_ID,
            attn_implementation=implementation,
        )
        return LlavaForConditionalGeneration(config)

    return build


def _llava_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    _place_images(ids, attention_mask, (IMAGE_SIZE // PATCH_SIZE) ** 2)
    return {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels}


def _qwen2_5_vl(implementation: str) -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e4,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "window_size": IMAGE_SIZE,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_ID,
        video_token_id=IMAGE_ID + 1,
        vision_start_token_id=IMAGE_ID + 2,
        vision_end_token_id=IMAGE_ID + 3,
        attn_implementation=implementation,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen2_5_vl_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    side = IMAGE_SIZE // PATCH_SIZE
    _place_images(ids, attention_mask, side * side, IMAGE_ID + 2, IMAGE_ID + 3)
    patches = pixels.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, side, side]] * ids.shape[0]),
    }


def _gemma3(implementation: str) -> PreTrainedModel:
    config = Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_index=IMAGE_ID,
        boi_token_index=IMAGE_ID + 1,
        eoi_token_index=IMAGE_ID + 2,
        attn_implementation=implementation,
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    _place_images(ids, attention_mask, 1, IMAGE_ID + 1, IMAGE_ID + 2)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "token_type_ids": (ids == IMAGE_ID).long(),
        "pixel_values": pixels,
    }


_BUILDERS = {
    "gemma3": _gemma3,
    "idefics": _idefics,
    "idefics2": _idefics2,
    "llava-llama": _llava(LlamaConfig),
    "llava-qwen2": _llava(Qwen2Config),
    "qwen2_5_vl": _qwen2_5_vl,
}
_INPUTS = {
    "gemma3": _gemma3_inputs,
    "idefics": _idefics_inputs,
    "idefics2": _idefics2_inputs,
    "llava": _llava_inputs,
    "qwen2_5_vl": _qwen2_5_vl_inputs,
}
TINY_MODELS = tuple(_BUILDERS)
# What a branch's last linear layer returns joins the stream as it is; Gemma norms it first.
PRE_NORM_MODELS = tuple(name for name in TINY_MODELS if name != "gemma3")
