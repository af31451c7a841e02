"""Prompts of several demonstrations: as chat templates, format strings and the official code have them."""

import pytest
import torch

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.data.prompts.presets import PRESETS
from mmicl_kernels.testing.real_processors import QWEN_CHAT, SMOLVLM_CHAT
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.support.example_images import BLUE, GREEN, RED
from tests.support.example_processors import REAL, processor_of, tokens

SHOTS = [Demonstration((RED,), "what?", "red"), Demonstration((BLUE,), "where?", "a dog")]
QUERY = Demonstration((GREEN,), "who?", "me")
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
INSTRUCTION = "Provide an answer to the question. Use the image to answer."

# Printed once by the official code's own templates: MimIC's Jinja texts of testbed/models rendered with the
# turns of testbed/data and the instruction of src/dataset_utils/vqa.py; LIVE's by joining what
# VQADataset.__getitem__ returns, images as "<image>". Demonstrations, then the query as far as its answer.
OFFICIAL = {
    "mimic-idefics": (
        f"Instruction: {INSTRUCTION}\nImage:<image> Question: what? Answer: red\n"
        "Image:<image> Question: where? Answer: a dog\n",
        "Image:<image> Question: who? Answer:",
        "",
    ),
    "mimic-idefics2": (
        f"Instruction: {INSTRUCTION}<end_of_outterance>\nImage:<image><end_of_outterance>\n"
        "Question: what?<end_of_outterance>\nAnswer: red<end_of_outterance>\n"
        "Image:<image><end_of_outterance>\nQuestion: where?<end_of_outterance>\n"
        "Answer: a dog<end_of_outterance>\n",
        "Image:<image><end_of_outterance>\nQuestion: who?<end_of_outterance>\nAnswer:",
        "",
    ),
    "mimic-llava": (
        f"<|im_start|>instruction\n{INSTRUCTION}<|im_end|>\n<|im_start|>image\n<image><|im_end|>\n"
        "<|im_start|>question\n\nwhat?<|im_end|>\n<|im_start|>answer\n\nred<|im_end|>\n"
        "<|im_start|>image\n<image><|im_end|>\n<|im_start|>question\n\nwhere?<|im_end|>\n"
        "<|im_start|>answer\n\na dog<|im_end|>\n",
        "<|im_start|>image\n<image><|im_end|>\n<|im_start|>question\n\nwho?<|im_end|>\n<|im_start|>answer\n",
        "",
    ),
    "live": (
        f"{INSTRUCTION}\n<image>Question:what? Short answer:red.\n\n"
        "<image>Question:where? Short answer:a dog.\n\n",
        "<image>Question:who? Short answer:",
        ".",
    ),
    "mimic-idefics-caption": (
        "Image:<image> Caption: red\nImage:<image> Caption: a dog\n",
        "Image:<image> Caption:",
        "",
    ),
    "mimic-idefics2-caption": (
        "Image:<image><end_of_outterance>\nCaption: red<end_of_outterance>\n"
        "Image:<image><end_of_outterance>\nCaption: a dog<end_of_outterance>\n",
        "Image:<image><end_of_outterance>\nCaption:",
        "",
    ),
    "mimic-llava-caption": (
        "<|im_start|>image\n<image><|im_end|>\n<|im_start|>caption\n\nred<|im_end|>\n"
        "<|im_start|>image\n<image><|im_end|>\n<|im_start|>caption\n\na dog<|im_end|>\n",
        "<|im_start|>image\n<image><|im_end|>\n<|im_start|>caption\n",
        "",
    ),
}


class Spy:
    """Keeps the texts that a processor was given."""

    def __init__(self, processor):
        self.texts = []
        seen, call = self.texts, type(processor).__call__

        def watched(self, *arguments, text=None, **options):
            seen.extend(text)
            return call(self, *arguments, text=text, **options)

        processor.__class__ = type(type(processor).__name__, (type(processor),), {"__call__": watched})


