"""Prompts of demonstrations: which tokens they have, where their answers are, which image is whose."""

import re
from functools import partial
from itertools import product

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import TEMPLATE, PromptBuilder, builder_of
from mmicl_kernels.testing.tiny_models import IMAGE_ID, tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.support.example_images import png
from tests.support.example_processors import chosen, processor_of, rows, tokens

PROCESSORS = ["llava", "idefics3"]
FAKE = "<fake_token_around_image>"
MARK = {"llava": ["<image>"] * 4, "idefics3": [FAKE, "<global-img>", *["<image>"] * 2, FAKE]}
processor_of = partial(processor_of, chat=False)


RED, BLUE = png("red", (9, 7)), png("blue", (9, 7))
DEMONSTRATIONS = [
    Demonstration((RED,), "what?", "red"),
    Demonstration((RED, BLUE), "which is {it}?", "dog or cat"),
    Demonstration((), "hi", "a  z"),
]


@pytest.mark.parametrize("name", PROCESSORS)
def test_demonstrations(name):
    builder = PromptBuilder(processor_of(name), "{image}{text} {answer}.\n")
    inputs, positions = builder.demonstrations(DEMONSTRATIONS)
    text = chosen(builder, inputs, positions)
    assert text[0] == [*"what?", "▁red", ".", "\n"]  # neither an image's tokens nor those that close it
    assert text[1][-2:] == [".", "\n"] and not set(text[1]) & {"<s>", *MARK[name]}
    mark, found = MARK[name], rows(builder, inputs)
    assert found[0] == ["<s>", *mark, *"what?", "▁red", ".", "\n"]
    assert found[1][: 1 + 2 * len(mark)] == ["<s>", *mark, *mark]
    assert found[1][-8:] == ["▁do", "g", "▁", "o", "r", "▁cat", ".", "\n"]
    assert found[2] == ["<s>", *"hi", "▁", "a", "▁", "▁", "z", ".", "\n"]
    padding = ~inputs["attention_mask"].bool()
    assert padding[:, 0].sum() == 0 and padding[2, -1]  # on the right
    assert set(tokens(builder, inputs["input_ids"], padding)) == {"<pad>"}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_in_order(name):
    inputs, _ = PromptBuilder(processor_of(name)).demonstrations(DEMONSTRATIONS)
    pixels = inputs["pixel_values"].flatten(0, -4).mean((-1, -2))
    pixels = pixels[pixels.abs().sum(-1) > 0]  # Idefics3 fills up with black ones
    assert [("red", "blue")[int(x[2] > x[0])] for x in pixels] == ["red", "red", "blue"]


