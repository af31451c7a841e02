"""Families with a decoder of their own: Phi4 multimodal, Molmo2, DeepSeek-VL, Llama4 and BLIP-2 (OPT)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models.common import (
    IMAGE_ID,
    IMAGE_SIZE,
    PATCH_SIZE,
    SIGLIP,
    TEXT,
    VISION,
    built,
    image_inputs,
    patch_inputs,
    patches,
    place,
    place_images,
)

_START_ID, _END_ID, _LOW_RES_START_ID = IMAGE_ID + 1, IMAGE_ID + 2, IMAGE_ID + 3
# Two crops of 2 x 2 patches, each pooled into one token: a small view of the image, then the image.
_MOLMO2_IMAGE = [_LOW_RES_START_ID, IMAGE_ID, _END_ID, _START_ID, IMAGE_ID, _END_ID]
_MULTI_HEAD = {**TEXT, "num_key_value_heads": TEXT["num_attention_heads"]}


_phi4_multimodal = built(
    "Phi4Multimodal",
    model_class="Phi4MultimodalForCausalLM",
    **TEXT,
    sliding_window=8,
    original_max_position_embeddings=128,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        # Three quarters of a head's 8 dimensions turn: 3 pairs.
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.25, 1.5],
        "long_factor": [1.0, 2.0, 4.0],
    },
    vision_config={
        **VISION,
        "crop_size": IMAGE_SIZE,
        "image_token_id": IMAGE_ID,
    },
    audio_config={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "input_size": 16,
        "nemo_conv_channels": 16,
        "bias_max_distance": 8,
        "audio_token_id": IMAGE_ID + 1,
    },
)


def _phi4_multimodal_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    """One crop and the view of the whole image: a token and a newline each, and a separator between."""
    place_images(ids, attention_mask, 5)
    views = torch.stack([pixels.flip(-1), pixels], 1)
    side = IMAGE_SIZE // PATCH_SIZE
    own = torch.ones(*views.shape[:2], side, side)
    # The crop's right half is padding. Without any, SDPA makes the vision tower causal, and eager does not.
    own[:, 1, :, -1] = 0
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "image_pixel_values": views,
        "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * ids.shape[0]),
        "image_attention_mask": own,
    }


def _prepare_phi4_multimodal(model: PreTrainedModel) -> None:
    keys = TEXT["num_attention_heads"] + TEXT["num_key_value_heads"]
    for layer in model.model.layers:
        # The rows of the queries and of the keys; those of the values follow.
        layer.self_attn.qkv_proj.weight[: keys * layer.self_attn.head_dim].mul_(8.0)
    embedding = model.model.embed_tokens_extend.image_embed
    embedding.global_img_feature_extensor.normal_()
    embedding.sub_img_feature_extensor.normal_()


def _molmo2(**options) -> Callable[[str], PreTrainedModel]:
    return built(
        "Molmo2",
        # The ids of images lie beyond the vocabulary that is predicted.
        text_config={**TEXT, "vocab_size": IMAGE_ID, "additional_vocab_size": 4, **options},
        vision_config={
            **VISION,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "num_key_value_heads": VISION["num_attention_heads"],
            "head_dim": 8,
        },
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": VISION["hidden_size"],
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "text_hidden_size": TEXT["hidden_size"],
        },
        image_patch_id=IMAGE_ID,
        image_start_token_id=_START_ID,
        image_end_token_id=_END_ID,
        low_res_image_start_token_id=_LOW_RES_START_ID,
        # As if videos had no markers of their own.
        frame_start_token_id=_START_ID,
        frame_end_token_id=_END_ID,
    )


_MOLMO2_QWEN3 = {
    "head_dim": 16,
    "qk_norm_type": "qwen3",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
# Of Molmo2-O: norms of whole projections and of outputs, and a rotation that only some layers stretch.
_MOLMO2_OLMO = {
    "head_dim": 8,
    "num_key_value_heads": TEXT["num_attention_heads"],
    "qk_norm_type": "olmo",
    "norm_after": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
    },
    "rope_scaling_layers": [1],
}


def _molmo2_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    place(ids, attention_mask, _MOLMO2_IMAGE)
    crops = patches(torch.stack([pixels.flip(-1), pixels], 1).flatten(0, 1), PATCH_SIZE)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        # Markers count as part of an image.
        "mm_token_type_ids": (ids >= IMAGE_ID).long(),
        "pixel_values": crops,
        "image_token_pooling": torch.arange(crops.shape[0] * crops.shape[1]).view(len(crops), -1),
        "image_grids": torch.ones(ids.shape[0], 4, dtype=torch.long),
        "image_num_crops": torch.full((ids.shape[0],), 2),
    }


def _prepare_molmo2(model: PreTrainedModel) -> None:
    # An image is added to the embeddings of its tokens, thousands of times smaller than they are.
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.mul_(16.0)
    if model.config.text_config.norm_after:
        # What is not normed first is too small for the epsilon of the norm that follows.
        model.model.language_model.embed_tokens.weight.mul_(50.0)


_DEEPSEEK = {
    "text_config": {**_MULTI_HEAD, "model_type": "llama"},
    "vision_config": SIGLIP,
    "image_token_id": IMAGE_ID,
    "tie_word_embeddings": False,
}
_deepseek_vl_hybrid = built(
    "DeepseekVLHybrid",
    **_DEEPSEEK,
    high_res_vision_config={
        **VISION,
        "model_type": "sam_vision_model",
        "image_size": 2 * IMAGE_SIZE,
        "output_channels": 8,
        "mlp_dim": VISION["intermediate_size"],
        "window_size": 2,
        "global_attn_indexes": [1],
        "initializer_range": 0.02,
    },
)


def _deepseek_vl_hybrid_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    enlarged = interpolate(pixels, scale_factor=2, mode="bilinear")
    return {**patch_inputs(model, ids, attention_mask, pixels), "high_res_pixel_values": enlarged}


def _prepare_deepseek_vl_hybrid(model: PreTrainedModel) -> None:
    # Initially the intermediate layer of the large encoder is weighted with 0.
    model.model.high_res_vision_alpha.fill_(0.5)


_llama4 = built(
    "Llama4",
    text_config={
        **TEXT,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        # Each kind of attention with each kind of feed-forward.
        "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 0, 0],
        "attention_chunk_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    vision_config={
        **VISION,
        "patch_size": PATCH_SIZE // 2,
        # Shuffling lays the 2 x 2 patches of a token side by side.
        "intermediate_size": 4 * VISION["hidden_size"],
        "projector_input_dim": 24,
        "projector_output_dim": 24,
        "vision_output_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    image_token_index=IMAGE_ID,
    boi_token_index=_START_ID,
    eoi_token_index=_END_ID,
)


def _prepare_llama4(model: PreTrainedModel) -> None:
    for layer in model.language_model.model.layers:
        if layer.is_moe_layer:
            layer.feed_forward.router.weight.mul_(8.0)


_UNKNOWN_TO_OPT = ("intermediate_size", "num_key_value_heads")
_blip2 = built(
    "Blip2",
    text_config={
        **{key: value for key, value in TEXT.items() if key not in _UNKNOWN_TO_OPT},
        "model_type": "opt",
        "ffn_dim": TEXT["intermediate_size"],
        "word_embed_proj_dim": TEXT["hidden_size"],
        "dropout": 0.0,
        # With random weights, tied ones predict the last token again.
        "tie_word_embeddings": False,
    },
    vision_config={**VISION, "initializer_range": 0.02},
    qformer_config={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    num_query_tokens=4,
    image_token_index=IMAGE_ID,
)


def _prepare_blip2(model: PreTrainedModel) -> None:
    # Equal queries would make the tokens of an image equal.
    model.query_tokens.normal_()
    for name, parameter in model.qformer.named_parameters():
        # What the queries read is added to them, a hundred times smaller than they are.
        if "crossattention" in name and name.endswith(("value.weight", "dense.weight")):
            parameter.mul_(8.0)


def _vary(model: PreTrainedModel) -> None:
    """Give the decoder's norms and biases, ones and zeros at first, values that leave a trace."""
    for module in model.get_decoder().modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.normal_(std=module.weight.std().item() / 4)


