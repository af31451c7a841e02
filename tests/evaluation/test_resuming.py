"""Evaluations that were ended go on: nothing is asked twice, nothing of another run is taken."""

import json
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from PIL import Image

import mmicl_kernels as mk
from mmicl_kernels.evaluation import asking, predictions
from mmicl_kernels.evaluation.generation import Generation
from tests.support.questions import adapter_of, model_and_processor, rows_of, write

SETTINGS = Generation(max_new_tokens=4, cut="none")
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.support.questions import model_and_processor, adapter_of
from tests.evaluation.test_resuming import evaluated
from mmicl_kernels.evaluation import predictions

append, batches = predictions.append, 0

def append_or_die(path, data):
    global batches
    batches += 1
    if batches == {batch}:
        append(path, data[: len(data) - 30])  # half of it
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, data)

predictions.append = append_or_die
evaluated({folder!r})
"""


def evaluated(folder, out="out", **options):
    folder = Path(folder)
    model, processor = model_and_processor()
    given = {
        "adapters": {"live": adapter_of(model, mk.LIVEConfig()), "aim": adapter_of(model, mk.AIMConfig())},
        "shots": (0, 2), "demonstrations": folder / "pool.jsonl", "generation": SETTINGS, "batch_size": 2,
        "out": out and folder / out, "progress": False,
    }  # fmt: skip
    return mk.evaluate(model, processor, folder / "query.jsonl", **{**given, **options})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "query", rows_of("q", 5))
    write(tmp_path, "pool", rows_of("p", 4))
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """How many prompts were answered, batch by batch."""
    sizes = []
    generate = asking.generate

    def counted(model, inputs, *args, **options):
        sizes.append(len(inputs["input_ids"]))
        return generate(model, inputs, *args, **options)

    monkeypatch.setattr(asking, "generate", counted)
    return sizes


def texts(evaluation):
    return {row.name: row.texts for row in evaluation.rows}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5, 11])
def test_killed_and_run_again(folder, asked, batch):
    """Four rows of batches of 2, 2 and 1; of the batch that was being written the first line is whole."""
    script = KILLED.format(root=str(Path(__file__).parents[2]), batch=batch, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "out" / "results.json").exists()
    left = sum(len(x.read_bytes().splitlines()) for x in (folder / "out").rglob("predictions.jsonl"))
    again = evaluated(folder)
    sizes = [2, 2, 1] * 4
    whole = sum(sizes[: batch - 1]) + sizes[batch - 1] - 1
    assert left == whole + 1 and sum(asked) == 20 - whole
    assert texts(again) == texts(evaluated(folder, out=None))
    assert (folder / "out" / "results.json").exists()
    del asked[:]
    assert str(evaluated(folder)) == str(again) and asked == []  # no half line is left


def test_interrupted_while_it_writes(folder, asked, monkeypatch):
    """The same within this process: of the fifth batch a line and a half are on the disk."""
    append, batches = predictions.append, []

    def append_or_die(path, data):
        batches.append(path)
        append(path, data[: len(data) - 30] if len(batches) == 5 else data)
        if len(batches) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(predictions, "append", append_or_die)
    with pytest.raises(KeyboardInterrupt):
        evaluated(folder)
    assert asked == [2, 2, 1, 2, 2] and not (folder / "out" / "results.json").exists()
    again = evaluated(folder)
    assert asked[5:] == [1, 1, *[2, 2, 1] * 2]
    assert texts(again) == texts(evaluated(folder, out=None))
    del asked[:]
    assert str(evaluated(folder)) == str(again) and asked == []  # no half line is left


def test_nothing_is_asked_twice(folder, asked):
    first = evaluated(folder, limit=3)
    assert asked == [2, 1] * 4
    del asked[:]
    lines = (folder / "out" / "live" / "predictions.jsonl").read_bytes()
    assert str(evaluated(folder, limit=3)) == str(first)  # times are those of when it was asked
    assert asked == [] and (folder / "out" / "live" / "predictions.jsonl").read_bytes() == lines
    more = evaluated(folder)  # of the second batch one is known
    assert asked == [1, 1] * 4
    assert texts(more) == texts(evaluated(folder, out=None))
    del asked[:]
    assert evaluated(folder, batch_size=5).records == 5
    evaluated(folder, shots=(0, 2, 3))
    assert asked == [2, 2, 1] * 2  # 3-shot, and fused


@pytest.mark.parametrize(
    "options, row, name",
    [
        ({"generation": Generation(max_new_tokens=5)}, "zero-shot", "generation"),
        ({"seed": 1}, "2-shot", "seed"),
        ({"auroc": True, "metric": "yes-no"}, "zero-shot", "yes_no"),
        ({"retrieval": lambda pool, query, shots, generator: range(shots)}, "2-shot", "retrieval"),
    ],
)
def test_other_settings_are_refused(folder, options, row, name):
    write(folder, "query", [{**x, "answer": ("yes", "no")[i % 2]} for i, x in enumerate(rows_of("q", 5))])
    evaluated(folder, adapters=None)
    before = (folder / "out" / row / "predictions.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"^{name} is .*, expected .* as the predictions in .*/{row} were"):
        evaluated(folder, adapters=None, **options)
    assert (folder / "out" / row / "predictions.jsonl").read_bytes() == before
    evaluated(folder, adapters=None, out="other", **options)
    evaluated(folder, adapters=None, generation=Generation(max_new_tokens=4, cut="vqa"))  # cut afterwards


def test_another_model_adapter_or_pool(folder):
    evaluated(folder)
    model, processor = model_and_processor()
    options = {"generation": SETTINGS, "out": folder / "out", "progress": False}
    other = adapter_of(model, mk.LIVEConfig(), seed=2)
    with pytest.raises(ValueError, match=r"^adapter is .* in .*/live were made with"):
        mk.evaluate(model, processor, folder / "query.jsonl", adapters={"live": other}, **options)
    model.lm_head.weight.data *= 2
    with pytest.raises(ValueError, match=r"^model is .* in .*/zero-shot were made with"):
        mk.evaluate(model, processor, folder / "query.jsonl", **options)
    builder = mk.PromptBuilder(processor, "{image}{text}: {answer}")
    with pytest.raises(ValueError, match=r"^(model|prompt) is"):
        mk.evaluate(model, builder, folder / "query.jsonl", **options)
    write(folder, "pool", rows_of("p", 3))
    with pytest.raises(ValueError, match="2-shot/predictions.jsonl: record 'q.' .* other demonstrations"):
        evaluated(folder)


def test_another_question_of_the_same_name(folder):
    evaluated(folder, adapters=None)
    rows = rows_of("q", 5)
    rows[3]["text"] = "another?"
    write(folder, "query", rows)
    with pytest.raises(ValueError, match="zero-shot/predictions.jsonl: record 'q3' is not the one"):
        evaluated(folder, adapters=None)
    rows[3]["text"], rows[3]["answer"] = "red or blue?", "red"  # answers may be put right
    (folder / "query.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated(folder, adapters=None)


def test_other_images_of_the_same_names(folder):
    """In another folder, as other bytes of rows, or written over: of a query, and of a demonstration."""
    evaluated(folder, adapters=None)
    other = folder / "other"
    other.mkdir()
    rows = rows_of("p", 4)
    write(other, "pool", [{**x, "answer": "blue" if x["answer"] == "red" else "red"} for x in rows])
    images = [{**x, "images": [(other / x["images"][0]).read_bytes()]} for x in rows]
    message = "2-shot/predictions.jsonl: record 'q0' is not the one that was asked, or has other demons"
    for pool in (mk.Records(folder / "pool.jsonl", other), images):
        with pytest.raises(ValueError, match=message):
            evaluated(folder, adapters=None, demonstrations=pool)
    same = [{**x, "images": [(folder / x["images"][0]).read_bytes()]} for x in rows]
    assert texts(evaluated(folder, adapters=None, demonstrations=same))
    (folder / "q3-0.png").write_bytes((folder / "q0-0.png").read_bytes())
    with pytest.raises(ValueError, match="zero-shot/predictions.jsonl: record 'q3' is not the one"):
        evaluated(folder, adapters=None)


class From:
    """Draws those from a place on."""

    def __init__(self, place):
        self.place = place

    def __call__(self, pool, query, shots, generator):
        return [(self.place + i) % len(pool) for i in range(shots)]


def test_a_draw_that_draws_others(folder):
    evaluated(folder, adapters=None, retrieval=From(0))
    evaluated(folder, adapters=None, retrieval=From(4))  # the same ones
    with pytest.raises(ValueError, match="record 'q0' is not the one .* the same draw"):
        evaluated(folder, adapters=None, retrieval=From(1))


def test_what_is_another_model_or_processor(folder):
    """How a model runs is not what it is; what a processor's prompts look like is."""
    model, processor = model_and_processor(chat=True)
    digests = predictions.model_digest(model), predictions.processor_digest(processor)
    processor.save_pretrained(folder / "processor")
    model.config.use_cache = model.config.text_config.use_cache = False
    loaded = mk.load_processor(folder / "processor")
    assert (predictions.model_digest(model), predictions.processor_digest(loaded)) == digests
    for writer in (processor, processor.tokenizer):
        template, writer.chat_template = writer.chat_template, "{{ messages }}"
        same = writer is processor.tokenizer  # it does not write where the processor does
        assert (predictions.processor_digest(processor) == digests[1]) == same
        writer.chat_template = template


