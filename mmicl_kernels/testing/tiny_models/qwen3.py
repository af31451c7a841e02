"""Qwen2-VL and the Qwen3 generation: deepstack, experts, hybrids of linear and gated attention."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models import qwen
from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    TEXT,
    VISION,
    built,
    place_images,
    use_batched_experts,
)

_VISION = {**qwen.VISION, "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2}
_DEEPSTACK_VISION = {**_VISION, "deepstack_visual_indexes": [0, 1]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# As in the checkpoints, heads are wider than hidden_size / heads, and the axes' frequencies alternate.
_QWEN3_TEXT = {
    **TEXT,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
        "rope_theta": 1e4,
    },
}
_HYBRID_TEXT = {
    **_QWEN3_TEXT,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
    },
}


_QWEN2_TEXT = {
    **TEXT,
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": qwen.ROPE,
}
_QWEN2_VISION = {**qwen.PATCHES, "embed_dim": 16, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2}
_QWEN3_MOE_TEXT = {**_QWEN3_TEXT, **_EXPERTS}
_HYBRID_MOE_TEXT = {**_HYBRID_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 24}


def _qwen(prefix: str, text: dict, vision: dict) -> Callable[[str], PreTrainedModel]:
    return built(prefix, text_config=text, vision_config=vision, **qwen.IDS)


_MINICPMV4 = {
    "text_config": {**_HYBRID_TEXT, "model_type": "qwen3_5_text"},
    "vision_config": VISION,
    "insert_layer_id": 0,
    "image_token_id": IMAGE_ID,
    "video_token_id": IMAGE_ID + 1,
}


def _minicpmv4_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    # Two merges of 2 x 2 patches leave four tokens of the enlarged image.
    pixels = interpolate(pixels, scale_factor=4, mode="bilinear")
    side = pixels.shape[-1] // PATCH_SIZE
    place_images(ids, attention_mask, (side // 4) ** 2, IMAGE_ID + 2, IMAGE_ID + 3)
    patches = pixels.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
    # All patches of all images lie side by side: [1, 3, patch, images * patches * patch].
    packed = patches.permute(1, 4, 0, 2, 3, 5).flatten(2)[None]
    # Only 4.7 has positions of three dimensions, and needs to know which tokens they are for.
    types = {} if model.config.model_type == "minicpmv4_6" else {"mm_token_type_ids": (ids == IMAGE_ID).int()}
    return {
        **types,
        "input_ids": ids,
        "attention_mask": attention_mask,
        "pixel_values": packed,
        "target_sizes": torch.tensor([[side, side]] * ids.shape[0], dtype=torch.int32),
    }


# Random routes near a tie, experts that add nothing, and a memory that ignores its input would hide errors.
_SCALED = (
    "mlp.gate.weight",
    "mlp.shared_expert_gate.weight",
    "mlp.experts.gate_up_proj",
    "linear_attn.in_proj_qkv.weight",
    "linear_attn.in_proj_a.weight",
    "linear_attn.in_proj_b.weight",
    "linear_attn.conv1d.weight",
)


def _sharpen(model: PreTrainedModel) -> None:
    """Let norms, routers and recurrences matter: their initial values make them all but uniform."""
    for name, parameter in model.named_parameters():
        # These norms undo the scale of q_proj and k_proj; some weights count from 0, some from 1.
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.add_(0.5)
        if name.endswith(_SCALED):
            parameter.mul_(8.0)
        # Initially the state decays by up to e^-20 a token, and nothing is remembered.
        if name.endswith("A_log"):
            parameter.uniform_(-3.0, 0.0)


BUILDERS = {
    "qwen2_vl": _qwen("Qwen2VL", _QWEN2_TEXT, _QWEN2_VISION),
    "qwen3_vl": _qwen("Qwen3VL", _QWEN3_TEXT, _DEEPSTACK_VISION),
    "qwen3_vl_moe": _qwen("Qwen3VLMoe", _QWEN3_MOE_TEXT, _DEEPSTACK_VISION),
    "qwen3_5": _qwen("Qwen3_5", _HYBRID_TEXT, _VISION),
    "qwen3_5_moe": _qwen("Qwen3_5Moe", _HYBRID_MOE_TEXT, _VISION),
    "minicpmv4_6": built("MiniCPMV4_6", **_MINICPMV4),
    "minicpmv4_7": built("MiniCPMV4_7", **_MINICPMV4),
}
PREPARE = {
    "qwen3_vl": (_sharpen,),
    "qwen3_vl_moe": (_sharpen, use_batched_experts),
    "qwen3_5": (_sharpen,),
    "qwen3_5_moe": (_sharpen, use_batched_experts),
    "minicpmv4_6": (_sharpen,),
    "minicpmv4_7": (_sharpen,),
}
INPUTS = {
    **dict.fromkeys(BUILDERS, qwen.INPUTS["qwen2_5_vl"]),
    "minicpmv4_6": _minicpmv4_inputs,
    "minicpmv4_7": _minicpmv4_inputs,
}
