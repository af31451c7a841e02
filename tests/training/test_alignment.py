"""The query in both prompts: every processor, template, number of shots and side of the padding."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers, processors

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.data.prompts.presets import PRESETS
from mmicl_kernels.methods.teaching import student_rows, teacher_rows
from mmicl_kernels.testing.tiny_processors import CHAT_TEMPLATES, MAKERS, tiny_processor
from mmicl_kernels.training import EpisodeBatch, ManyShotBatch, align, episode_batch
from tests.support.example_images import BLUE, GREEN, RED
from tests.support.example_processors import REAL, processor_of, tokens
from tests.training.example_questions import PLAIN, QUERIES, SHOTS

TWO = QUERIES[:2]
# Quick: one of the official templates for each processor.
OFFICIAL = {
    "idefics": "mimic-idefics",
    "idefics2": "mimic-idefics2",
    "llava": "mimic-llava",
    "real-qwen2_5_vl": "mimic-llava",
}

# What cannot be: processors, templates, queries, their demonstrations, what is said. None is any of them.
NO_CHAT = "has no chat template, expected one"
REFUSED = [
    (("idefics", "paligemma"), ["chat"], QUERIES[:1], [[]], NO_CHAT),
    # Its images are before all text, and a line's end behind it.
    (("paligemma",), [PLAIN, *PRESETS], QUERIES[:2], [[], []], "PaliGemmaProcessor writes another end"),
    (("paligemma",), [PLAIN, *PRESETS], QUERIES[2:], [[]], "`images` are expected"),
    # It has other tokens of an image alone than of several.
    (
        ("llava_onevision",),
        ["chat", PLAIN, *PRESETS],
        QUERIES[:1],
        [SHOTS[:1]],
        "only the last .* other tokens of an image among several",
    ),
    # ":red" is one token: an answer would never begin with it after a prompt that ends with ":".
    (
        ("real-qwen2_5_vl",),
        ["live"],
        QUERIES[1:2],
        [[]],
        "answer 'red blue' begins within a token, after .*Short answer:",
    ),
    # Their token of padding, which is not attended to, is in the template.
    (
        ("real-smolvlm", "real-smolvlm-whole"),
        ["mimic-llava", "mimic-llava-caption"],
        QUERIES[:1],
        [SHOTS[:1]],
        "neither its end of text nor in the template",
    ),
]
NEVER = {
    (name, template)
    for names, templates, queries, _, _ in REFUSED
    for name, template in product(names, templates)
    if name != "llava_onevision"
}
EVERY = [
    (name, template)
    for name, template in product([*sorted(MAKERS), *REAL], ["chat", PLAIN, *PRESETS])
    if (name, template) not in NEVER
]
MATRIX = [
    pytest.param(name, template, marks=() if template in quick else pytest.mark.slow)
    for name, template in EVERY
    for quick in [("chat", PLAIN, OFFICIAL.get(name, "live"))]
]


def queries_for(name, shots):
    """Without those that ``REFUSED`` has, and that older transformers do."""
    if name == "llava_onevision" and shots:
        return QUERIES[1:]
    if name == "mllama" and transformers.__version__.startswith("5.17."):
        return QUERIES[:2]  # there either all prompts of a batch have images or none
    return QUERIES


@cache
def shared(name, **options):
    """A processor, which no test changes."""
    return processor_of(name, chat=name in CHAT_TEMPLATES, **options)


@cache
def builder_of(name, template, **options):
    return PromptBuilder(shared(name, **options), template)


def text_of(builder, ids):
    return builder.processor.tokenizer.decode(ids)


def head_of(name, template):
    """What stands before the first turn, as a text; of tiny chats no more than how it begins."""
    if template == "chat" and name in REAL:
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        return system if "qwen" in name else "<|im_start|>"
    return "" if name in REAL else "<s>"


def image_tokens(name, query):
    """How many a query has, where an image's are not changed by others: of all real processors."""
    sizes = {"real-smolvlm": (20, 12, 20), "real-smolvlm-whole": (4, 4, 4), "real-qwen2_5_vl": (1, 2, 4)}
    return sum(sizes[name][(RED, GREEN, BLUE).index(image)] for image in query.images)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shots", [0, 1, 3])
