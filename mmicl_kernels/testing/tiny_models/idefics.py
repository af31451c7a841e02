"""Idefics v1 and Idefics2."""

import torch
from torch import Tensor

from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    TEXT,
    VISION,
    built,
    place_images,
)

_idefics = built(
    "Idefics",
    model_class="IdeficsForVisionText2Text",
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
)


def _idefics_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    image_mask = torch.ones(*ids.shape, 1, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": pixels[:, None],
        "image_attention_mask": image_mask,
    }


_idefics2 = built(
    "Idefics2",
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
)


def _idefics2_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    place_images(ids, attention_mask, 2)
    return {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels[:, None]}


BUILDERS = {"idefics": _idefics, "idefics2": _idefics2}
INPUTS = {"idefics": _idefics_inputs, "idefics2": _idefics2_inputs}
