"""Decoders of mixed layers: Mllama (cross-attention), Cohere2 Vision (sliding), LFM2-VL (convolution)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    SIGLIP,
    TEXT,
    VISION,
    built,
    image_inputs,
    patches,
    place_images,
    vary_norms,
)

_LAYERS = 4
_MLLAMA_TILES = 2
# Cohere2 Vision and LFM2-VL merge each 2 x 2 square of patches into one image token.
_PATCH_SIZE = 2
_MERGE = 2
_MERGED_INPUTS = image_inputs((IMAGE_SIZE // _PATCH_SIZE // _MERGE) ** 2, IMAGE_ID + 1, IMAGE_ID + 2)


_mllama = built(
    "Mllama",
    text_config={
        **TEXT,
        "num_hidden_layers": _LAYERS,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    vision_config={
        **VISION,
        "num_global_layers": 1,
        "max_num_tiles": _MLLAMA_TILES,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": list(range(VISION["num_hidden_layers"])),
        "vision_output_dim": VISION["hidden_size"] * (1 + VISION["num_hidden_layers"]),
    },
    image_token_index=IMAGE_ID,
)


def _mllama_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    place_images(ids, attention_mask, 1)
    # The image fills the first tile; the second one is padding, which nothing attends to.
    tiles = torch.stack([pixels, torch.zeros_like(pixels)], dim=1)
    tile_mask = torch.tensor([1, 0])
    sees_image = (ids == IMAGE_ID).long().cumsum(1)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": tiles[:, None],
        "aspect_ratio_ids": torch.ones(ids.shape[0], 1, dtype=torch.long),
        "aspect_ratio_mask": tile_mask.repeat(ids.shape[0], 1, 1),
        "cross_attention_mask": sees_image[:, :, None, None] * tile_mask,
    }


_cohere2_vision = built(
    "Cohere2Vision",
    text_config={
        **TEXT,
        "model_type": "cohere2",
        "num_hidden_layers": _LAYERS,
        "sliding_window": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    vision_config={**SIGLIP, "patch_size": _PATCH_SIZE},
    downsample_factor=_MERGE,
    alignment_intermediate_size=32,
    image_token_id=IMAGE_ID,
)


_lfm2_vl = built(
    "Lfm2Vl",
    text_config={
        **TEXT,
        "model_type": "lfm2",
        "num_hidden_layers": _LAYERS,
        "layer_types": ["conv", "full_attention", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    vision_config={
        **{key: value for key, value in VISION.items() if key != "image_size"},
        "model_type": "siglip2_vision_model",
        "patch_size": _PATCH_SIZE,
        "num_patches": (IMAGE_SIZE // _PATCH_SIZE) ** 2,
        "vision_use_head": False,
    },
    downsample_factor=_MERGE,
    projector_hidden_size=24,
    image_token_id=IMAGE_ID,
)


def _lfm2_vl_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    side = IMAGE_SIZE // _PATCH_SIZE
    packed = patches(pixels, _PATCH_SIZE)
    return {
        **_MERGED_INPUTS(model, ids, attention_mask, packed),
        "spatial_shapes": torch.tensor([[side, side]] * ids.shape[0]),
        "pixel_attention_mask": torch.ones(packed.shape[:2], dtype=torch.long),
    }


def _prepare_mllama(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        # Gates start (almost) closed: no image would reach the text.
        if "gate" in name.rpartition(".")[2]:
            parameter.fill_(0.5)
        # What the cross-attention brings would be far smaller than the stream.
        if name.endswith(("cross_attn.v_proj.weight", "cross_attn.o_proj.weight")):
            parameter.mul_(4.0)


def _prepare_lfm2_vl(model: PreTrainedModel) -> None:
    for layer in model.model.language_model.layers:
        if hasattr(layer, "conv"):
            # Its output is a product of four small factors, lost beside the stream.
            layer.conv.conv.weight.normal_()


BUILDERS = {"mllama": _mllama, "cohere2_vision": _cohere2_vision, "lfm2_vl": _lfm2_vl}
INPUTS = {"mllama": _mllama_inputs, "cohere2_vision": _MERGED_INPUTS, "lfm2_vl": _lfm2_vl_inputs}
PREPARE = {
    "mllama": (vary_norms, _prepare_mllama),
    "cohere2_vision": (vary_norms,),
    "lfm2_vl": (vary_norms, _prepare_lfm2_vl),
}
