"""From a folder of one's own, with SmolVLM's and Qwen2.5-VL's real processors, to adapters that answer."""

import json
import random
from itertools import chain, islice

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mmicl_kernels as mk
from mmicl_kernels.data.prompts.builder import builder_of
from mmicl_kernels.testing.real_processors import tiny_vlm
from mmicl_kernels.training import (
    AggregationCollator,
    EpisodeCollator,
    TrainedModule,
    episode_batch,
    epochs,
    train,
    trainable,
)
from tests.support.example_processors import needs_torchvision, processor_of

METHODS = {
    "mimic": mk.MimICConfig(align="layer"),
    "m2iv": mk.M2IVConfig(synergy_weight=0),
    "live": mk.LIVEConfig(),
    "aim": mk.AIMConfig(),
}
COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """50 of mixed sizes: most with one image, some with two or with none."""
    folder, drawn = tmp_path_factory.mktemp("records"), random.Random(0)
    lines = []
    for i in range(50):
        colours = drawn.choices(COLOURS, k=(1, 1, 2, 1, 0)[i % 5])
        files = [f"{i}_{j}.png" for j in range(len(colours))]
        for file, colour in zip(files, colours, strict=True):
            size = drawn.randint(20, 120), drawn.randint(20, 120)
            Image.new("RGB", size, colour).save(folder / file)
        text = {0: f"Is it {i}?", 1: "Which colour?", 2: "Is {image} before {image}?"}[len(colours)]
        lines.append({"id": str(i), "images": files, "text": text, "answer": " ".join(colours) or "no"})
    (folder / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return mk.Records(folder / "train.jsonl")


@pytest.fixture(scope="module", params=["smolvlm", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    """A checkpoint as users have them."""
    folder = tmp_path_factory.mktemp(request.param)
    processor_of(f"real-{request.param}").save_pretrained(folder)
    tiny_vlm(request.param).save_pretrained(folder)
    return folder


def loaded(folder):
    with needs_torchvision():
        return mk.load_model(folder, device="cpu"), mk.load_processor(folder)


def asked(model, adapter, builder, records, folder):
    """The logits before four records' answers, and what is said; AIM's after demonstrations of a bank."""
    questions = builder.prompt([records[i].demonstration() for i in range(1, 5)])
    aim = isinstance(adapter, mk.AIMAdapter)
    bank = mk.DemonstrationBank.create(folder, adapter, torch.float32) if aim else None
    with torch.no_grad(), mk.attach(model, adapter, bank=bank) as handle:
        if aim:
            shown = [records[i].demonstration() for i in range(5, 8)]
            ids = handle.add_demonstrations(shown, builder.demonstrations, progress=False)
            questions = handle.splice(questions, [ids[:1], ids[1:], [], ids])
        logits = model(**questions).logits[:, -1]
        said = model.generate(**questions, max_new_tokens=4, do_sample=False)
    return logits, said[:, questions["input_ids"].shape[1] :]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_s_rows_do_not_see_each_other(folder, records, side):
    """Padded on either side, with other images before them: positions and pixels are each row's own."""
    model, processor = loaded(folder)
    model = model.double()
    builder = builder_of(processor, dtype=torch.float64)
    chosen = [records[i].demonstration() for i in range(5)]
    shots = [[records[i + j].demonstration() for j in range(5, 8)] for i in range(5)]
    together = episode_batch(builder, chosen, shots, padding_side=side)
    for name in ("student", "teacher"):
        with torch.no_grad():
            logits = model(**getattr(together, name)).logits
        for i in range(5):
            alone = episode_batch(builder, [chosen[i]], [shots[i]])
            with torch.no_grad():
                expected = model(**getattr(alone, name)).logits[getattr(alone, f"{name}_query")]
            torch.testing.assert_close(logits[i][getattr(together, f"{name}_query")[i]], expected)


@pytest.mark.parametrize(
    "method", ["mimic", "aim", *(pytest.param(x, marks=pytest.mark.slow) for x in ("m2iv", "live"))]
)
def test_train_save_load_answer(folder, records, method, tmp_path):
    model, processor = loaded(folder)
    builder = builder_of(processor)
    assert builder.template == "chat"
    adapter = mk.create(model, METHODS[method])
    collator = AggregationCollator if method == "aim" else EpisodeCollator
    collate = collator(builder, records, shots=(1, 3) if method == "aim" else 3)
    loader = DataLoader(records, batch_size=2, collate_fn=collate)
    module = TrainedModule(model, adapter)
    same = [collate([records[i] for i in range(4)])]
    log = train(module, trainable(adapter), chain(same, islice(epochs(loader), 5), same), 7, progress=False)
    assert log[-1]["ce"] < log[0]["ce"]
    module.handle.detach()
    adapter.save_pretrained(tmp_path / "adapter")
    logits, said = asked(model, adapter, builder, records, tmp_path / "bank")
    other = mk.load_model(folder, device="cpu")
    adapter = mk.load(tmp_path / "adapter", other)
    again, also_said = asked(other, adapter, builder, records, tmp_path / "other_bank")
    assert torch.equal(again, logits) and torch.equal(also_said, said)
    new = mk.create(model, METHODS[method])
    untrained, _ = asked(model, new, builder, records, tmp_path / "untrained_bank")
    assert not torch.allclose(untrained, logits)
