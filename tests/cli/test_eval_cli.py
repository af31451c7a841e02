"""`mmicl eval`: from a model's folder and files of records to a table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mmicl_kernels as mk
from mmicl_kernels.cli import main
from mmicl_kernels.evaluation.generation import Generation
from mmicl_kernels.evaluation.metrics import postprocess
from tests.support.questions import adapter_of, model_and_processor, rows_of, said, write


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of a model with its processor, and of adapters for it; files of records."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = model_and_processor()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    configs = {"live": mk.LIVEConfig(), "aim": mk.AIMConfig(), "learned": mk.PromptTuningConfig()}
    for name, config in configs.items():
        adapter_of(model, config).save_pretrained(folder / name)
    write(folder, "query", rows_of("q", 4))
    write(folder, "pool", rows_of("p", 4))
    return folder


@pytest.fixture
def mmicl_eval(saved, run, monkeypatch):
    """Runs the command on the saved files; its exit code, output and own errors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(saved)

    def of_eval(*options, model="model", data="query.jsonl"):
        code, out, err = run("eval", "--model", model, "--data", data, *options)
        return code, out, [x for x in err.splitlines() if "mmicl eval:" in x]

    return of_eval


def rows(out):
    return {x["name"]: x for x in json.loads((out / "results.json").read_text())["rows"]}


def answered(out, row):
    return [json.loads(x)["text"] for x in (out / row / "predictions.jsonl").open()]


def test_a_table_of_everything(mmicl_eval, tmp_path):
    options = "--shots 0 2 --demonstrations pool.jsonl --adapter live --adapter fused=aim --adapter-shots 0 2"
    options += " --adapter learned"
    options = [*options.split(), "--batch-size", "3", "--seed", "3", "--out", tmp_path]
    code, output, errors = mmicl_eval(*options, "--max-new-tokens", "3")
    assert (code, errors) == (0, []) and output == (tmp_path / "table.md").read_text()
    assert list(rows(tmp_path)) == [
        *("zero-shot", "2-shot", "live", "live, 2-shot", "fused, 2 fused"),
        *("learned", "learned, 2-shot"),
    ]
    model, processor = model_and_processor()
    settings, adapters = Generation(max_new_tokens=3), {x: x for x in ("live", "learned")} | {"fused": "aim"}
    expected = mk.evaluate(
        model, processor, "query.jsonl", adapters=adapters, shots=(0, 2), seed=3,
        adapter_shots=(0, 2), demonstrations="pool.jsonl", generation=settings, batch_size=3, progress=False,
    )  # fmt: skip
    for row in expected.rows:
        assert tuple(postprocess(answered(tmp_path, row.system.folder), ("\n",))) == row.texts
        assert rows(tmp_path)[row.name]["score"] == row.score.value
    again = mmicl_eval(*options, "--max-new-tokens", "3")
    assert again == (0, output, [])
    code, output, errors = mmicl_eval(*options, "--max-new-tokens", "4")
    assert (code, output, len(errors)) == (1, "", 1) and "generation is {'max_new_tokens': 4" in errors[0]


def test_prompts_and_generation(mmicl_eval, saved, tmp_path):
    template = "{image}q: {text} a: {answer}"
    options = ["--template", template, "--instruction", "do it. ", "--preset", "mimic-vqa", "--stop", "a"]
    assert mmicl_eval(*options, "--max-new-tokens", "7", "--limit", "3", "--out", tmp_path)[0] == 0
    model, processor = model_and_processor()
    builder = mk.PromptBuilder(processor, template, instruction="do it. ")
    beams = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 7}
    expected = [
        said(model, builder, x.demonstration(), **beams) for x in mk.Records(saved / "query.jsonl")[:3]
    ]
    assert answered(tmp_path, "zero-shot") == expected
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["prompt"]["template"] == template and results["records"] == 3
    assert results["settings"]["generation"]["cut"] == ["a"]


def test_a_bank_of_mmicl_bank_build(mmicl_eval, saved, tmp_path):
    bank = tmp_path / "bank"
    arguments = ["--model", "model", "--adapter", "aim", "--data", "pool.jsonl", "--dtype", "float32"]
    assert main(["bank", "build", str(bank), *arguments]) == 0
    options = ["--adapter", "aim", "--shots", "2", "--demonstrations", "pool.jsonl"]
    assert mmicl_eval(*options, "--bank", bank, "--out", tmp_path / "a")[0] == 0
    assert mmicl_eval(*options, "--out", tmp_path / "b")[0] == 0
    assert answered(tmp_path / "a", "aim-2-fused") == answered(tmp_path / "b", "aim-2-fused")
    assert len(mk.DemonstrationBank(bank)) == 4
    code, _, errors = mmicl_eval(*options, "--bank", bank, "--template", "{image}{text}{answer}")
    assert code == 1 and "prompts are made by" in errors[0]