@pytest.mark.parametrize("slow", [False, True], ids=["offsets", "without_offsets"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_answers_tokens(name, slow, monkeypatch):
    processor = processor_of(name)
    if slow:
        monkeypatch.setattr(type(processor.tokenizer), "is_fast", property(lambda self: False))
    for after, end in (("", None), (".\n", "."), (" red", "▁red")):
        builder = PromptBuilder(processor, "{text}: {image} {answer}" + after, positions="answer")
        inputs, positions = builder.demonstrations(DEMONSTRATIONS)
        assert positions.dtype == torch.bool
        found = chosen(builder, inputs, positions)
        assert found[:2] == [["▁red"], ["▁do", "g", "▁", "o", "r", "▁cat"]]
        assert found[2] in (["a", "▁", "▁", "z"], ["▁", "a", "▁", "▁", "z"])
        if end is not None:
            ended = builder_of(builder, positions="answer_end")
            assert chosen(ended, *ended.demonstrations(DEMONSTRATIONS)) == [[*x, end] for x in found]


def test_a_token_that_the_answer_shares_is_the_answers():
    processor = tiny_processor("llava", words=("▁red", "bed", "d."))
    builder = PromptBuilder(processor, "{image}{text}{answer}.", positions="answer")
    given = [Demonstration((RED,), *texts) for texts in (("a b", "ed"), ("a", "red"), ("a", "2d"))]
    found = chosen(builder, *builder.demonstrations(given))
    assert found == [["bed"], ["r", "e", "d."], ["2", "d."]]
    ended = PromptBuilder(processor, "{image}{text}{answer}.\n", positions="answer_end")
    found = chosen(ended, *ended.demonstrations(given))
    assert found == [["bed", "."], ["r", "e", "d.", "\n"], ["2", "d.", "\n"]]


def test_an_answer_that_no_token_follows():
    """Known when the template is given, unless it depends on the answer."""
    processor = tiny_processor("llava", words=("d.",))
    message = f"positions is 'answer_end' and template is {TEMPLATE!r}, expected one with a token of its own"
    for make in (PromptBuilder, builder_of):
        with pytest.raises(ValueError, match=f"{message} after the answer 'answer'"):
            make(processor, positions="answer_end")
    builder = PromptBuilder(processor, "{image}{text} {answer}.", positions="answer_end")
    shared = Demonstration((RED,), "a", "2d")
    for work in (builder.check, lambda x: builder.demonstrations([x])):
        with pytest.raises(ValueError, match="a token of its own after the answer '2d'"):
            work(shared)
    builder_of(builder, positions="answer").check(shared)


def test_an_answer_begins_with_a_token_of_its_own():
    """Else nothing that ``generate`` says after the prompt is what was learnt."""
    processor = tiny_processor("llava", words=("▁red", "bed", ":d", "o▁"))
    builder = PromptBuilder(processor, "{image}{text}:{answer}")
    given = [Demonstration((RED,), "a", "do"), Demonstration((RED,), "a", "ed")]
    with pytest.raises(
        ValueError, match="answer 'do' begins within a token, after .*a:': expected a template"
    ):
        builder.queries(given)
    builder.queries(given[1:])
    builder.demonstrations(given)
    builder.prompt(given)
    PromptBuilder(processor, "{image}{text}: {answer}").queries(given)
    builder.check(given[0])
    with pytest.raises(ValueError, match="begins within a token"):
        builder.check(given[0], answered=True)
    with pytest.raises(ValueError, match="answer 'ed' begins within a token, after .*b'"):
        PromptBuilder(processor, "{image}{text}{answer}").check(Demonstration((), "b", "ed"), answered=True)
    # A space that a word's token includes is the answer's, and no prompt ends with it.
    PromptBuilder(processor, "{image}{text}: {answer}").check(Demonstration((), "", "red"), answered=True)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("words", [("▁red", "▁cat", "▁do"), ()], ids=["words", "characters"])
def test_queries_and_prompts_meet(name, words):
    """A prompt is what precedes a query's labels, and these are the answer and the end of text."""
    builder = PromptBuilder(processor_of(name, words=words), "{image}{text} {answer}.\n")
    inputs, labels = builder.queries(DEMONSTRATIONS)
    prompts = rows(builder, builder.prompt(DEMONSTRATIONS))
    space = [] if words else ["▁"]
    mark = MARK[name]
    assert prompts[0] == ["<s>", *mark, *"what?", *space]
    assert prompts[2] == ["<s>", *"hi", *space]
    labelled = chosen(builder, inputs, labels != -100)
    assert labelled[0] == (["▁red", "</s>"] if words else ["r", "e", "d", "</s>"])
    assert labelled[2] == [*([] if space else ["▁"]), "a", "▁", "▁", "z", "</s>"]
    for prompt, answer, whole in zip(prompts, labelled, rows(builder, inputs), strict=True):
        assert prompt + answer == whole
    known = labels != -100
    assert torch.equal(labels[known], inputs["input_ids"][known])


@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_are_padded_on_the_left(name):
    builder = PromptBuilder(processor_of(name))
    inputs = builder.prompt(DEMONSTRATIONS)
    own = inputs["attention_mask"].bool()
    assert own[:, -1].all() and not own[2, 0]
    assert own.diff(dim=1).sum(1).tolist() == [1, 0, 1]


def test_the_end_of_a_text_is_written_once():
    from tokenizers import processors

    processor = tiny_processor("llava")
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    processor.tokenizer.backend_tokenizer.post_processor = ends
    builder = PromptBuilder(processor, positions="answer")
    inputs, labels = builder.queries(DEMONSTRATIONS)
    assert chosen(builder, inputs, labels != -100)[0] == ["▁red", "</s>"]
    assert (inputs["input_ids"] == 2).sum(1).tolist() == [1, 1, 1]
    assert chosen(builder, *builder.demonstrations(DEMONSTRATIONS))[0] == ["▁red"]
    ended = builder_of(builder, positions="answer_end")
    assert chosen(ended, *ended.demonstrations(DEMONSTRATIONS))[0] == ["▁red", "</s>"]


def test_without_an_end_of_text():
    processor = tiny_processor("llava")
    processor.tokenizer.eos_token = None
    builder = PromptBuilder(processor)
    inputs, labels = builder.queries(DEMONSTRATIONS[:1])
    assert chosen(builder, inputs, labels != -100) == [["▁red"]]


def test_dtype_of_the_pixels():
    inputs = PromptBuilder(tiny_processor("llava"), dtype=torch.bfloat16).prompt(DEMONSTRATIONS)
    assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    "template",
    ["", "{text} {answer}", "{image} {text}", "{answer}{image}", "{image}{answer}{text}",
     "{image}{image}{answer}", "{image}{answer!r}", "{image:>9}{answer}", "{image}{answer}{",
     "{image}{answer}{other}", "{image}{text.x}{answer}", "{}{image}{answer}"],
)  # fmt: skip
def test_templates_that_are_refused(template):
    with pytest.raises(ValueError, match="template is .*expected {image}, {text} and, last, {answer}"):
        PromptBuilder(tiny_processor("llava"), template)


def test_braces_of_a_template_and_of_a_text_stay():
    builder = PromptBuilder(tiny_processor("llava", words=()), "{{a}}{image}{text}:{answer}{{}}")
    builder.processor.tokenizer.add_tokens(["{", "}"])
    inputs, _ = builder.demonstrations([Demonstration((), "{text}", "{x}")])
    assert "".join(rows(builder, inputs)[0][1:]) == "{a}{text}:{x}{}"


def test_errors():
    processor = tiny_processor("llava")
    builder = PromptBuilder(processor)
    with pytest.raises(TypeError, match="expected one with an image_token"):
        PromptBuilder(processor.tokenizer)
    for make in (builder.demonstrations, builder.queries, builder.prompt):
        with pytest.raises(ValueError, match="demonstrations is empty"):
            make([])
        with pytest.raises(TypeError, match="has a str, expected Demonstration"):
            make(["a"])
        with pytest.raises(ValueError, match="image 1 of demonstration 1 cannot be decoded"):
            make([DEMONSTRATIONS[0], Demonstration((RED, RED[:40]), "a", "b")])
        for special in ("<image>", "</s>"):
            with pytest.raises(ValueError, match=f"text 'a {special}' has '{special}', expected no special"):
                make([Demonstration((RED,), f"a {special}", "b")])
            with pytest.raises(ValueError, match=f"answer 'a{special}b' has"):
                make([Demonstration((RED,), "a", f"a{special}b")])
    empty = [Demonstration((RED,), "a", " ")]
    with pytest.raises(ValueError, match="answer is ' ', expected one with tokens"):
        builder.queries(empty)
    with pytest.raises(ValueError, match="answer is ' '"):
        PromptBuilder(processor, positions="answer").demonstrations(empty)
    assert rows(builder, builder.prompt(empty)) == [["<s>", *["<image>"] * 4, "a"]]
    for make, wrong in product((PromptBuilder, builder_of), ("answers", True, None)):
        expected = re.escape("expected one of ('text', 'answer', 'answer_end')")
        with pytest.raises(ValueError, match=f"positions is {wrong!r}, {expected}"):
            make(processor, positions=wrong)


def test_a_processor_that_rewrites_the_answer_is_noticed():
    processor = tiny_processor("llava")

    class Shouting(type(processor)):
        def __call__(self, images, text, **options):
            return super().__call__(images=images, text=[x.replace("dog", "cow") for x in text], **options)

    processor.__class__ = Shouting
    with pytest.raises(ValueError, match="its answer cannot be found"):
        PromptBuilder(processor).queries([Demonstration((RED,), "a", "dog")])


@pytest.mark.parametrize("positions", ["text", "answer", "answer_end"])
def test_into_a_bank_and_out_again(positions, tmp_path):
    """What a handle fuses are the projected states of the tokens the builder means."""
    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.AIMConfig(positions=positions))
    builder = PromptBuilder(tiny_processor("llava"), "{image}{text} {answer}.", positions=positions)
    bank = mk.DemonstrationBank.create(tmp_path, adapter, torch.float32)
    with mk.attach(model, adapter, bank=bank) as handle:
        ids = handle.add_demonstrations(DEMONSTRATIONS, builder.demonstrations, batch_size=2, progress=False)
        assert ids == [0, 1, 2]
        again = handle.add_demonstrations(DEMONSTRATIONS[::-1], builder.demonstrations, progress=False)
        assert again == [2, 1, 0]
        inputs = builder.prompt(DEMONSTRATIONS[:2])
        plain = model(**inputs).logits
        spliced = model(**handle.splice(inputs, [[2, 0], [1]])).logits
        assert not torch.allclose(spliced[:, -1], plain[:, -1])
    inputs, _ = builder.demonstrations(DEMONSTRATIONS[:1])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    first = int((inputs["input_ids"][0] == IMAGE_ID).nonzero()[-1]) + 1
    states = {"text": states[first:], "answer": states[-2:-1], "answer_end": states[-2:]}[positions]
    expected = torch.nn.functional.linear(states, adapter.fuser.weight, adapter.fuser.bias)
    torch.testing.assert_close(bank.tokens(0), expected)


def test_builder_of():
    """A processor's own chat template, or the plain one; a builder is kept as it is, and not changed."""
    chatting, silent = tiny_processor("llava", chat=True), tiny_processor("llava")
    assert builder_of(chatting).settings == {"template": "chat", "instruction": None, "image_marker": None}
    assert builder_of(silent).template == TEMPLATE
    builder = PromptBuilder(silent, "{image}{text}: {answer}", instruction="Short.")
    made = builder_of(builder, positions="answer", dtype=torch.bfloat16)
    assert (made.settings, made.positions, made.dtype) == (builder.settings, "answer", torch.bfloat16)
    assert (builder.positions, builder.dtype) == ("text", None)
    again = PromptBuilder(silent, **builder.settings)
    assert again.description == builder.description and again.settings == builder.settings
    with pytest.raises(TypeError, match="processor is a str, expected one with an image_token"):
        builder_of("llava")


@pytest.mark.parametrize("positions", ["text", "answer", "answer_end"])
def test_description(positions):
    """Stored banks have it, so it may not change."""
    builder = PromptBuilder(tiny_processor("llava"), "{image}{text} {answer}.", positions=positions)
    assert builder.description == f"LlavaProcessor, '{{image}}{{text}} {{answer}}.', fused: {positions}"