@pytest.mark.parametrize("name, template", MATRIX)
def test_the_query_is_the_same(name, template, shots, side):
    """All of its images and its answer, never what the prompt begins with."""
    builder = builder_of(name, template)
    queries = queries_for(name, shots)
    rows = [[SHOTS[(i + j) % 3] for j in range(shots)] for i in range(len(queries))]
    batch = episode_batch(builder, queries, rows, padding_side=side)
    assert type(batch) is EpisodeBatch
    student = builder.answered(queries, [[]] * len(queries), instructed=builder.instructs_students)
    teacher = builder.answered(queries, rows)
    assert int(batch.teacher["attention_mask"].sum()) == int(teacher.inputs["attention_mask"].sum())
    ends = {builder.processor.tokenizer.eos_token, "<end_of_utterance>"}
    for i, query in enumerate(queries):
        mine = batch.student["input_ids"][i][batch.student_query[i]]
        theirs = batch.teacher["input_ids"][i][batch.teacher_query[i]]
        assert torch.equal(mine, theirs)
        ids, own = student.inputs["input_ids"][i], student.inputs["attention_mask"][i].bool()
        head = ids[student.head[i]]
        assert torch.equal(torch.cat([head, mine]), ids[own])
        begin = head_of(name, template)
        assert text_of(builder, head).startswith(begin) and not (begin and begin in text_of(builder, mine))
        assert name not in REAL or text_of(builder, head) == begin
        image = ids[student.image[i]]
        assert torch.equal(mine[torch.isin(mine, image)], image)
        assert len(image) == image_tokens(name, query) if name in REAL else len(image) >= len(query.images)
        answer = batch.labels[i][batch.labels[i] >= 0]
        assert torch.equal(mine[-len(answer) :], answer)
        last = tokens(builder, answer, torch.ones_like(answer))[-1]
        assert last in ends and text_of(builder, answer[:-1]).strip(" \n.") == query.answer
        # The demonstrations of the row are before the query, and nothing is after it.
        whole = batch.teacher["input_ids"][i][batch.teacher["attention_mask"][i].bool()]
        assert torch.equal(whole[-len(theirs) :], theirs)
        shown = text_of(builder, whole[: -len(theirs)])
        assert all(x.answer in shown for x in rows[i])
        assert not any(x.answer in shown for x in SHOTS if x not in rows[i])
    for inputs in (batch.student, batch.teacher):
        attended = inputs["attention_mask"].bool()
        assert attended[:, 0 if side == "right" else -1].all()
        assert len(queries) == 2 or not attended.all()


@pytest.mark.parametrize("names, templates, queries, rows, message", REFUSED)
def test_what_is_refused(names, templates, queries, rows, message):
    for name, template in product(names, templates):
        with pytest.raises(ValueError, match=message):
            episode_batch(builder_of(name, template), queries, rows)


def test_every_combination_is_made_or_refused():
    assert len(EVERY) + len(NEVER) == (len(MAKERS) + len(REAL)) * (2 + len(PRESETS))


def marked(name, template, query, shots, **options):
    """The student's query, what precedes it, and what precedes it in the teacher's prompt."""
    builder = builder_of(name, template, **options)
    batch = episode_batch(builder, [query], [shots])
    parts = []
    for inputs, mask in ((batch.student, batch.student_query), (batch.teacher, batch.teacher_query)):
        query_mask = mask[0]
        parts += ["".join(tokens(builder, inputs["input_ids"][0], x)) for x in (query_mask, ~query_mask)]
    assert parts[0] == parts[2]
    return parts[0], parts[1], parts[3]


def test_by_hand():
    """Token strings of four families, written by hand."""
    shot, query = Demonstration((RED,), "a", "red"), Demonstration((GREEN,), "b", "cat")
    image = "<image>" * 4
    assert marked("llava", PLAIN, query, [shot]) == (
        f"{image}\nb▁cat</s>",
        "<s>",
        f"<s>{image}\na▁red\n",
    )
    assert marked("qwen2_vl", "chat", query, [shot]) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>b</s>"
        "<|im_start|>user\ncat</s>",
        "<s><|im_start|>system\nhi<|im_end|>\n<s>",
        "<s><|im_start|>system\nhi<|im_end|>\n<s><|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>a</s><|im_start|>user\nred</s>",
    )
    mark = "<fake_token_around_image><global-img><image><image><fake_token_around_image>"
    assert marked("idefics3", "chat", query, [shot]) == (
        f"<unk>ser:{mark}b</s><unk>ser:▁cat</s>",
        "<s>",
        f"<s><unk>ser:{mark}a</s><unk>ser:▁red</s>",
    )
    fake = "<fake_token_around_image>"
    head = "<unk>nstruction:▁<unk>rovide▁an▁answer▁to▁the▁question.▁<unk>se▁the▁image▁to▁answer.\n"
    question = f"<unk>mage:{fake}<image>{fake}<unk>uestion:▁"
    assert marked("idefics", "mimic-idefics", query, [shot]) == (
        f"{question}b▁<unk>nswer:cat</s>",
        "<s><pad>",  # before its answer, and not attended to
        f"<s>{head}{question}a▁<unk>nswer:▁red\n<pad><pad>",
    )


