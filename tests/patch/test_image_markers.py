"""Images in prompts as the model's own chat template has them: markers, numbers, places; or a refusal."""

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.data.prompts.image_markers import BARE, USUAL, image_markers
from mmicl_kernels.data.records import text_pieces
from mmicl_kernels.testing.tiny_processors import CHAT_TEMPLATES, QWEN
from tests.support.example_images import BLUE, GREEN, RED
from tests.support.example_processors import chosen, processor_of, rows

VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def turn(image, *, begin="user: ", text="{{ part['text'] }}"):
    """A chat template whose turns have their parts in order."""
    parts = "{% if part['type'] == 'image' %}" + image + "{% else %}" + text + "{% endif %}"
    return begin + "{% for part in messages[0]['content'] %}" + parts + "{% endfor %}</s>"


def written(processor, *pieces, text_first=False, marker=None):
    return image_markers(processor, processor.image_token, marker).write(pieces, text_first)


GEMMA = ["\n", "\n", "<start_of_image>", *["<image_soft_token>"] * 3, "<end_of_image>", "\n", "\n"]
FAKE = "<fake_token_around_image>"
# Red, lime and blue, as a prompt of each family has them; and what follows the last of them.
EXPECTED = {
    "gemma3": [GEMMA] * 3,
    "glm4v": [["<|begin_of_image|>", *["<|image|>"] * n, "<|end_of_image|>"] for n in (1, 2, 4)],
    "idefics3": [[FAKE, "<global-img>", *["<image>"] * 2, FAKE]] * 3,
    "internvl": [["<img>", *["<IMG_CONTEXT>"] * 2, "</img>", "\n"]] * 3,
    "llava": [[*["<image>"] * 4, "\n"]] * 3,
    "mllama": [["<|image|>"]] * 3,
    "qwen2_5_vl": [["<|vision_start|>", *["<|image_pad|>"] * n, "<|vision_end|>"] for n in (1, 2, 4)],
    "qwen2_vl": [["<|vision_start|>", *["<|image_pad|>"] * n, "<|vision_end|>"] for n in (1, 2, 4)],
}
INTERLEAVED = sorted(EXPECTED.keys() - {"llava"})
AFTER_IMAGES = {"mllama": ["<s>"]}  # its processor begins the text after the images that it begins with
BEGINNING = {"mllama": ["<s>", "<s>"]}  # and so in front of others


@pytest.mark.parametrize("name", EXPECTED)
def test_images_before_the_text(name):
    red, lime, blue = EXPECTED[name]
    builder = PromptBuilder(processor_of(name))
    given = [Demonstration((RED,), "a", "red"), Demonstration((BLUE, RED, GREEN), "b", "blue")]
    begun = AFTER_IMAGES.get(name, [])
    expected = [["<s>", *red, *begun, "a", "▁red"], ["<s>", *blue, *red, *lime, *begun, "b", "▁blue"]]
    closed = [x for x in red if x == "\n"][-2:]  # text, though the family's
    texts = [[*closed, "a", "▁red"], [*closed, "b", "▁blue"]]
    if name != "mllama":  # whose processor may want no image or at least one in each
        given.append(Demonstration((), "c", "blue"))
        expected.append(["<s>", "c", "▁blue"])
        texts.append(["c", "▁blue"])
    inputs, fused = builder.demonstrations(given)
    assert rows(builder, inputs) == expected and chosen(builder, inputs, fused) == texts
    prompts = rows(builder, builder.prompt(given))
    queries, labels = builder.queries(given)
    answers = chosen(builder, queries, labels != -100)
    assert answers == [["▁red", "</s>"], ["▁blue", "</s>"], ["▁blue", "</s>"]][: len(given)]
    assert [a + b for a, b in zip(prompts, answers, strict=True)] == rows(builder, queries)


