"""Where families of HuggingFace models keep what the methods attach to. Knowledge is data: two tables."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A model class, keyed in ``FAMILIES`` by its ``config.model_type``.

    ``layers`` is the path of the text decoder's list of layers. ``no_placeholders``: the option of the text
    config with which a prompt can have no placeholders of fused tokens, and the reason. ``per_image`` are
    inputs that have one entry per token in other families, but not in this one. ``reads`` is the path of what
    sees every pass, where ``generate`` goes around the model's own forward.
    """

    layers: str
    no_placeholders: tuple[str, str] | None = None
    per_image: tuple[str, ...] = ()
    reads: str = ""


@dataclass(frozen=True)
class Decoder:
    """What one layer of a text decoder consists of, keyed in ``DECODERS`` by its config's ``model_type``.

    Names are children of a layer. A layer has either ``attention``, softmax over the sequence, whose child
    ``projection`` maps its heads back; or one of ``mixers``, which has no softmax for MimIC to shift; or one
    of ``skipped``, and then no method touches it. ``after_attention`` and ``after_mlp`` are what returns the
    last of a branch before it joins the residual stream, where that is another module than the branch's own.
    A text config whose ``norm_after`` is true is looked up as ``model_type:norm_after``.
    ``requires`` are values of the text config without which a layer is built in another order.
    ``shares_kv``: layers read the keys of earlier ones, which reentrant checkpointing cuts off.
    """

    attention: str = "self_attn"
    projection: str = "o_proj"
    mlp: str = "mlp"
    mixers: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    after_attention: str | None = None
    after_mlp: str | None = None
    requires: dict[str, object] = field(default_factory=dict)
    shares_kv: bool = False


_LANGUAGE_MODEL = Family("model.language_model.layers")
_TEXT_MODEL = Family("model.text_model.layers")
_FLAT = Family("model.layers")

FAMILIES = {
    "blip-2": Family("language_model.model.decoder.layers", reads="language_model"),
    "cohere2_vision": _LANGUAGE_MODEL,
    "deepseek_vl": _LANGUAGE_MODEL,
    "deepseek_vl_hybrid": _LANGUAGE_MODEL,
    "gemma3": _LANGUAGE_MODEL,
    "gemma4": Family(
        "model.language_model.layers",
        no_placeholders=(
            "hidden_size_per_layer_input",
            "every layer looks up an embedding of its own by the placeholder's id",
        ),
    ),
    "glm4v": _LANGUAGE_MODEL,
    "glm4v_moe": _LANGUAGE_MODEL,
    "gpt_oss": _FLAT,
    # Its gated cross-attention layers stand in a list of their own and are never touched.
    "idefics": _FLAT,
    "idefics2": _TEXT_MODEL,
    "idefics3": _TEXT_MODEL,
    "internvl": _LANGUAGE_MODEL,
    "lfm2_vl": _LANGUAGE_MODEL,
    "llama": _FLAT,
    "llama4": Family("language_model.model.layers"),
    "llava": _LANGUAGE_MODEL,
    "llava_next": _LANGUAGE_MODEL,
    "llava_onevision": _LANGUAGE_MODEL,
    "minicpmv4_6": _LANGUAGE_MODEL,
    "minicpmv4_7": _LANGUAGE_MODEL,
    "mistral": _FLAT,
    "mistral3": _LANGUAGE_MODEL,
    "mllama": _LANGUAGE_MODEL,
    "molmo2": _LANGUAGE_MODEL,
    "ovis2": _LANGUAGE_MODEL,
    "paligemma": _LANGUAGE_MODEL,
    "phi4_multimodal": Family("model.layers", per_image=("image_attention_mask",)),
    "qwen2": _FLAT,
    "qwen2_5_vl": _LANGUAGE_MODEL,
    "qwen2_vl": _LANGUAGE_MODEL,
    "qwen3": _FLAT,
    "qwen3_5": _LANGUAGE_MODEL,
    "qwen3_5_moe": _LANGUAGE_MODEL,
    "qwen3_vl": _LANGUAGE_MODEL,
    "qwen3_vl_moe": _LANGUAGE_MODEL,
    "smolvlm": _TEXT_MODEL,
}

# Each branch is normed before it is computed, and joins the stream as it comes.
_PRE_NORM = Decoder()
_GEMMA = Decoder(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")
_LINEAR_ATTENTION = Decoder(mixers=("linear_attn",))

DECODERS = {
    "cohere2": _PRE_NORM,  # both branches read the same norm and join together
    "gemma": _PRE_NORM,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4_text": Decoder(
        after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm", shares_kv=True
    ),
    # Here post_attention_layernorm is the norm before the MLP.
    "glm4v_text": Decoder(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    "glm4v_moe_text": _PRE_NORM,
    "gpt_oss": _PRE_NORM,
    "idefics": _PRE_NORM,
    "lfm2": Decoder(projection="out_proj", mlp="feed_forward", mixers=("conv",)),
    "llama": _PRE_NORM,
    "llama4_text": Decoder(mlp="feed_forward"),
    "ministral3": _PRE_NORM,
    "mistral": _PRE_NORM,
    "mllama_text_model": Decoder(skipped=("cross_attn",)),
    "molmo2_text": _PRE_NORM,
    # The same modules the other way around: a branch, then its norm.
    "molmo2_text:norm_after": Decoder(
        after_attention="input_layernorm", after_mlp="post_attention_layernorm"
    ),
    "opt": Decoder(projection="out_proj", mlp="fc2", requires={"do_layer_norm_before": True}),
    "phi4_multimodal": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_5_vl_text": _PRE_NORM,
    "qwen2_vl_text": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_5_moe_text": _LINEAR_ATTENTION,
    "qwen3_5_text": _LINEAR_ATTENTION,
    "qwen3_moe": _PRE_NORM,
    "qwen3_vl_moe_text": _PRE_NORM,
    "qwen3_vl_text": _PRE_NORM,
}
