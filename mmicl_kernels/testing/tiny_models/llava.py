"""LLaVA 1.5 and its like: images become tokens of an ordinary text decoder."""

from collections.abc import Callable

from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
)

from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    TEXT,
    VISION,
    place_images,
)
from mmicl_kernels.testing.tiny_models.llava_like import pixtral_inputs


def _llava(text_config) -> Callable[[str], PreTrainedModel]:
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
    if model.config.vision_config.model_type == "pixtral":
        return pixtral_inputs(model, ids, attention_mask, pixels)
    place_images(ids, attention_mask, (IMAGE_SIZE // PATCH_SIZE) ** 2)
    return {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels}


BUILDERS = {"llava-llama": _llava(LlamaConfig), "llava-qwen2": _llava(Qwen2Config)}
INPUTS = {"llava": _llava_inputs}