@pytest.mark.parametrize("name", INTERLEAVED)
def test_images_where_the_text_has_them(name):
    red, lime, blue = EXPECTED[name]
    builder = PromptBuilder(processor_of(name), positions="answer")
    given = [
        Demonstration((BLUE, RED), "a{image}b{image}", "red"),
        Demonstration((GREEN,), "c{image} d", "blue"),
        Demonstration((RED, BLUE, GREEN), "{image}{image}e{image}f", "cat"),
    ]
    inputs, answers = builder.demonstrations(given)
    start = BEGINNING.get(name, ["<s>"])
    assert rows(builder, inputs) == [
        [*start, "a", *blue, "b", *red, "▁red"],
        [*start, "c", *lime, "▁d", "▁blue"],
        ["<s>", *red, *blue, *AFTER_IMAGES.get(name, []), "e", *lime, "f", "▁cat"],
    ]
    assert chosen(builder, inputs, answers) == [["▁red"], ["▁blue"], ["▁cat"]]


def seen(name, inputs):
    """The colours of the images of all rows, in order, from their pixels alone."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:  # patches of 2 frames, 14 x 14, three channels
        counts = inputs["image_grid_thw"].prod(-1).tolist()
        images = [x.reshape(len(x), 3, -1).mean((0, 2)) for x in pixels.split(counts)]
    else:
        images = pixels.reshape(-1, *pixels.shape[-3:]).flatten(2).mean(-1)
        images = [x for x in images if x.abs().sum() > 1e-3]  # some fill up with black ones
    return ["rgb"[int(x.argmax())] for x in images]


@pytest.mark.parametrize("name", EXPECTED)
def test_pixels_are_in_the_order_of_the_text(name):
    builder = PromptBuilder(processor_of(name))
    middle = "a{image}b{image}c" if name in INTERLEAVED else "{image}{image}c"
    given = [
        Demonstration((BLUE, GREEN), middle, "red"),
        Demonstration((RED,), "d", "blue"),
        Demonstration((GREEN, RED, BLUE), "e", "cat"),
    ]
    for inputs in (builder.demonstrations(given)[0], builder.queries(given)[0], builder.prompt(given)):
        assert seen(name, inputs) == list("bgrgrb")
    assert seen(name, builder.prompt(given[::-1])) == list("grbrbg")


def test_images_of_a_batch_without_images():
    builder = PromptBuilder(processor_of("qwen2_vl"))
    inputs, _ = builder.demonstrations([Demonstration((), "a", "b"), Demonstration((), "c", "d")])
    assert "pixel_values" not in inputs and rows(builder, inputs)[0] == ["<s>", "a", "▁b"]


def test_a_line_break_before_the_text_alone():
    """LLaVA-OneVision's template has it there, not after each image; one image has another size there."""
    builder = PromptBuilder(processor_of("llava_onevision"))
    given = [Demonstration((RED, RED), "a", "red"), Demonstration((RED,), "b", "cat")]
    inputs, _ = builder.demonstrations(given)
    two, one = rows(builder, inputs)
    assert two == ["<s>", *["<image>"] * 10, "\n", "a", "▁red"]  # 2 x 2 and the end of a line
    assert one == ["<s>", *["<image>"] * one.count("<image>"), "\n", "b", "▁cat"]


def test_the_format_string_may_have_the_template_s_own_turn():
    template = "USER: {image}\n{text} ASSISTANT: {answer}"
    builder = PromptBuilder(processor_of("llava"), template)
    alone = builder._alone(Demonstration((RED,), "what?", "")).before
    assert alone == "USER: <image>\nwhat? ASSISTANT: "  # one line break
    two = builder._alone(Demonstration((RED, RED), "what?", "")).before
    assert two == "USER: <image>\n<image>\nwhat? ASSISTANT: "
    qwen = PromptBuilder(processor_of("qwen2_vl"), "<|im_start|>user\n{image}{text}<|im_end|>\n{answer}")
    assert qwen._alone(Demonstration((RED,), "a", "")).before == f"<|im_start|>user\n{VISION}a<|im_end|>\n"