def test_a_query_s_images_are_where_its_text_has_them():
    query = Demonstration((RED, GREEN), "is{image}or{image}", "cat")
    found, _, _ = marked("qwen2_vl", PLAIN, query, SHOTS[:1])
    one, two = (f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (1, 2))
    assert found == f"is{one}or{two}▁cat</s>"


@pytest.mark.parametrize("shots", [1, 2])
def test_a_tokenizer_that_merges_over_the_boundary(shots):
    """As SentencePiece may: the line's end before the query is one token with the query's first letter."""
    builder = builder_of("llava", PLAIN, words=("▁red", "\nh"))
    query = Demonstration((), "hi is it", "red")
    rows = [[Demonstration((), "oh", "red")] * shots]
    with pytest.raises(ValueError) as error:
        episode_batch(builder, [query], rows)
    message = str(error.value)
    assert message.startswith("prompts of query 0: only the last 9 tokens are the same, of 10 that")
    ids = builder.processor.tokenizer.convert_tokens_to_ids
    student = ["<s>", "h", "i", "▁", "i", "s", "▁", "i", "t", "▁red", "</s>"]
    teacher = ["oh"[1], "▁red", "\nh", *student[2:]]
    for tail in (student, teacher):
        assert f"ids {ids(tail)}"[:-1] in message
    assert "'<s>hi is it red</s>'" in message and "h red\\nhi is it red</s>'" in message
    # With an image, a special token or no line's end between them there is nothing to merge.
    episode_batch(builder, [replace(query, images=(RED,))], rows)
    episode_batch(PromptBuilder(builder.processor, "{image}{text} {answer}."), [query], rows)
    episode_batch(PromptBuilder(builder.processor, "mimic-idefics"), [query], rows)


@pytest.mark.parametrize("name, refused", [("real-qwen2_5_vl", True), ("real-smolvlm", False)])
def test_real_tokenizers_at_the_boundary(name, refused):
    """Two line ends are one token of Qwen's, and two of SmolLM2's."""
    builder = builder_of(name, PLAIN)
    query, rows = Demonstration((), "\nhi", "red"), [[Demonstration((), "oh", "red")]]
    if not refused:
        batch = episode_batch(builder, [query], rows)
        ids = batch.teacher["input_ids"][batch.teacher_query]
        assert text_of(builder, ids) == "\nhi red<end_of_utterance>"
        return
    with pytest.raises(ValueError, match="only the last 3 tokens are the same, of 4 that .*\\\\n\\\\nhi red"):
        episode_batch(builder, [query], rows)
    chat = builder_of(name, "chat")  # whose turns begin with a line's end
    with pytest.raises(ValueError, match="answer '.*nred' begins within a token"):
        episode_batch(chat, [replace(query, answer="\nred")], rows)
    batch = episode_batch(chat, [query], rows)
    begin = text_of(chat, batch.teacher["input_ids"][batch.teacher_query])
    assert begin == "<|im_start|>user\n\nhi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"


def test_merged_in_the_student_s_head():
    """The query's first letter belongs to the head's last token: it is no token of the query."""
    processor = builder_of("llava", PLAIN, words=("▁red", ".h")).processor
    builder = PromptBuilder(processor, PLAIN, instruction="look.")
    with pytest.raises(ValueError, match="prompts of query 1: only the last 5 tokens .* of 6 that"):
        queries = [Demonstration((RED,), "a", "red"), Demonstration((), "hi x", "red")]
        episode_batch(builder, queries, [SHOTS[:1]] * 2)


def test_long_tails_are_shown_where_they_part():
    builder = builder_of("llava", PLAIN, words=("\nh",))
    query = Demonstration((), "hi " + "a b " * 50, "red")
    with pytest.raises(ValueError) as error:
        episode_batch(builder, [query], [[Demonstration((), "oh", "red")]])
    message = str(error.value)
    assert "<s>hi a b a b" in message and "ed\\nhi a b" in message and len(message) < 1500