def spied(name, template, **options):
    processor = processor_of(name, chat=template == "chat" or options.pop("chat", False), **options)
    spy = Spy(processor)
    return PromptBuilder(processor, template), spy


def test_every_preset_has_its_golden_strings():
    assert OFFICIAL.keys() == PRESETS.keys()


@pytest.mark.parametrize("family", ["llava", *REAL])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_prompts(name, family):
    """A padding token that is not attended to stands before the query and before the answer in MimIC's."""
    image = VISION if "qwen" in family else "<image>"
    shots, query, after = (x.replace("<image>", image) for x in OFFICIAL[name])
    try:
        builder, spy = spied(family, name)
    except ValueError as error:  # SmolVLM's token of padding is LLaVA's end of a turn
        assert "smolvlm" in family and "mimic-llava" in name and "nor in the template" in str(error)
        return
    tokenizer = builder.processor.tokenizer
    pad, eos = "" if name == "live" else tokenizer.pad_token, tokenizer.eos_token
    asked = [Demonstration((GREEN,), "who?", "me")]
    teacher = builder.answered(asked, [SHOTS])
    assert spy.texts == [f"{shots}{pad}{query}{pad}me{after}{eos}"]
    builder.answered(asked, [[]], instructed=False)
    assert spy.texts[1] == f"{query}{pad}me{after}{eos}"
    builder.prompt(asked, [SHOTS])
    assert spy.texts[2] == (shots + query)  # nothing keeps apart what is to be answered
    assert not builder.instructs_students
    ids, mask = teacher.inputs["input_ids"], teacher.inputs["attention_mask"].bool()
    hidden = ids == tokenizer.pad_token_id
    assert torch.equal(hidden, ~mask) and int(hidden.sum()) == (0 if name == "live" else 2)
    assert tokenizer.decode(ids[0][teacher.labels[0] != -100]) == f"me{after}{eos}"


def test_a_preset_s_separator_needs_a_token_of_its_own():
    processor = processor_of("llava", chat=False)
    processor.tokenizer.pad_token = "</s>"
    with pytest.raises(ValueError, match="template is 'mimic-idefics', whose .*'</s>', expected one"):
        PromptBuilder(processor, "mimic-idefics")
    PromptBuilder(processor, "live")


def test_a_preset_has_images_as_the_processor_reads_them():
    """Bare where the processor writes the rest, whatever the chat template has; else as the model's own."""
    builder, spy = spied("llava", "live", chat=True)
    builder.prompt([QUERY])
    assert spy.texts[0].endswith("\n<image>Question:who? Short answer:")
    builder, spy = spied("qwen2_vl", "live", chat=True)
    builder.prompt([QUERY])
    assert spy.texts[0].endswith(f"\n{VISION}Question:who? Short answer:")


def test_idefics():
    """The first one's processor has no image token: texts and images are given in turn, and stripped."""
    builder = PromptBuilder(processor_of("idefics", chat=False), "mimic-idefics", instruction="")
    made = builder.answered([QUERY], [SHOTS[:1]])
    image = ["<fake_token_around_image>", "<image>", "<fake_token_around_image>"]
    row, own = made.inputs["input_ids"][0], made.inputs["attention_mask"][0]
    assert tokens(builder, row, own) == [
        "<s>", "<unk>", *"mage:", *image, "<unk>", *"uestion:", "▁", *"what?", "▁", "<unk>", *"nswer:",
        "▁red", "\n", "<unk>", *"mage:", *image, "<unk>", *"uestion:", "▁", *"who?", "▁", "<unk>",
        *"nswer:", "m", "e", "</s>",
    ]  # fmt: skip
    assert tokens(builder, row, made.labels[0] != -100) == ["m", "e", "</s>"]
    assert tokens(builder, row, made.image[0]) == ["<image>", "<image>"]
    seen = made.inputs["image_attention_mask"][0]
    assert seen[own.bool()][-1].tolist() == [0, 1]  # the answer sees the query's image
    pixels = made.inputs["pixel_values"][0].flatten(2).mean(-1)
    assert pixels.argmax(-1).tolist() == [0, 1]  # red, lime