NUMBERED = "Picture {{ ns.n }}: " + VISION
COUNT = "{% set ns = namespace(n=0) %}"


def test_numbered_images():
    counted = COUNT + turn("{% set ns.n = ns.n + 1 %}" + NUMBERED)
    processor = processor_of("qwen2_vl", template=counted)
    first, second = (f"Picture {n}: {VISION}" for n in (1, 2))
    assert written(processor, "", "a") == f"{first}a"
    assert written(processor, "", "", "a") == f"{first}{second}a"
    assert written(processor, "a ", "b", "c", text_first=True) == f"a {first}b{second}c"
    many = written(processor, *[""] * 12, "a")
    assert many == "".join(f"Picture {n}: {VISION}" for n in range(1, 13)) + "a"
    builder = PromptBuilder(processor)
    assert repr(first + second) in builder.description
    builder.demonstrations([Demonstration((RED, BLUE), "a", "b"), Demonstration((RED,), "a", "b")])


def test_images_numbered_only_if_there_are_several():
    several = (
        COUNT
        + "{% set all = messages[0]['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
        + turn("{% set ns.n = ns.n + 1 %}{% if all > 1 %}Image {{ ns.n }}{% endif %}" + VISION)
    )
    processor = processor_of("qwen2_vl", template=several)
    assert written(processor, "", "a") == f"{VISION}a"
    assert written(processor, "", "", "a") == f"Image 1{VISION}Image 2{VISION}a"
    assert written(processor, "x", "a", "b", text_first=True) == f"xImage 1{VISION}aImage 2{VISION}b"


def test_what_separates_parts_is_kept():
    lined = turn(VISION, text="{{ '' if loop.first else '\n' }}{{ part['text'] }}")
    processor = processor_of("qwen2_vl", template=lined)
    assert written(processor, "", "", "a") == f"{VISION}{VISION}\na"
    assert written(processor, "a", "b", "c", text_first=True) == f"a{VISION}\nb{VISION}\nc"


def test_texts_under_another_key():
    processor = processor_of("qwen2_vl", template=turn(VISION, text="{{ part['content'] }}"))
    assert written(processor, "a", "b", text_first=True) == f"a{VISION}b"


def test_a_template_of_the_tokenizer():
    processor = processor_of("qwen2_vl", chat=False)
    processor.tokenizer.chat_template = CHAT_TEMPLATES["qwen2_vl"]
    assert written(processor, "", "a") == f"{VISION}a"


def test_named_templates():
    processor = processor_of("qwen2_vl")
    processor.chat_template = {"default": CHAT_TEMPLATES["qwen2_vl"], "tools": "x"}
    assert written(processor, "", "a") == f"{VISION}a"


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "it has no chat template"),
        ("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}", "refuses a turn"),
        ("{{ raise_exception('no images') }}", "no images"),
        ("{{ messages[0]['content'] }}", "0 of 1 images"),
        (turn(""), "0 of 1 images"),
        (turn("<|image_1|>"), "0 of 1 images"),
        (turn(VISION, text=""), "0 of 1 texts"),
        (turn("", text="{{ part['text'] }}") + VISION, "images after the text|2 images|1 of 2 images"),
        (
            "{% if messages[0]['content'][0]['type'] == 'image' %}look {% endif %}" + turn(VISION),
            "begins a turn",
        ),
    ],
)
def test_markers_that_are_not_known_are_refused(template, reason):
    processor = processor_of("qwen2_vl", chat=False)
    processor.chat_template = template
    with pytest.raises(ValueError) as caught:
        PromptBuilder(processor)
    text = str(caught.value)
    assert text.startswith("what Qwen2VLProcessor has around its image token '<|image_pad|>' is not known")
    assert text.endswith(f"Expected image_marker={VISION!r}")
    assert any(part in text for part in reason.split("|")), text


