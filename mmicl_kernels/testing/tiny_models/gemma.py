"""The Gemma family: branches are normed before they join the stream."""

from torch import Tensor

from mmicl_kernels.testing.tiny_models.common import IMAGE_ID, TEXT, VISION, built, place_images

_gemma3 = built(
    "Gemma3",
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
)


def _gemma3_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    place_images(ids, attention_mask, 1, IMAGE_ID + 1, IMAGE_ID + 2)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "token_type_ids": (ids == IMAGE_ID).long(),
        "pixel_values": pixels,
    }


BUILDERS = {"gemma3": _gemma3}
INPUTS = {"gemma3": _gemma3_inputs}