@pytest.mark.parametrize(
    "template", ["{image} {text} {answer}", "{text}: {image}  {answer}.", "{image}{answer} "]
)
@pytest.mark.parametrize("words", [("▁red",), ()])
def test_idefics_prompts_meet_their_answers(template, words):
    processor = processor_of("idefics", chat=False, words=words)
    builder = PromptBuilder(processor, template)
    given = [Demonstration((RED, BLUE), "", "red"), Demonstration((RED,), " a ", " red b")]
    made, prompt = builder.answered(given, [[], SHOTS]), builder.prompt(given, [[], SHOTS])
    for row in range(2):
        whole = tokens(builder, made.inputs["input_ids"][row], made.inputs["attention_mask"][row])
        asked = tokens(builder, prompt["input_ids"][row], prompt["attention_mask"][row])
        answer = tokens(builder, made.inputs["input_ids"][row], made.labels[row] != -100)
        assert asked + answer == whole
        assert "".join(answer).replace("▁", " ").strip() == given[row].answer.strip() + "</s>"


def test_idefics_opens_no_addresses():
    builder = PromptBuilder(processor_of("idefics", chat=False), "{image}{text}{answer}")
    for given in (Demonstration((RED,), "http://a.b/c", "d"), Demonstration((RED,), "", "https://a.b/c.png")):
        with pytest.raises(ValueError, match="text 'https?://a.b/c.* is an address, which IdeficsProcessor"):
            builder.answered([given])
    builder.answered([Demonstration((RED,), "see http://a.b/c", "d")])


LLAVA = (  # 1.5
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}{%- set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] -%}{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
)
PIXTRAL = (  # its assistant's content is a string
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['content'] }}"
    "{% else %}<image>{% endif %}{% endfor %}[/INST]{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = QWEN_CHAT.replace(  # as Qwen3's, whose last answer alone begins with what it has thought
    "{{ part.text }}",
    "{% if turn.role == 'assistant' and turn is sameas messages[-1] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ part.text }}",
)

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# The prompt of one demonstration and the query, its head, and the answer's end.
CHATS = {
    "qwen": (
        "qwen2_vl", QWEN_CHAT,
        f"{SYSTEM}<|im_start|>user\n{VISION}what?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        f"<|im_start|>user\n{VISION}who?<|im_end|>\n<|im_start|>assistant\nme<|im_end|>",
        SYSTEM, "<|im_end|>",
    ),
    "smolvlm": (
        "idefics3", SMOLVLM_CHAT,
        "<|im_start|>User:<image>what?<end_of_utterance>\nAssistant: red<end_of_utterance>\n"
        "User:<image>who?<end_of_utterance>\nAssistant: me<end_of_utterance>",
        "<|im_start|>", "<end_of_utterance>",
    ),
    "llava": (
        "llava", LLAVA,
        "USER: <image>\nwhat? ASSISTANT: red USER: <image>\nwho? ASSISTANT: me</s>",
        "", "</s>",
    ),
    "gemma": (
        "gemma3", GEMMA,
        "<s><start_of_turn>user\n<start_of_image>what?<end_of_turn>\n<start_of_turn>model\nred<end_of_turn>\n"
        "<start_of_turn>user\n<start_of_image>who?<end_of_turn>\n<start_of_turn>model\nme<end_of_turn>",
        "<s>", "<end_of_turn>",
    ),
    "pixtral": (
        "llava", PIXTRAL,
        "<s>[INST]<image>what?[/INST] red</s>[INST]<image>who?[/INST] me</s>",
        "<s>", "</s>",
    ),
    "thinking": (
        "qwen2_vl", THINKING,
        f"{SYSTEM}<|im_start|>user\n{VISION}what?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        f"<|im_start|>user\n{VISION}who?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nme<|im_end|>",
        SYSTEM, "<|im_end|>",
    ),
}  # fmt: skip