BUILDERS = {
    "phi4_multimodal": _phi4_multimodal,
    "molmo2": _molmo2(**_MOLMO2_QWEN3),
    "molmo2-norm_after": _molmo2(**_MOLMO2_OLMO),
    "deepseek_vl": built("DeepseekVL", **_DEEPSEEK),
    "deepseek_vl_hybrid": _deepseek_vl_hybrid,
    "llama4": _llama4,
    "blip2": _blip2,
}
INPUTS = {
    "phi4_multimodal": _phi4_multimodal_inputs,
    "molmo2": _molmo2_inputs,
    "deepseek_vl": patch_inputs,
    "deepseek_vl_hybrid": _deepseek_vl_hybrid_inputs,
    "llama4": image_inputs(4, _START_ID, _END_ID),
    "blip-2": patch_inputs,
}
PREPARE = {
    "phi4_multimodal": (_vary, _prepare_phi4_multimodal),
    "molmo2": (_vary, _prepare_molmo2),
    "molmo2-norm_after": (_vary, _prepare_molmo2),
    "deepseek_vl": (_vary,),
    "deepseek_vl_hybrid": (_vary, _prepare_deepseek_vl_hybrid),
    "llama4": (_vary, _prepare_llama4),
    "blip2": (_vary, _prepare_blip2),
}