def test_a_subclass_is_its_family():
    processor = processor_of("qwen2_vl", chat=False)
    processor.__class__ = type("Mine", (type(processor),), {})
    with pytest.raises(ValueError, match="what Mine has around .*vision_start"):
        PromptBuilder(processor)
    processor = processor_of("llava", chat=False)
    processor.__class__ = type("Mine", (type(processor),), {})
    assert written(processor, "", "a") == "<image>a"


def test_an_unknown_family():
    processor = processor_of("llava", chat=False)
    processor.__class__ = type("Mine", (type(processor).__mro__[1],), dict(type(processor).__dict__))
    with pytest.raises(ValueError, match=r"image_marker='\.\.\.<image>\.\.\.', as the model was trained"):
        PromptBuilder(processor)
    assert written(processor, "", "a", marker="<image>") == "<image>a"


def test_no_family_is_both_bare_and_not():
    assert not BARE.keys() & USUAL.keys()


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "internvl", "llava", "mllama", "paligemma"])
def test_bare_tokens_need_no_chat_template(name):
    processor = processor_of(name, chat=False)
    token = processor.image_token
    assert written(processor, "", "", "a") == f"{token}{token}a"
    text_only = processor_of(name, chat=False, template="{{ '[INST]' + messages[0]['content'] }}")
    assert written(text_only, "", "", "a") == f"{token}{token}a"


def test_a_given_marker():
    builder = PromptBuilder(processor_of("qwen2_vl", chat=False), image_marker=VISION)
    own = PromptBuilder(processor_of("qwen2_vl"))
    given = [Demonstration((RED, BLUE), "{image}a{image}", "red"), Demonstration((GREEN,), "b", "blue")]
    for x, y in zip(builder.queries(given), own.queries(given), strict=True):
        pairs = zip(x.values(), y.values(), strict=True) if isinstance(x, dict) else [(x, y)]
        assert all(torch.equal(*pair) for pair in pairs)
    assert builder.description == own.description
    numbered = PromptBuilder(processor_of("llava"), image_marker="({number}) <image>\n")
    made = numbered._alone(Demonstration((RED, RED), "a {image} b{image}", "")).before
    assert made == "a (1) <image>\n b(2) <image>\n "


@pytest.mark.parametrize("marker", ["", "<|vision_start|>", VISION * 2, "<image>"])
def test_markers_that_are_refused(marker):
    with pytest.raises(ValueError, match="image_marker is .*expected the image token .* exactly once"):
        PromptBuilder(processor_of("qwen2_vl"), image_marker=marker)
    with pytest.raises(TypeError, match="image_marker is a int, expected a string"):
        PromptBuilder(processor_of("qwen2_vl"), image_marker=3)


def test_places_that_a_model_does_not_have():
    builder = PromptBuilder(processor_of("llava"))
    for text in ("a{image}", "{image}a{image}"):
        images = (RED,) * text.count("{image}")
        with pytest.raises(ValueError, match=r"chat template of LlavaProcessor .* image_marker='<image>\\n'"):
            builder.check(Demonstration(images, text, "b"))
    with pytest.raises(ValueError, match="template is '{text}{image}{answer}': the chat template"):
        PromptBuilder(processor_of("llava"), "{text}{image}{answer}")
    anywhere = PromptBuilder(processor_of("llava"), "{text}{image}{answer}", image_marker="<image>")
    assert anywhere._alone(Demonstration((RED,), "a", "")).before == "a<image>"
    with pytest.raises(ValueError, match="template is .*: this model has images before all text"):
        PromptBuilder(processor_of("paligemma", chat=False), "a {image}{text}{answer}")
    with pytest.raises(ValueError, match="this model has images before all text"):
        PromptBuilder(processor_of("paligemma", chat=False)).check(Demonstration((RED,), "a {image}", "b"))


