"""LVLMs that put image features among the tokens of an ordinary text decoder, as LLaVA does."""

import torch
from torch import Tensor

from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    SIGLIP,
    TEXT,
    VISION,
    built,
    image_inputs,
    place,
    place_images,
    use_batched_experts,
)
from mmicl_kernels.testing.tiny_models.text import prepare

# Pixtral's decoders name their own size of heads; no released LVLM here has Mistral's window.
_MISTRAL = {**TEXT, "model_type": "mistral", "sliding_window": None}
_PIXTRAL_TEXT = {**_MISTRAL, "head_dim": 16}
_MINISTRAL3 = {**_PIXTRAL_TEXT, "model_type": "ministral3"}
_QWEN2 = {**TEXT, "model_type": "qwen2"}
_QWEN3_MOE = {
    **TEXT,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# Twice as many patches a side, which a merge of 2 x 2 turns into 4 tokens.
_FINE_VISION = {**VISION, "patch_size": PATCH_SIZE // 2}
# Whole crops are one patch, so that a base image, two crops and a newline are 4 tokens.
_COARSE_VISION = {**VISION, "patch_size": IMAGE_SIZE}
_PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]]
_PIXTRAL_VISION = {**VISION, "model_type": "pixtral"}
_BREAK_ID, _END_ID = IMAGE_ID + 1, IMAGE_ID + 2
# 58 and 59 are left to the tests' placeholders, and prompts are drawn from below 56.
_OVIS_INDICATORS = [IMAGE_ID - 4, IMAGE_ID - 3, IMAGE_ID + 1, IMAGE_ID + 2, IMAGE_ID + 3]


_IDEFICS3 = {
    "text_config": {**TEXT, "model_type": "llama"},
    "image_token_id": IMAGE_ID,
    "pad_token_id": TEXT["pad_token_id"],
    "scale_factor": 2,
}


def _crop_inputs(ids, attention_mask, crops: Tensor, tokens_per_crop: int) -> dict[str, Tensor]:
    """Inputs of Idefics3 and SmolVLM; ``crops [B,N,3,H,W]`` are all of each row's one image."""
    place_images(ids, attention_mask, crops.shape[1] * tokens_per_crop, IMAGE_ID + 1, IMAGE_ID + 1)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": crops,
        "pixel_attention_mask": torch.ones(*crops.shape[:2], *crops.shape[3:], dtype=torch.long),
    }


def _idefics3_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    return _crop_inputs(ids, attention_mask, pixels[:, None], 4)


def _smolvlm_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    return _crop_inputs(ids, attention_mask, torch.stack([pixels, pixels.flip(-1)], 1), 1)


_llava_next = built(
    "LlavaNext",
    text_config=_MISTRAL,
    vision_config={**_COARSE_VISION, "model_type": "clip_vision_model"},
    image_token_index=IMAGE_ID,
    image_grid_pinpoints=_PINPOINTS,
    image_seq_length=1,
)


_llava_onevision = built(
    "LlavaOnevision",
    text_config=_QWEN2,
    vision_config={**SIGLIP, "patch_size": IMAGE_SIZE},
    image_token_index=IMAGE_ID,
    video_token_index=IMAGE_ID + 1,
    image_grid_pinpoints=_PINPOINTS,
)


def _llava_next_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    """An image twice as wide as high: the base image, a left and a right crop, and one row's newline."""
    place_images(ids, attention_mask, 4)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.stack([pixels, pixels.flip(-1), pixels.flip(-2)], 1),
        "image_sizes": torch.tensor([_PINPOINTS[0]] * ids.shape[0]),
    }


def _llava_onevision_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    inputs = _llava_next_inputs(model, ids, attention_mask, pixels)
    return {**inputs, "batch_num_images": torch.ones(ids.shape[0], dtype=torch.long)}


_INTERNVL = {
    "vision_config": _FINE_VISION,
    "image_token_id": IMAGE_ID,
    "image_seq_length": 4,
    "tie_word_embeddings": False,
}


_MISTRAL3 = {
    "vision_config": {**_PIXTRAL_VISION, "patch_size": PATCH_SIZE // 2},
    "image_token_index": IMAGE_ID,
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
}


_llava_pixtral = built(
    "Llava",
    text_config=_PIXTRAL_TEXT,
    vision_config=_PIXTRAL_VISION,
    image_token_index=IMAGE_ID,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
)


def pixtral_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    """Inputs of every model whose ``config.vision_config.model_type`` is "pixtral".

    That is Mistral3, and the LLaVA whose ``config.model_type`` is "llava" like any other's. The 2 x 2
    tokens of an image are written as rows, the first closed by a break and the last by an end.
    """
    place(ids, attention_mask, [IMAGE_ID, IMAGE_ID, _BREAK_ID, IMAGE_ID, IMAGE_ID, _END_ID])
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * ids.shape[0]),
    }


_ovis2 = built(
    "Ovis2",
    text_config=_QWEN2,
    vision_config={**_FINE_VISION, "hidden_stride": 2, "vocab_size": 32},
    image_token_id=IMAGE_ID,
    visual_indicator_token_ids=_OVIS_INDICATORS,
    vocab_size=TEXT["vocab_size"],
    hidden_size=TEXT["hidden_size"],
    tie_word_embeddings=False,
)


BUILDERS = {
    "idefics3": built("Idefics3", **_IDEFICS3, vision_config=_FINE_VISION),
    "smolvlm": built("SmolVLM", **_IDEFICS3, vision_config=VISION),
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": built("InternVL", **_INTERNVL, text_config=_QWEN2),
    "internvl-qwen3_moe": built("InternVL", **_INTERNVL, text_config=_QWEN3_MOE),
    "mistral3": built("Mistral3", **_MISTRAL3, text_config=_PIXTRAL_TEXT),
    "mistral3-ministral3": built("Mistral3", **_MISTRAL3, text_config=_MINISTRAL3),
    "llava-pixtral": _llava_pixtral,
    "ovis2": _ovis2,
}
INPUTS = {
    "idefics3": _idefics3_inputs,
    "smolvlm": _smolvlm_inputs,
    "llava_next": _llava_next_inputs,
    "llava_onevision": _llava_onevision_inputs,
    "internvl": image_inputs(4, IMAGE_ID + 1, IMAGE_ID + 2),
    "mistral3": pixtral_inputs,
    "ovis2": image_inputs(4, _OVIS_INDICATORS[0], _OVIS_INDICATORS[-1]),
}


PREPARE = {
    "llava_onevision": (prepare,),
    "internvl": (prepare,),
    "internvl-qwen3_moe": (prepare, use_batched_experts),
    "ovis2": (prepare,),
}