def test_any_other_token_before_the_end_is_found():
    """Whatever the processor did to one prompt alone."""
    builder = builder_of("llava", PLAIN)
    student, teacher = builder.answered(TWO, [[], []]), builder.answered(TWO, [SHOTS, SHOTS])
    masks = align(student, teacher, builder)
    for row in range(2):
        for place in masks[1][row].nonzero().flatten().tolist():
            ids = teacher.inputs["input_ids"].clone()
            ids[row, place] = 50
            other = replace(teacher, inputs={**teacher.inputs, "input_ids": ids})
            with pytest.raises(ValueError, match=f"prompts of query {row}: only the last"):
                align(student, other, builder)


@pytest.mark.parametrize("shots, passes", [(0, [0]), (1, [1]), (4, [2, 2]), (5, [1, 2, 2])])
def test_many_shots(shots, passes):
    builder = builder_of("qwen2_vl", "chat")
    rows = [[SHOTS[(i + j) % 3] for j in range(shots)] for i in range(2)]
    batch = episode_batch(builder, TWO, rows, shots_per_pass=2)
    assert isinstance(batch, ManyShotBatch)
    teachers = [(batch.teacher, batch.teacher_query), *batch.further]
    assert len(teachers) == len(passes)
    done = 0
    for (inputs, query), count in zip(teachers, passes, strict=True):
        expected = episode_batch(builder, TWO, [row[done : done + count] for row in rows])
        assert torch.equal(inputs["input_ids"], expected.teacher["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected.teacher["pixel_values"])
        assert torch.equal(query, expected.teacher_query)
        done += count
    assert done == shots
    with pytest.raises(ValueError, match="shots_per_pass is 0, expected at least 1"):
        episode_batch(builder, TWO, rows, shots_per_pass=0)
    with pytest.raises(ValueError, match=r"shots has rows of \[1, 2\] demonstrations, expected as many"):
        episode_batch(builder, TWO, [SHOTS[:1], SHOTS[:2]], shots_per_pass=2)


@pytest.mark.parametrize("ends", [False, True], ids=["", "writes_the_end"])
@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize(
    "name, template, missing",
    [
        ("llava", "chat", 0),
        ("llava", "{text} {image} {answer}\n", 1),
        ("idefics2", "chat", {"first": 0, "always": 1}),  # its turns begin after a token and a line's end
        ("idefics2", "mimic-idefics2", {"first": 1, "always": 0}),
        ("idefics", "mimic-idefics", 0),
        ("qwen2_vl", "chat", 0),
        ("qwen2_vl", "{image}{text} {answer}\n", 0),
    ],
)
def test_a_text_s_first_token(name, template, missing, scheme, ends):
    """SentencePiece's "▁User" where a text, or what follows a token, begins: else "User". Nothing merges."""
    processor = tiny_processor(name, chat=template == "chat")
    if name == "qwen2_vl":
        processor.chat_template = CHAT_TEMPLATES[name]
    backend = processor.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    builder = PromptBuilder(processor, template)
    batch = episode_batch(builder, TWO, [SHOTS, SHOTS[:1]])
    missing = missing if isinstance(missing, int) else missing[scheme]
    student = builder.answered(TWO, [[], []], instructed=builder.instructs_students)
    own = student.inputs["attention_mask"].bool() & ~student.head
    left = own & ~batch.student_query
    assert left.sum(-1).tolist() == [missing, missing]
    for row in range(2):
        found = tokens(builder, student.inputs["input_ids"][row], left[row])
        assert found in ([], ["▁"])
        mine = tokens(builder, batch.student["input_ids"][row], batch.student_query[row])
        assert mine == tokens(builder, batch.teacher["input_ids"][row], batch.teacher_query[row])
    assert not (student.image & ~batch.student_query).any()


def test_places_that_tokens_split():
    builder = builder_of("llava", PLAIN, words=("▁red", "\nh"))
    assert [builder.splits("a red\nhi", place) for place in range(9)] == [
        True, True, False, False, False, True, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["mimic-idefics", "mimic-llava", "live", PLAIN, "chat"])
def test_what_predicts_the_answer(template):
    """The token before it, not the padding that keeps it apart: as ``generate`` begins."""
    builder = builder_of("llava", template)
    batch = episode_batch(builder, TWO, [SHOTS, SHOTS[:1]])
    prompt = builder.prompt(TWO, [[], []])
    rows = student_rows(batch), teacher_rows(batch, batch.teacher, batch.teacher_query)
    for i in range(2):
        answer = tokens(builder, batch.labels[i], batch.labels[i] >= 0)
        last = tokens(builder, prompt["input_ids"][i], prompt["attention_mask"][i])[-1]
        for found, inputs in zip(rows, (batch.student, batch.teacher), strict=True):
            assert tokens(builder, inputs["input_ids"][i], found[i]) == [last, *answer[:-1]]
