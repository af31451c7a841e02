"""`mmicl bank build`: from a file of demonstrations, with a model's folder, to answers after fused tokens."""

import json

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.support.example_images import png

RED, BLUE = (png(colour, (9, 7)) for colour in ("red", "blue"))
LINES = [
    {"image": "red.png", "text": "what?", "answer": "red"},
    {"image": ["red.png", "blue.png"], "text": "which are these?", "answer": "red and blue"},
    {"image": [], "text": "a cat or a dog?", "answer": "cat"},
]
DEMONSTRATIONS = [
    Demonstration((RED,), "what?", "red"),
    Demonstration((RED, BLUE), "which are these?", "red and blue"),
    Demonstration((), "a cat or a dog?", "cat"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of a model with its processor, and of adapters for it."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("llava-llama")
    model.save_pretrained(folder / "model")
    tiny_processor("llava").save_pretrained(folder / "model")
    configs = {"aim": mk.AIMConfig(), "live": mk.LIVEConfig(), "other": mk.AIMConfig()}
    configs["prompt"] = mk.PromptTuningConfig()
    configs |= {name: mk.AIMConfig(positions=name) for name in ("answer", "answer_end")}
    for name, config in configs.items():
        adapter = mk.create(model, config)
        if isinstance(config, mk.AIMConfig):  # each begins as the identity
            torch.nn.init.normal_(adapter.fuser.weight)
        adapter.save_pretrained(folder / name)
    return folder


@pytest.fixture
def build(saved, tmp_path, run, monkeypatch):
    """Runs the command on the lines written to a file; its exit code, output and own errors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    images = tmp_path / "data"
    images.mkdir()
    for colour, data in (("red", RED), ("blue", BLUE)):
        (images / f"{colour}.png").write_bytes(data)

    def build(*options, lines=LINES, adapter="aim", model="model", folder="bank"):
        data = images / "data.jsonl"
        data.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        given = ["--model", saved / model, "--adapter", saved / adapter, "--data", data, *options]
        code, out, err = run("bank", "build", tmp_path / folder, *given)
        return code, out, [x for x in err.splitlines() if "mmicl bank build:" in x]

    return build


def reloaded(saved, adapter="aim"):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(saved / "model").eval()
    return model, AutoProcessor.from_pretrained(saved / "model"), mk.load(saved / adapter, model)


@torch.no_grad()
def fused(saved, adapter="aim", **options):
    model, processor, adapter = reloaded(saved, adapter)
    with mk.attach(model, adapter) as handle:
        return handle.aggregate(*PromptBuilder(processor, **options).demonstrations(DEMONSTRATIONS))


def test_build_then_splice_then_generate(build, saved, tmp_path):
    assert build("--dtype", "float32") == (0, "3 demonstrations: 3 added, 0 known, 0 bad lines\n", [])
    bank = mk.DemonstrationBank(tmp_path / "bank")
    for i, (demonstration, expected) in enumerate(zip(DEMONSTRATIONS, fused(saved), strict=True)):
        assert bank.find(demonstration) == i
        assert tuple(bank.text(i)) == (demonstration.text, demonstration.answer)
        torch.testing.assert_close(bank.tokens(i), expected)
    model, processor, adapter = reloaded(saved)
    inputs = PromptBuilder(processor).prompt(
        [Demonstration((RED,), "what?", ""), Demonstration((BLUE,), "hi", "")]
    )
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with mk.attach(model, adapter, bank=bank) as handle:
        spliced = handle.splice(inputs, [[0, 1], [2]])
        length = inputs["input_ids"].shape[1] + len(bank.tokens(0)) + len(bank.tokens(1))
        assert spliced["input_ids"].shape[1] == length
        generated = model.generate(**spliced, **options)
        assert generated.shape == (2, length + 3)
        logits = model(**spliced).logits[:, -1]
        assert torch.equal(generated[:, length], logits.argmax(-1))
    assert not torch.allclose(logits, model(**inputs).logits[:, -1])


def test_again_adds_nothing_and_reads_nothing(build, monkeypatch):
    build()
    monkeypatch.setattr(mk.Handle, "aggregate", None)
    assert build() == (0, "3 demonstrations: 0 added, 3 known, 0 bad lines\n", [])
    twice = [*LINES, *LINES]
    assert build(lines=twice) == (0, "3 demonstrations: 0 added, 6 known, 0 bad lines\n", [])


def test_another_template_is_refused(build, tmp_path):
    build()
    code, out, errors = build("--template", "{image}Q: {text} A: {answer}")
    assert (code, out) == (1, "")
    assert "prompts are made by" in errors[0] and "'{image}{text} {answer}'" in errors[0]
    assert "{image}{text} {answer}" in mk.DemonstrationBank(tmp_path / "bank").prompt


def test_markers_of_images(build, saved, tmp_path):
    line = {"image": ["red.png", "blue.png"], "text": "a {image} b {image}", "answer": "cat"}
    one_too_many = {**line, "text": "{image} {image} {image}"}
    code, out, errors = build("--image-marker", "<image>!", "--dtype", "float32", lines=[line, one_too_many])
    assert (code, out) == (1, "1 demonstrations: 1 added, 0 known, 1 bad lines\n")
    assert len(errors) == 1 and "has {image} 3 times" in errors[0] and "its 2 images" in errors[0]
    bank = mk.DemonstrationBank(tmp_path / "bank")
    assert bank.lengths.tolist() == [2]  # "!" and the answer
    assert "<image>!<image>!" in bank.prompt
    code, out, errors = build(lines=[line])
    assert (code, out) == (1, "") and "prompts are made by" in errors[0]


def test_what_cannot_be_aggregated_is_named_and_the_rest_added(build, monkeypatch):
    aggregate = mk.Handle.aggregate

    def refuses(self, inputs, positions):
        if len(inputs["input_ids"]) != 1 or int((inputs["input_ids"] == 60).sum()) == 8:  # two images
            raise ValueError("an image that the processor refuses")
        return aggregate(self, inputs, positions)

    monkeypatch.setattr(mk.Handle, "aggregate", refuses)
    code, out, errors = build()
    assert (code, out) == (1, "2 demonstrations: 2 added, 0 known, 1 bad lines\n")
    assert len(errors) == 1 and "which are these?" in errors[0] and "refuses" in errors[0]


def test_an_interrupted_run_is_taken_up(build, saved, tmp_path, monkeypatch):
    aggregate, read = mk.Handle.aggregate, []

    def interrupted(self, inputs, positions):
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(len(inputs["input_ids"]))
        return aggregate(self, inputs, positions)

    monkeypatch.setattr(mk.Handle, "aggregate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("--batch-size", "1", "--dtype", "float32")
    assert len(mk.DemonstrationBank(tmp_path / "bank")) == 1
    read.clear()
    monkeypatch.setattr(
        mk.Handle, "aggregate", lambda *x: read.append(len(x[1]["input_ids"])) or aggregate(*x)
    )
    assert build("--batch-size", "2")[:2] == (0, "3 demonstrations: 2 added, 1 known, 0 bad lines\n")
    assert read == [2]  # together: the known one takes no place in the batch
    bank = mk.DemonstrationBank(tmp_path / "bank")
    for i, expected in enumerate(fused(saved)):
        torch.testing.assert_close(bank.tokens(i), expected)


def test_same_demonstrations_in_one_file(build):
    lines = [*LINES, *LINES]
    assert build("--batch-size", "4", lines=lines)[1] == "3 demonstrations: 3 added, 3 known, 0 bad lines\n"


def test_bad_lines(build, tmp_path):
    (tmp_path / "data" / "broken.png").write_bytes(RED[:30])
    (tmp_path / "secret.png").write_bytes(RED)
    good = LINES[0]
    lines = [
        good,
        b"{",
        b"",
        {**good, "image": "none.png"},
        {**good, "image": "../secret.png"},
        {**good, "image": ["red.png", "broken.png"]},
        {**good, "image": None},
        {"image": "red.png", "text": "a"},
        {**good, "answer": 3},
        {**good, "text": "an <image>"},
        LINES[2],
    ]
    code, out, errors = build(lines=lines)
    assert (code, out) == (1, "2 demonstrations: 2 added, 0 known, 8 bad lines\n")
    file = tmp_path / "data" / "data.jsonl"
    expected = {
        2: "bad JSON: ",
        4: "missing image: 'none.png'",
        5: "path outside: '../secret.png'",
        6: "image 1 cannot be decoded",
        7: "missing field: image and images are missing",
        8: "missing field: answer is missing",
        9: "bad field: answer is 3",
        10: "text 'an <image>' has '<image>', expected no special token",
    }
    assert len(errors) == len(expected)
    for error, (number, message) in zip(errors, expected.items(), strict=True):
        assert error.startswith(f"mmicl bank build: {file}:{number}: {message}")


def test_a_model_of_16_bits(build, saved, tmp_path):
    folder = saved / "model16"
    model = tiny_model("llava-llama").to(torch.bfloat16)
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype="auto").eval()  # its positions are computed in fp32
    assert model.dtype == torch.bfloat16
    tiny_processor("llava").save_pretrained(folder)
    mk.create(model, mk.AIMConfig()).save_pretrained(saved / "aim16")
    assert build("--dtype", "float32", "--batch-size", "1", model="model16", adapter="aim16")[0] == 0
    bank = mk.DemonstrationBank(tmp_path / "bank")
    builder = PromptBuilder(tiny_processor("llava"), dtype=torch.bfloat16)
    with torch.no_grad():
        for i, demonstration in enumerate(DEMONSTRATIONS):
            inputs, _ = builder.demonstrations([demonstration])
            states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
            expected = states[-len(bank.tokens(i)) :].float()  # a new projection is the identity
            assert torch.equal(bank.tokens(i), expected)


def test_answers_alone(build, saved, tmp_path):
    assert build("--dtype", "float32", adapter="answer")[0] == 0
    bank = mk.DemonstrationBank(tmp_path / "bank")
    for i, expected in enumerate(fused(saved, "answer", positions="answer")):
        torch.testing.assert_close(bank.tokens(i), expected)
    assert bank.lengths.tolist() == [1, 6, 1]  # " red", a token; " red", " ", "a", "n", "d", " blue"; " cat"
    code, out, errors = build(lines=[{**LINES[0], "answer": ""}], adapter="answer")
    assert (code, len(errors)) == (1, 1) and "answer is '', expected one with tokens" in errors[0]


def test_answers_and_what_ends_them(build, saved, tmp_path):
    options = {"template": "{image}{text} {answer}.\n", "positions": "answer_end"}
    assert build("--dtype", "float32", "--template", options["template"], adapter="answer_end")[0] == 0
    bank = mk.DemonstrationBank(tmp_path / "bank")
    for i, expected in enumerate(fused(saved, "answer_end", **options)):
        torch.testing.assert_close(bank.tokens(i), expected)
    assert bank.lengths.tolist() == [2, 7, 2]  # and "."
    assert bank.prompt.endswith("fused: answer_end")
    code, out, errors = build(adapter="answer_end", folder="other")
    assert (code, out, len(errors)) == (1, "", 1)
    assert "template is '{image}{text} {answer}', expected one with a token of its own" in errors[0]
    assert not (tmp_path / "other").exists()


def test_template_dtype_and_images(build, saved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "data").rename(elsewhere)
    (tmp_path / "data").mkdir()
    template = "{image}q: {text} a: {answer}!"
    assert build("--images", elsewhere, "--template", template, "--dtype", "int8")[0] == 0
    bank = mk.DemonstrationBank(tmp_path / "bank")
    assert bank.dtype == torch.int8
    assert bank.lengths.tolist() == [len(x) for x in fused(saved, template=template)]
    build("--images", elsewhere, folder="plain")
    assert mk.DemonstrationBank(tmp_path / "plain").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, given, message",
    [
        (["--batch-size", "0"], {}, "--batch-size is 0, expected at least 1"),
        (["--data", "none.jsonl"], {}, "--data: none.jsonl does not exist"),
        (["--images", "none"], {}, "--images: none does not exist"),
        ([], {"model": "none"}, "expected a folder"),
        ([], {"adapter": "none"}, "none"),
        ([], {"adapter": "live"}, "has a LIVEAdapter, expected one that fuses demonstrations"),
        ([], {"adapter": "prompt"}, "has a PromptTuningAdapter, expected one that fuses demonstrations"),
        ([], {"adapter": "other"}, "projection"),
        (["--dtype", "float16"], {}, "--dtype is float16, expected torch.bfloat16"),
        (["--template", "{text}"], {}, "template is '{text}'"),
    ],
)
def test_errors_are_one_line(build, tmp_path, options, given, message):
    build()
    code, out, errors = build(*options, **given)
    assert (code, out, len(errors)) == (1, "", 1) and message in errors[0]
    assert len(mk.DemonstrationBank(tmp_path / "bank")) == 3