def test_retrieval(mmicl_eval, tmp_path):
    features = {"demonstrations": torch.eye(4), "queries": torch.eye(4) + torch.eye(4).roll(1, 1) / 2}
    save_file(features, tmp_path / "f.safetensors")
    options = ["--shots", "2", "--demonstrations", "pool.jsonl", "--retrieval", "rices", "--out", tmp_path]
    assert mmicl_eval(*options, "--features", tmp_path / "f.safetensors")[0] == 0
    lines = [json.loads(x)["demonstrations"] for x in (tmp_path / "2-shot" / "predictions.jsonl").open()]
    assert lines == [[f"id p{(i + 1) % 4}", f"id p{i}"] for i in range(4)]


@pytest.mark.slow
def test_killed_and_run_again(mmicl_eval, saved, tmp_path):
    """As a program, killed when the first answers are on the disk."""
    options = ["--shots", "0", "2", "--demonstrations", "pool.jsonl", "--batch-size", "1"]
    options += ["--max-new-tokens", "2", "--out"]
    given = ["--model", "model", "--data", "query.jsonl", *options, tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(mk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "out" / "zero-shot" / "predictions.jsonl"
    command = [sys.executable, "-m", "mmicl_kernels.cli", "eval", *given]
    with subprocess.Popen(command, cwd=saved, env=environment) as process:
        while process.poll() is None and not (file.exists() and b"\n" in file.read_bytes()):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    known = file.read_bytes()
    known = known[: known.rfind(b"\n") + 1]
    for out in ("out", "other"):
        assert mmicl_eval(*options, tmp_path / out)[0] == 0
    assert file.read_bytes().startswith(known)
    for row in ("zero-shot", "2-shot"):
        assert answered(tmp_path / "out", row) == answered(tmp_path / "other", row)


@pytest.mark.parametrize(
    "options, given, message",
    [
        ([], {"model": "none"}, "none does not exist, expected a folder or a name on the hub"),
        ([], {"data": "none.jsonl"}, "--data: none.jsonl does not exist"),
        (["--images", "none"], {}, "--images: none does not exist"),
        (["--demonstrations", "none"], {}, "--demonstrations: none does not exist"),
        (["--adapter", "none"], {}, "--adapter: none does not exist, expected a folder, or NAME=FOLDER"),
        (["--adapter", "a=none"], {}, "--adapter: none does not exist"),
        (["--adapter", "live", "--adapter", "live=aim"], {}, "--adapter: live is there twice"),
        (["--bank", "aim"], {}, "bank is given, expected an AIM adapter"),
        (["--instruction", "do"], {}, "is given without --template"),
        (["--template", "{text}"], {}, "template is '{text}'"),
        (["--preset", "fast"], {}, "--preset is 'fast', expected one of vqa, okvqa"),
        (["--beams", "0"], {}, "num_beams is 0, expected an int of at least 1"),
        (["--shots", "2"], {}, "demonstrations is None"),
        (["--shots", "9", "--demonstrations", "pool.jsonl"], {}, "the pool has 4 examples"),
        (["--metric", "vqa"], {}, "query.jsonl:1: answers is missing"),
        (["--retrieval", "rices", "--clip", "none"], {}, "clip: none does not exist"),
        (["--adapter", "model"], {}, "model"),
    ],
)
def test_errors_are_one_line(mmicl_eval, options, given, message):
    code, output, errors = mmicl_eval(*options, **given)
    assert (code, output, len(errors)) == (1, "", 1) and message in errors[0]


def test_bad_lines(mmicl_eval, saved, tmp_path):
    """They are refused, or left out of what is asked and of what is drawn from, and counted."""
    good = (saved / "query.jsonl").read_text()
    (tmp_path / "some.jsonl").write_text(good + '{"image": [], "text": 3, "answer": "red"}\n')
    options = ["--images", saved, "--shots", "0", "1", "--demonstrations", tmp_path / "some.jsonl"]
    options += ["--demonstration-images", saved]
    code, _, (error,) = mmicl_eval(*options, data=tmp_path / "some.jsonl")
    assert code == 1 and "bad field: text is 3, expected a string" in error
    out = tmp_path / "out"
    code, _, errors = mmicl_eval(*options, "--skip-bad", "--out", out, data=tmp_path / "some.jsonl")
    assert code == 0 and errors == [f"mmicl eval: {tmp_path / 'some.jsonl'}: left out 1 bad lines"] * 2
    assert len(answered(out, "1-shot")) == len(good.splitlines())