def chat_builder(name, **options):
    family, template, *_ = CHATS[name]
    processor = processor_of(family, template=template)
    special = [
        x for x in ("<end_of_turn>", "<start_of_turn>", "<end_of_utterance>", "<|im_start|>") if x in template
    ]
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": special}, replace_extra_special_tokens=False
    )
    spy = Spy(processor)
    return PromptBuilder(processor, "chat", **options), spy


@pytest.mark.parametrize("name", CHATS)
def test_chats(name):
    builder, spy = chat_builder(name)
    _, _, expected, head, end = CHATS[name]
    made = builder.answered([QUERY], [SHOTS[:1]])
    assert spy.texts == [expected]
    row = made.inputs["input_ids"][0]
    answer = tokens(builder, row, made.labels[0] != -100)
    assert answer[-1] == end and "".join(answer[:-1]).strip("▁") == "me"
    begin = "".join(tokens(builder, row, made.head[0])).replace("▁", " ")
    bos = "" if head.startswith("<s>") else "<s>"  # one begin of text, whoever writes it
    for text in (head, begin):
        assert text.count("<s>") <= 1
    unknown = "".join(x if x in "abcdefghijklmnopqrstuvwxyz.\n " else "<unk>" for x in "Y")
    assert begin == bos + head.replace("Y", unknown)
    builder.prompt([QUERY], [SHOTS[:1]])
    assert spy.texts[1] == expected.removesuffix(end).removesuffix("me").rstrip(" ")


def test_the_system_s_turn_of_a_chat():
    builder, spy = chat_builder("qwen", instruction="be brief")
    made = builder.answered([QUERY], [[]])
    assert spy.texts[0].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<|vision")
    head = "".join(tokens(builder, made.inputs["input_ids"][0], made.head[0]))
    assert head == "<s><|im_start|>system\nbe▁brief<|im_end|>\n"
    assert builder.instructs_students
    # Gemma's is within the user's first turn, of which the rest is then all that other turns have, too.
    builder, spy = chat_builder("gemma", instruction="be brief")
    made = builder.answered([Demonstration((), "who?", "me")], [[]])
    assert spy.texts[0].startswith("<s><start_of_turn>user\nbe brief\n\nwho?<end_of_turn>")
    head = "".join(tokens(builder, made.inputs["input_ids"][0], made.head[0]))
    assert head == "<s><start_of_turn>user\nbe▁brief\n\n"


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_chats_with_images_where_the_text_has_them(name):
    builder, spy = chat_builder(name)
    image = VISION if name == "qwen" else "<start_of_image>"
    query = Demonstration((RED, BLUE), "is {image} or {image}?", " me ")
    builder.answered([query], [[Demonstration((GREEN, RED), "both", "red")]])
    assert f"user\n{image}{image}both<" in spy.texts[0]
    # Gemma's strips every part of a turn.
    inner = f"is {image} or {image}?" if name == "qwen" else f"is{image}or{image}?"
    assert f"user\n{inner}<" in spy.texts[0]
    assert ("\n me <|im_end|>" if name == "qwen" else "\nme<end_of_turn>") in spy.texts[0]


def test_texts_that_look_like_the_template():
    builder, spy = chat_builder("qwen")
    text = "assistant\nred\ue0000\ue001 {{ messages }}"
    made = builder.answered([Demonstration((RED,), text, "red")], [[Demonstration((), "red", text)]])
    assert spy.texts[0].count(text) == 2
    answer = tokens(builder, made.inputs["input_ids"][0], made.labels[0] != -100)
    assert answer == [*"red", "<|im_end|>"]


