"""From a file of one's own examples to an adapter that answers: records, prompts, training, metrics."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mmicl_kernels as mk
from mmicl_kernels.evaluation.metrics import exact_match
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training import EpisodeCollator, TrainedModule, epochs, train, trainable

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def records(tmp_path):
    lines = []
    for i in range(8):
        colour = list(COLOURS)[i % 2]
        Image.new("RGB", (9 + i, 7), COLOURS[colour]).save(tmp_path / f"{i}.png")
        lines.append(
            {"id": f"r{i}", "image": f"{i}.png", "text": "what?", "answer": colour, "answers": [colour]}
        )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return mk.Records(tmp_path / "train.jsonl")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "config",
    [
        mk.MimICConfig(align="layer", alignment="mean_square"),  # a dozen updates of a random model
        mk.M2IVConfig(synergy_weight=0),
        mk.LIVEConfig(),
    ],
)
def test_train_save_load_answer(records, config, workers, tmp_path):
    torch.manual_seed(0)
    model, processor = tiny_model("llava-llama"), tiny_processor("llava")
    builder = mk.PromptBuilder(processor)
    adapter = mk.create(model, config)
    loader = DataLoader(
        records, batch_size=2, collate_fn=EpisodeCollator(builder, records, shots=2), num_workers=workers
    )
    module = TrainedModule(model, adapter)
    log = train(module, trainable(adapter), epochs(loader), 12, progress=False)
    assert log[-1]["ce"] < log[0]["ce"]
    module.handle.detach()
    adapter.save_pretrained(tmp_path / "adapter")

    questions = builder.prompt([records[i].demonstration() for i in range(4)])
    with mk.attach(model, mk.load(tmp_path / "adapter", model)):
        said = model.generate(**questions, max_new_tokens=1, do_sample=False)[:, -1:]
    answers = [x.strip() for x in processor.tokenizer.batch_decode(said)]
    score = exact_match(answers, [records[i].answers for i in range(4)])
    assert score.value == sum(x == records[i].answer for i, x in enumerate(answers)) / 4
