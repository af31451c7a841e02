"""Text-only causal language models: the decoders inside the LVLMs, without an image."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmicl_kernels.testing.tiny_models.common import TEXT, built

# Shorter than a prompt of 12 tokens; the first layer attends to all of it, the others do not.
_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
# Mistral has no layer types: its window holds in every layer. Qwen3 names its own size of heads.
_OPTIONS = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": _SLIDING,
    "Qwen3": {**_SLIDING, "head_dim": 16},
}


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


BUILDERS = {
    prefix.lower(): built(prefix, model_class=f"{prefix}ForCausalLM", **TEXT, **options)
    for prefix, options in _OPTIONS.items()
}
INPUTS = dict.fromkeys(BUILDERS, _text_inputs)
PREPARE = {"qwen2": (prepare,), "qwen3": (prepare,)}
