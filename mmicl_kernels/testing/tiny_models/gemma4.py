"""The Gemma decoders around Gemma3: PaliGemma (Gemma), PaliGemma2 (Gemma2, soft-capped) and Gemma4."""

from collections.abc import Callable

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
    patch_inputs,
    patches,
    place_images,
    use_batched_experts,
    vary_norms,
)

# Gemma4 pools each 2 x 2 square of patches into one image token.
_GEMMA4_PATCH = 2
_GEMMA4_POOL = 2
# Checkpoints have 30, which logits of tiny models would not feel.
_FINAL_SOFTCAP = 1.0


def _gemma4(**text_config) -> Callable[[str], PreTrainedModel]:
    return built(
        "Gemma4",
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": _FINAL_SOFTCAP,
            **text_config,
        },
        vision_config={
            **{key: value for key, value in VISION.items() if key != "image_size"},
            "num_key_value_heads": VISION["num_attention_heads"],
            "head_dim": 8,
            "patch_size": _GEMMA4_PATCH,
            "pooling_kernel_size": _GEMMA4_POOL,
            "position_embedding_size": 16,
        },
        image_token_id=IMAGE_ID,
        boi_token_id=IMAGE_ID + 1,
        eoi_token_id=IMAGE_ID + 2,
        video_token_id=IMAGE_ID + 3,
        audio_token_id=IMAGE_ID - 3,
    )


# As E2B and E4B: per-layer embeddings; the last two layers read the keys of one of their type above.
_gemma4_small = _gemma4(
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=TEXT["vocab_size"],
)
# As 26B-A4B: experts beside the MLP, global keys that are also the values, images attended both ways.
_gemma4_moe = _gemma4(
    hidden_size_per_layer_input=0,
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
    use_bidirectional_attention="vision",
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=16,
)


def _gemma4_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    side = IMAGE_SIZE // _GEMMA4_PATCH
    place_images(ids, attention_mask, (side // _GEMMA4_POOL) ** 2, IMAGE_ID + 1, IMAGE_ID + 2)
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
        "pixel_values": patches(pixels, _GEMMA4_PATCH),
        "image_position_ids": positions.expand(pixels.shape[0], -1, -1).clone(),
    }


def _paligemma(**text_config) -> Callable[[str], PreTrainedModel]:
    return built(
        "PaliGemma",
        text_config={**TEXT, **text_config},
        vision_config=SIGLIP,
        image_token_index=IMAGE_ID,
        projection_dim=TEXT["hidden_size"],
    )


def _paligemma2(implementation: str) -> PreTrainedModel:
    build = _paligemma(
        model_type="gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=_FINAL_SOFTCAP,
    )
    # SDPA has no soft-capping: transformers 5.23 refuses it for Gemma2, 5.17 silently leaves the cap out.
    text_implementation = "eager" if implementation == "sdpa" else implementation
    return build({"": implementation, "text_config": text_implementation})


def _paligemma_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    # A prompt without a target is all prefix, which attends in both directions.
    return {**patch_inputs(model, ids, attention_mask, pixels), "token_type_ids": torch.zeros_like(ids)}


def _prepare_gemma4(model: PreTrainedModel) -> None:
    # Ones at the start, as are the scalars: no patch would know its place.
    model.model.vision_tower.patch_embedder.position_embedding_table.normal_()
    for scale, layer in zip((0.5, 1.5, 0.75, 1.25), model.model.language_model.layers, strict=True):
        layer.layer_scalar.fill_(scale)


def _prepare_paligemma2(model: PreTrainedModel) -> None:
    # Attention logits that reach a fair part of the cap.
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.mul_(4.0)


BUILDERS = {
    "gemma4": _gemma4_small,
    "gemma4-moe": _gemma4_moe,
    "paligemma": _paligemma(model_type="gemma", num_key_value_heads=1, head_dim=8),
    "paligemma2": _paligemma2,
}
INPUTS = {"gemma4": _gemma4_inputs, "paligemma": _paligemma_inputs}
PREPARE = {
    "gemma4": (vary_norms, _prepare_gemma4),
    "gemma4-moe": (vary_norms, _prepare_gemma4, use_batched_experts),
    "paligemma": (vary_norms,),
    "paligemma2": (vary_norms, _prepare_paligemma2),
}
