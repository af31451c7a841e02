"""GLM-4.1V and GLM-4.5V: positions of three dimensions on part of each head, interleaved in pairs."""

from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models import qwen
from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    TEXT,
    built,
    use_batched_experts,
)

_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": IMAGE_ID + 1,
    "image_start_token_id": IMAGE_ID + 2,
    "image_end_token_id": IMAGE_ID + 3,
    "video_start_token_id": IMAGE_ID - 4,
    "video_end_token_id": IMAGE_ID - 3,
}
_TEXT = {
    **TEXT,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 1],
        "partial_rotary_factor": 0.75,
        "rope_theta": 1e4,
    },
}
_VISION = {**qwen.VISION, "image_size": IMAGE_SIZE}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}


def _sharpen(model: PreTrainedModel) -> None:
    """Let images and routers matter: their initial values make them vanish or all but uniform."""
    for name, parameter in model.named_parameters():
        # A product of two small factors: without this an image is far below the epsilon of the first norm.
        if ".visual.merger." in name and name.endswith("_proj.weight"):
            parameter.mul_(8.0)
        if name.endswith(("mlp.gate.weight", "mlp.experts.gate_up_proj")):
            parameter.mul_(8.0)


BUILDERS = {
    "glm4v": built("Glm4v", text_config=_TEXT, vision_config=_VISION, **_IDS),
    "glm4v_moe": built("Glm4vMoe", text_config={**_TEXT, **_EXPERTS}, vision_config=_VISION, **_IDS),
}
PREPARE = {"glm4v": (_sharpen,), "glm4v_moe": (_sharpen, use_batched_experts)}
INPUTS = dict.fromkeys(BUILDERS, qwen.INPUTS["qwen2_5_vl"])
