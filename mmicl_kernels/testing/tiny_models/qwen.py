"""Qwen2.5-VL, with positions of three dimensions, and what the families like it share."""

import torch
from torch import Tensor

from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    TEXT,
    built,
    place_images,
)

IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": IMAGE_ID + 1,
    "vision_start_token_id": IMAGE_ID + 2,
    "vision_end_token_id": IMAGE_ID + 3,
}
PATCHES = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
}
VISION = {
    **PATCHES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": TEXT["hidden_size"],
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


_qwen2_5_vl = built(
    "Qwen2_5_VL",
    text_config={**TEXT, "rope_parameters": ROPE},
    vision_config={**VISION, "window_size": IMAGE_SIZE, "fullatt_block_indexes": [1]},
    **IDS,
)


def _qwen2_5_vl_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    side = IMAGE_SIZE // PATCH_SIZE
    place_images(ids, attention_mask, side * side, IMAGE_ID + 2, IMAGE_ID + 3)
    patches = pixels.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, side, side]] * ids.shape[0]),
    }


BUILDERS = {"qwen2_5_vl": _qwen2_5_vl}
INPUTS = {"qwen2_5_vl": _qwen2_5_vl_inputs}
