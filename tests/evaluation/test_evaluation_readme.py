"""The README of evaluation/: its Python and its command run, its tables name what is there."""

import re
import shlex
from pathlib import Path

import torch

import mmicl_kernels as mk
from mmicl_kernels import evaluation
from mmicl_kernels.cli import main
from mmicl_kernels.evaluation import METRICS
from mmicl_kernels.evaluation.generation import GENERATIONS
from tests.support.questions import adapter_of, model_and_processor, rows_of, write

README = Path(evaluation.__file__).with_name("README.md").read_text()
ASKING, SCORES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(COMMAND,) = re.findall(r"^    mmicl (eval .*)$", README, re.MULTILINE)


def test_its_python_and_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, processor = model_and_processor()
    for thing in (model, processor):
        thing.save_pretrained("model")
    adapter_of(model, mk.LIVEConfig()).save_pretrained("adapters/vqa")
    write(tmp_path, "test", rows_of("q", 3))
    write(tmp_path, "train", rows_of("p", 5))
    exec(compile(ASKING, "README", "exec"), {"mk": mk, "model": model, "processor": processor})
    table = (tmp_path / "results" / "table.md").read_text()
    printed = capsys.readouterr().out
    assert printed.startswith(table) and printed.count("\n") == table.count("\n") + 1
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:7]] == ["zero-shot", "4-shot", "vqa"]
    assert main(shlex.split(COMMAND)) == 0  # by the model's folder: the same, so nothing is asked
    assert capsys.readouterr().out == table


def test_its_scores(tmp_path):
    annotators = [["red"] * 10, ["blue"] * 10, ["red"] * 10]
    generated = [["no", "no", "no"], ["red\nand", "blue", "no"], ["red", "green", "no"]]
    exec(compile(SCORES, "README", "exec"), {"generated": generated, "answers": annotators})


def test_its_tables():
    assert all(f"| `{name}` |" in README for name in METRICS)
    mimic = GENERATIONS["mimic-vqa"]
    assert (
        f"{mimic.num_beams} beams, length penalty {mimic.length_penalty:.0f}, {mimic.max_new_tokens} tok"
        in README
    )
