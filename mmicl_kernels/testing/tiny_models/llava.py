"""LLaVA 1.5 and its like: images become tokens of an ordinary text decoder."""

from torch import Tensor

from mmicl_kernels.testing.tiny_models.common import IMAGE_ID, TEXT, VISION, built, patch_inputs
from mmicl_kernels.testing.tiny_models.llava_like import pixtral_inputs

_LLAVA = {"vision_config": {**VISION, "model_type": "clip_vision_model"}, "image_token_index": IMAGE_ID}


def _llava_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    if model.config.vision_config.model_type == "pixtral":
        return pixtral_inputs(model, ids, attention_mask, pixels)
    return patch_inputs(model, ids, attention_mask, pixels)


BUILDERS = {
    f"llava-{text}": built("Llava", **_LLAVA, text_config={**TEXT, "model_type": text})
    for text in ("llama", "qwen2")
}
INPUTS = {"llava": _llava_inputs}