@pytest.mark.parametrize(
    "template",
    ["<|vision_start|>{image}<|vision_end|>{text} {answer}", "{image}<|vision_end|>{text}{answer}"],
)
def test_markers_are_not_written_twice(template):
    with pytest.raises(
        ValueError, match=r"expected it without the '<\|vision_.*' that {image} has by itself"
    ):
        PromptBuilder(processor_of("qwen2_vl"), template)


def test_text_pieces():
    assert text_pieces("a{image}b{image}") == ["a", "b", ""]
    assert text_pieces("{text} {x} {{image}} {{{image}}}") == ["{text} {x} {image} {{image}}"]
    assert text_pieces("") == [""]


@pytest.mark.parametrize("text, images", [("{image}", 0), ("{image}", 2), ("a{image}{image}", 1)])
def test_as_many_places_as_images(text, images):
    builder = PromptBuilder(processor_of("qwen2_vl"))
    with pytest.raises(ValueError, match=f"text .* has {{image}} {text.count('{')} times, expected never or"):
        builder.demonstrations([Demonstration((RED,) * images, text, "a")])
    written = builder._alone(Demonstration((RED,) * images, text.replace("{image}", "{{image}}"), "a")).before
    assert written == VISION * images + text + " "


def test_places_need_a_template_with_text():
    builder = PromptBuilder(processor_of("qwen2_vl"), "{image}{answer}")
    with pytest.raises(ValueError, match="in a template with {text}"):
        builder.check(Demonstration((RED,), "a{image}", "b"))


def test_answers_keep_their_braces():
    builder = PromptBuilder(processor_of("llava", chat=False))
    builder.processor.tokenizer.add_tokens(["{image}"])
    inputs, labels = builder.queries([Demonstration((RED,), "a", "{image}")])
    assert chosen(builder, inputs, labels != -100)[0][-2:] == ["{image}", "</s>"]
    assert rows(builder, inputs)[0].count("<image>") == 4


def test_descriptions_differ_where_prompts_do():
    bare = PromptBuilder(processor_of("llava", chat=False)).description
    assert bare == "LlavaProcessor, '{image}{text} {answer}', fused: text"
    chat = PromptBuilder(processor_of("llava")).description
    given = PromptBuilder(processor_of("llava"), image_marker="<image>").description
    other = PromptBuilder(processor_of("llava"), image_marker="<image> ").description
    assert given == bare and len({bare, chat, other}) == 3 and "<image>\\n" in chat
    assert VISION in PromptBuilder(processor_of("qwen2_vl")).description


@pytest.mark.parametrize("slow", [False, True], ids=["offsets", "without_offsets"])
@pytest.mark.parametrize("scheme", ["never", "first", "always"])
@pytest.mark.parametrize("strips", [(), ("lstrip",), ("rstrip",), ("lstrip", "rstrip")], ids="+".join)
def test_answers_beside_tokens_that_take_white_space(strips, scheme, slow, monkeypatch):
    """SentencePiece-like: an image token, or the end of text, may swallow the spaces beside it."""
    processor = processor_of("llava", chat=False)
    tokenizer = processor.tokenizer
    flags = dict.fromkeys(strips, True)
    special = [AddedToken(x, special=True, normalized=False, **flags) for x in ("<image>", "</s>")]
    tokenizer.add_special_tokens({"additional_special_tokens": special[:1], "eos_token": special[1]})
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if slow:
        monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    given = [
        Demonstration((RED,), "a", "red"),
        Demonstration((RED, BLUE), "b c ", "  dog x"),
        Demonstration((), "d", "cat"),
    ]
    for template in (
        "{image}{answer}",
        "{image} {text} {answer}",
        "{text} {image}  {answer}",
        "{text}{image} {answer}",
    ):
        builder = PromptBuilder(processor, template)
        inputs, labels = builder.queries(given)
        answers = chosen(builder, inputs, labels != -100)
        for answer, x in zip(answers, given, strict=True):
            assert answer[-1] == "</s>" and "<image>" not in answer
            assert "".join(answer[:-1]).replace("▁", " ").strip() == x.answer.strip()
        prompts = rows(builder, builder.prompt(given))
        assert [a + b for a, b in zip(prompts, answers, strict=True)] == rows(builder, inputs)
        fused = PromptBuilder(processor, template, positions="answer")
        found = chosen(fused, *fused.demonstrations(given))
        assert ["".join(x).replace("▁", " ").strip() for x in found] == [x.answer.strip() for x in given]


QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level_tokenizer():
    """Trained on the spot, with Qwen's division into words and its special tokens; none begins a text."""
    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["what is it? a red dog.\n a cat\n\n the  dog Answer: 3 12"] * 3, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "additional_special_tokens": list(QWEN)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    "template",
    [
        "{image} {text}{answer}",
        "{image}{text} {answer}",
        "{image}{text}\n {answer}.\n",
        "{image}{text}Answer:{answer}",
        "<|im_start|>user\n{image}{text}  {answer}<|im_end|>\n",
    ],
)
def test_answers_of_a_byte_level_tokenizer(template):
    processor = processor_of("qwen2_vl")
    processor.tokenizer = byte_level_tokenizer()
    processor.image_token_id, processor.video_token_id = (
        processor.tokenizer.convert_tokens_to_ids(x) for x in ("<|image_pad|>", "<|video_pad|>")
    )
    given = [
        Demonstration((RED,), "what is it?", "red"),
        Demonstration((RED, BLUE), "a {image} b {image}", " dog 12"),
        Demonstration((), "the", "3"),
        Demonstration((GREEN,), "x \n y", "\n\ncat é  "),
    ]
    builder = PromptBuilder(processor, template)
    inputs, labels = builder.queries(given)
    answers = chosen(builder, inputs, labels != -100)
    prompts = rows(builder, builder.prompt(given))
    assert [a + b for a, b in zip(prompts, answers, strict=True)] == rows(builder, inputs)
    for row, x in zip(labels, given, strict=True):
        answer, end = processor.tokenizer.decode(row[row != -100]).split("<|im_end|>")
        assert (answer.strip(), end) == (x.answer.strip(), "")


def test_unknown_characters_are_text():
    builder = PromptBuilder(processor_of("llava", chat=False), "{image}{text} {answer}")
    inputs, fused = builder.demonstrations([Demonstration((RED,), "éa", "é")])
    assert chosen(builder, inputs, fused) == [["<unk>", "a", "▁", "<unk>"]]
    answers = PromptBuilder(builder.processor, positions="answer")
    assert chosen(answers, *answers.demonstrations([Demonstration((RED,), "a", "é")])) == [["<unk>"]]


def test_special_tokens_of_the_vocabulary_alone_are_not_text():
    processor = processor_of("llava", chat=False)
    processor.tokenizer.add_tokens([AddedToken("<|patch|>", special=True)], special_tokens=True)
    assert "<|patch|>" not in processor.tokenizer.all_special_tokens
    with pytest.raises(ValueError, match=r"text 'a <\|patch\|>' has '<\|patch\|>', expected no"):
        PromptBuilder(processor).check(Demonstration((RED,), "a <|patch|>", "b"))


@pytest.mark.parametrize("known", [True, False])
def test_image_tokens_that_others_replace(known):
    """If they are not known, the text after the last image would be all of the prompt."""
    processor = processor_of("llava", chat=False)

    class Other(type(processor)):
        image_token_ids = (7,) if known else ()

        def __call__(self, images, text, **options):
            made = super().__call__(images=images, text=text, **options)
            made["input_ids"][made["input_ids"] == self.image_token_id] = 7
            return made

    processor.__class__ = Other
    given = [Demonstration((RED,), "a", "red")]
    builder = PromptBuilder(processor)
    if known:
        assert chosen(builder, *builder.demonstrations(given)) == [["a", "▁red"]]
    else:
        with pytest.raises(ValueError, match="prompt 0 has no image tokens"):
            builder.demonstrations(given)