def test_captions_and_questions_without_images():
    builder, spy = chat_builder("qwen")
    builder.answered([Demonstration((RED,), "", "me")], [[Demonstration((), "hi", "red")]])
    assert spy.texts[0] == (
        f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        f"<|im_start|>user\n{VISION}<|im_end|>\n<|im_start|>assistant\nme<|im_end|>"
    )


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "LlavaProcessor has no chat template, expected one"),
        ("{{ raise_exception('never') }}", "cannot write turns of .*never"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "cannot write turns of"),
        # All images first, so that nobody could say which is whose.
        ("<image>" + LLAVA.replace("<image>\n", ""), "cannot write turns of .*image"),
        # Only the last turn.
        ("{% set messages = messages[-2:] %}" + LLAVA, None),
    ],
)
def test_chat_templates_that_are_refused(template, reason):
    processor = processor_of("llava", chat=False)
    processor.chat_template = template
    with pytest.raises(ValueError, match=reason or "it writes text"):
        PromptBuilder(processor, "chat").answered([QUERY], [SHOTS])
    with pytest.raises(ValueError, match="image_marker is '<image>', expected None with the template 'chat'"):
        PromptBuilder(processor_of("llava"), "chat", image_marker="<image>")


def test_images_that_a_chat_template_would_move():
    builder, _ = chat_builder("llava")
    builder.answered([Demonstration((RED,), "{image} a", "b")])
    with pytest.raises(ValueError, match="images elsewhere than where {image} stands in the text"):
        builder.answered([Demonstration((RED,), "a {image}", "b")])
    with pytest.raises(ValueError, match="{image} 1 times, expected never or once for each of its 2"):
        builder.answered([Demonstration((RED, RED), "a {image}", "b")])


def test_format_strings_one_after_the_other():
    builder, spy = spied("llava", "{image}{text} {answer}.\n", chat=True)
    builder.answered([QUERY], [SHOTS])
    assert spy.texts == ["<image>\nwhat? red.\n<image>\nwhere? a dog.\n<image>\nwho? me</s>"]
    builder = PromptBuilder(builder.processor, builder.template, instruction="look.\n")
    made = builder.answered([QUERY, SHOTS[0]], [SHOTS, []], padding_side="left")
    assert spy.texts[1:] == ["look.\n" + spy.texts[0], "look.\n<image>\nwhat? red</s>"]
    own = made.inputs["attention_mask"].bool()
    assert own[:, -1].all() and not own[1, 0]
    for row in range(2):
        assert tokens(builder, made.inputs["input_ids"][row], made.head[row]) == ["<s>", *"look.", "\n"]
    assert made.image.sum(-1).tolist() == [12, 4]
    builder.prompt([QUERY], [SHOTS])
    assert spy.texts[3] == "look.\n<image>\nwhat? red.\n<image>\nwhere? a dog.\n<image>\nwho?"


@pytest.mark.parametrize("slow", [False, True], ids=["offsets", "without_offsets"])
def test_heads(slow, monkeypatch):
    processor = processor_of("llava", chat=False)
    if slow:
        monkeypatch.setattr(type(processor.tokenizer), "is_fast", property(lambda self: False))
    builder = PromptBuilder(processor, instruction="look.\n")
    made = builder.answered([QUERY])
    assert tokens(builder, made.inputs["input_ids"][0], made.head[0]) == ["<s>", *"look.", "\n"]
    made = PromptBuilder(processor).answered([QUERY])
    assert tokens(builder, made.inputs["input_ids"][0], made.head[0]) == ["<s>"]


def test_the_begin_of_text_of_mllama():
    """Its processor would write a second one after the images that a prompt begins with."""
    builder = PromptBuilder(processor_of("mllama", chat=False))
    for shots in ([[]], [SHOTS]):
        ids = builder.answered([QUERY], shots).inputs["input_ids"][0]
        assert (ids == 1).nonzero().flatten().tolist() == [0]
        ids = builder.prompt([QUERY], shots)["input_ids"][0]
        assert (ids == 1).nonzero().flatten().tolist() == [0]


def test_paligemma_sees_images_before_all_text():
    builder = PromptBuilder(processor_of("paligemma", chat=False))
    with pytest.raises(ValueError, match="this model has images before all text"):
        builder.prompt([QUERY], [SHOTS])
    builder.prompt([QUERY], [[]])