def test_batch_sizes_are_those_of_when_it_was_asked(folder):
    assert str(evaluated(folder, adapters=None)).startswith("exact of 5 records, batches of 2\n")
    again = evaluated(folder, adapters=None, batch_size=3, shots=(0, 2, 3))
    assert [row.batch_sizes for row in again.rows] == [(2,), (2,), (3,)]
    assert str(again).startswith("exact of 5 records, batches of 2 and 3\n")


def test_rows_are_made_when_they_are_asked_for(folder):
    """As of a HuggingFace Dataset, whose images are decoded then: none is kept."""

    class Rows:
        made = []

        def __len__(self):
            return 500

        def __getitem__(self, i):
            self.made.append(weakref.ref(image := Image.new("RGB", (8, 8), (i, 0, 0))))
            assert sum(x() is not None for x in self.made) <= 6  # two batches, and what a loop ended with
            return {"image": image, "text": "what?", "answer": "red"}

    model, processor = model_and_processor()
    mk.evaluate(model, processor, Rows(), limit=12, batch_size=2, progress=False, generation=SETTINGS)
    assert len(Rows.made) >= 12


def test_damage(folder, asked):
    evaluated(folder, adapters=None, shots=(0,))
    path = folder / "out" / "zero-shot" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"zero-shot/predictions.jsonl:2: .*expected JSON"):
        evaluated(folder, adapters=None, shots=(0,))
    path.write_bytes(lines[0] + b'{"id": "q1"}\n')
    with pytest.raises(ValueError, match=r"zero-shot/predictions.jsonl:2: expected an object of asked"):
        evaluated(folder, adapters=None, shots=(0,))
    for name, value in {"id": ["q1"], "text": 5, "seconds": None, "yes": "no"}.items():
        path.write_text(json.dumps({**json.loads(lines[0]), name: value}) + "\n")
        with pytest.raises(ValueError, match=rf"jsonl:1: {name} is {re.escape(repr(value))}, "):
            evaluated(folder, adapters=None, shots=(0,))
    path.write_bytes(b"".join(lines))
    settings = (path.parent / "settings.json").read_bytes()
    for damaged in (b"", b"[]", settings[:50], b"\xff"):
        (path.parent / "settings.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"zero-shot/settings.json.* expected (JSON|an object)"):
            evaluated(folder, adapters=None, shots=(0,))
    (path.parent / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has predictions.jsonl without settings.json"):
        evaluated(folder, adapters=None, shots=(0,))


def test_a_bank_of_ones_own(folder):
    """Demonstrations that it has are not read again; one of another prompt is refused."""
    model, processor = model_and_processor()
    aim = adapter_of(model, mk.AIMConfig())
    builder = mk.PromptBuilder(processor)
    bank = mk.DemonstrationBank.create(folder / "bank", aim, model.dtype, builder.description)
    expected = evaluated(folder, out=None)["aim, 2 fused"].texts
    options = {"adapters": {"aim": aim}, "out": None, "shots": (2,)}
    assert evaluated(folder, bank=folder / "bank", **options)["aim, 2 fused"].texts == expected
    bank.refresh()
    count = len(bank)
    assert 0 < count <= 4
    lines = [json.loads(x) for x in (folder / "pool.jsonl").open()]
    assert {bank.text(i).text for i in range(count)} <= {x["text"] for x in lines}
    assert evaluated(folder, bank=folder / "bank", **options)["aim, 2 fused"].texts == expected
    bank.refresh()
    assert len(bank) == count
    mk.DemonstrationBank.create(folder / "other", aim, model.dtype, "'{text}', fused: text")
    with pytest.raises(
        ValueError, match="prompts are made by .*, expected '{text}', fused: text as the bank"
    ):
        evaluated(folder, bank=folder / "other", **options)
