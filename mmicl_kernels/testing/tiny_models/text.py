"""Text-only causal language models: the decoders inside the LVLMs, without an image."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models.common import TEXT, built, use_batched_experts, vary_norms

# Shorter than a prompt of 12 tokens; the first layer attends to all of it, the others do not.
_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
# Mistral has no layer types: its window holds in every layer. Qwen3 names its own size of heads.
_OPTIONS = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": _SLIDING,
    "Qwen3": {**_SLIDING, "head_dim": 16},
}


_GPT_OSS = built(
    "GptOss",
    model_class="GptOssForCausalLM",
    **TEXT,  # three layers: sliding, full, sliding
    head_dim=16,
    sliding_window=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
    },
)


def _gpt_oss(implementation: str) -> PreTrainedModel:
    # SDPA has no sinks, and transformers refuses it for GPT-OSS.
    return _GPT_OSS("eager" if implementation == "sdpa" else implementation)


def _text_inputs(model, ids, attention_mask, pixels) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": attention_mask}


def prepare(model: PreTrainedModel) -> None:
    """Give the decoder's biases and head norms, zeros and ones at first, values that leave a trace."""
    for name, module in model.get_decoder().named_modules():
        # In proportion to what they are added to: queries and keys are larger than values.
        if name.endswith(("q_proj", "k_proj")) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.2)
        elif name.endswith("v_proj") and module.bias is not None:
            nn.init.normal_(module.bias, std=0.03)
        elif name.endswith(("q_norm", "k_norm")):
            nn.init.uniform_(module.weight, 0.5, 2.0)


def _prepare_gpt_oss(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        # Near 0 at first: next to the scores of 12 keys nobody would miss them.
        nn.init.normal_(layer.self_attn.sinks, mean=1.0)
        nn.init.normal_(layer.self_attn.o_proj.bias, std=0.03)
        layer.mlp.router.weight.mul_(8.0)  # random routes near a tie
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).mul_(8.0)
            nn.init.normal_(getattr(layer.mlp.experts, f"{name}_bias"), std=0.1)


BUILDERS = {
    prefix.lower(): built(prefix, model_class=f"{prefix}ForCausalLM", **TEXT, **options)
    for prefix, options in _OPTIONS.items()
}
BUILDERS["gpt_oss"] = _gpt_oss
INPUTS = dict.fromkeys(BUILDERS, _text_inputs)
PREPARE = {
    "qwen2": (prepare,),
    "qwen3": (prepare,),
    "gpt_oss": (vary_norms, prepare, _prepare_gpt_oss, use_batched_experts),
}