def test_errors():
    builder = PromptBuilder(processor_of("llava"))
    with pytest.raises(ValueError, match="shots has 1 rows, expected 2, one for each query"):
        builder.answered([QUERY, QUERY], [SHOTS])
    with pytest.raises(ValueError, match="image 0 of demonstration 1 of query 0 cannot be decoded"):
        builder.answered([QUERY], [[SHOTS[0], Demonstration((b"x",), "a", "b")]])
    with pytest.raises(ValueError, match="image 0 of query 1 cannot be decoded"):
        builder.prompt([QUERY, Demonstration((b"x",), "a", "b")], [[], []])
    with pytest.raises(ValueError, match="text 'a <image>' has '<image>', expected no special token"):
        builder.answered([QUERY], [[Demonstration((RED,), "a <image>", "b")]])
    with pytest.raises(ValueError, match="answer is ' ', expected one with tokens"):
        builder.answered([Demonstration((RED,), "a", " ")], [SHOTS])
    with pytest.raises(TypeError, match="instruction is a int, expected a string"):
        PromptBuilder(processor_of("llava"), instruction=3)


def test_a_chat_for_a_bank():
    """Demonstrations alone are turns of their own, and what is fused is their text after the image."""
    builder, spy = chat_builder("qwen")
    inputs, fused = builder.demonstrations(SHOTS[:1])
    assert spy.texts == [
        f"{SYSTEM}<|im_start|>user\n{VISION}what?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    ]
    between = ["<|im_end|>", "\n", "<|im_start|>", *"assistant", "\n"]
    expected = [*"what?", *between, *"red", "<|im_end|>", "\n"]
    assert tokens(builder, inputs["input_ids"][0], fused[0]) == expected
    assert "You are a helpful" in builder.description and VISION * 2 in builder.description
    other, _ = chat_builder("qwen", instruction="be brief")
    assert other.description != builder.description
    answers = PromptBuilder(builder.processor, "chat", positions="answer")
    ended = PromptBuilder(builder.processor, "chat", positions="answer_end")
    for pointing, expected in ((answers, [*"red"]), (ended, [*"red", "<|im_end|>"])):
        inputs, fused = pointing.demonstrations(SHOTS[:1])
        assert tokens(builder, inputs["input_ids"][0], fused[0]) == expected
    assert torch.equal(answers.queries(SHOTS)[1], builder.answered(SHOTS).labels)


CHANGED = {
    "quotes": "{{ part['text'] | tojson }}",
    "capitals": "{{ part['text'] | upper }}",
    "some": "{{ part['text'][:2] }}",
    "length": "[{{ part['text'] | length }}]",
}


@pytest.mark.parametrize("how", CHANGED)
def test_chat_templates_that_change_texts_are_refused(how):
    """Stripping a text and writing around it is all that can be followed."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}TEXT{% endif %}{% endfor %}{% endfor %}"
    )
    processor = tiny_processor("llava")
    processor.chat_template = template.replace("TEXT", CHANGED[how])
    with pytest.raises(ValueError, match="the chat template of LlavaProcessor cannot write turns"):
        PromptBuilder(processor, "chat")
    processor.chat_template = template.replace("TEXT", "'{{ part['text'] | trim }}'")
    made = PromptBuilder(processor, "chat").prompt([Demonstration((RED,), " a b ", "red")])
    assert "'a" in processor.tokenizer.decode(made["input_ids"][0]).replace("<unk>", "'")


def test_texts_that_a_chat_template_answers_to_are_refused():
    """As those that leave out what an earlier turn thought."""
    processor = tiny_processor("llava")
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'].split('thought')[-1] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    builder = PromptBuilder(processor, "chat")
    builder.prompt([Demonstration((RED,), "a", "red")])
    refused = r"writes 'user:<image> bassistant:a' where 'user:<image>a thought bassistant:a' is expected"
    with pytest.raises(ValueError, match=refused):
        builder.prompt([Demonstration((RED,), "a thought b", "a")])
