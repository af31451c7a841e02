"""lmms-eval asks an adapted model by the name of the entry point. Needs lmms-eval: `make test-lmms`."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

import mmicl_kernels as mk
from mmicl_kernels.evaluation.asking import OtherImages, asker_of
from mmicl_kernels.evaluation.generation import Generation
from mmicl_kernels.evaluation.metrics import postprocess
from tests.support.questions import adapter_of, decoded, model_and_processor, rows_of, said, write

TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/query.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 5, until: ["c"], temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from PIL import Image

def images(doc):
    return [Image.open("FOLDER/" + name).convert("RGB") for name in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]
"""


@pytest.fixture
def folder(tmp_path):
    model, processor = model_and_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    adapter_of(model, mk.LIVEConfig()).save_pretrained(tmp_path / "live")
    adapter_of(model, mk.AIMConfig()).save_pretrained(tmp_path / "aim")
    adapter_of(model, mk.PromptTuningConfig()).save_pretrained(tmp_path / "learned")
    rows = rows_of("q", 5)
    write(tmp_path, "query", rows)
    # The first two show what two queries do, in other files.
    pool = [{**row, "id": f"p{i}", "text": "which?"} for i, row in enumerate(rows[:2])]
    write(tmp_path, "pool", [*pool, *rows_of("other", 3)])
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "own.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "task" / "utils.py").write_text(UTILS.replace("FOLDER", str(tmp_path)))
    return tmp_path


def expected(folder, adapter, shots):
    """Prompt by prompt, with demonstrations that do not show what the query does."""
    model, processor = model_and_processor()
    builder, records = mk.PromptBuilder(processor), mk.Records(folder / "query.jsonl")
    draw = OtherImages(mk.Records(folder / "pool.jsonl"), shots, seed=7)
    if adapter is not None:
        mk.attach(model, mk.load(folder / adapter, model))
    queries = [x.demonstration() for x in records]
    return postprocess([said(model, builder, x, draw(x), max_new_tokens=5) for x in queries], ("c",))


def test_what_it_is_made_of(folder, tmp_path):
    """Without lmms-eval: the settings of a task, what is drawn, and an AIM adapter that stays attached."""
    given = {"max_new_tokens": 5, "until": "c", "temperature": 0, "do_sample": True, "num_beams": None}
    assert Generation.of(given) == Generation(max_new_tokens=5, cut=("c",))
    assert Generation.of({"until": ["\n\n", ""]}) == Generation(cut=("\n\n",))
    queries, pool = (mk.Records(folder / f"{name}.jsonl") for name in ("query", "pool"))
    draw = OtherImages(pool, 4, seed=7)
    for i, record in enumerate(queries):
        drawn = draw(record.demonstration())
        own = [x.images == record.image_bytes() for x in drawn]
        assert own == [False] * 4 and drawn == draw(record.demonstration())
        if i < 2:
            with pytest.raises(ValueError, match="5 examples, 4 of them others than the query"):
                OtherImages(pool, 5, seed=7)(record.demonstration())
    model, processor = model_and_processor()
    ask = asker_of(model, processor, folder / "aim", tmp_path / "bank")
    query, shots = queries[0].demonstration(), draw(queries[0].demonstration())[:2]
    texts = ask([query] * 2, [shots, shots[::-1]], Generation(5)).texts
    made = mk.evaluate(
        model_and_processor()[0], processor, folder / "query.jsonl", adapters={"aim": folder / "aim"},
        shots=(2,), demonstrations=list(pool), retrieval=lambda *x: [pool_place(pool, y) for y in shots],
        generation=Generation(5, cut="none"), progress=False,
    )  # fmt: skip
    assert made["aim, 2 fused"].texts[0] == texts[0].strip()
    assert len(mk.DemonstrationBank(tmp_path / "bank")) == 2
    mk.detach(model)


@pytest.mark.parametrize("count", [0, 2])
def test_learned_tokens_without_lmms_eval(folder, tmp_path, count):
    model, processor = model_and_processor()
    ask, builder = (
        asker_of(model, processor, folder / "learned", tmp_path / "bank"),
        mk.PromptBuilder(processor),
    )
    query, *shots = (x.demonstration() for x in mk.Records(folder / "query.jsonl")[: 1 + count])
    (text,) = ask([query], [shots], Generation(5)).texts
    inputs = mk.handle_of(model).splice(builder.prompt([query], [shots]))
    assert text == decoded(model, builder, inputs, max_new_tokens=5) and not (tmp_path / "bank").exists()
    mk.detach(model)
    assert text != said(model, builder, query, shots, max_new_tokens=5)


def pool_place(pool, demonstration):
    return [x.demonstration() for x in pool].index(demonstration)


def test_the_entry_point_is_declared():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."lmms_eval.models"]\nmmicl = "mmicl_kernels.evaluation.lmms:manifest"' in text
    )


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-lmms")
@pytest.mark.parametrize("adapter, shots", [(None, 0), ("live", 0), ("live", 2)])
def test_through_its_command(folder, adapter, shots):
    """The task is of a local file; every text is what the same prompt alone is answered."""
    (found,) = entry_points(group="lmms_eval.models", name="mmicl")
    assert found.value == "mmicl_kernels.evaluation.lmms:manifest"
    arguments = {"pretrained": folder / "model", "seed": 7}
    arguments |= {"adapter": folder / adapter} if adapter else {}
    arguments |= {"shots": shots, "demonstrations": folder / "pool.jsonl"} if shots else {}
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "mmicl", "--tasks", "own", "--batch_size", "2",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--include_path", folder / "task", "--output_path", folder / "out", "--log_samples",
        "--device", "cpu",
    ]  # fmt: skip
    root = str(Path(mk.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (samples,) = (folder / "out").rglob("*_samples_own.jsonl")
    lines = sorted(map(json.loads, samples.open()), key=lambda line: line["doc_id"])
    assert [x["filtered_resps"] for x in lines] == expected(folder, adapter, shots)
