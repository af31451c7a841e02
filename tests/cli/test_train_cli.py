"""`mmicl train`: the adapter of mk.train, a dry run that changes nothing, killed and resumed, its errors."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.cli import main
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training.recipes import Recipe
from tests.support.records_of_colours import COLOURS, write_records
from tests.support.same_adapter import assert_same

pytest.importorskip("accelerate")
SHORT = ["--method", "live", "--shots", "2", "--steps", "4", "--accumulate", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_model("llava-llama").save_pretrained(folder)
    tiny_processor("llava", chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path)


@pytest.fixture
def run(saved, records, capfd):
    """Runs the command; its exit code, output and own errors."""

    def run(*options, data=records, model=saved):
        capfd.readouterr()
        code = main(["train", "--model", str(model), "--data", str(data), *map(str, options)])
        out, err = capfd.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("mmicl train:")]

    return run


def test_it_is_the_adapter_of_mk_train(run, saved, records, tmp_path):
    code, out, errors = run(
        "--out", tmp_path / "out", *SHORT, "--lr", "0.02", "--instruction", "Say it.",
        "--config", "ce_weight=0.25", "--set", "weight_decay=0.5", "--set", "lr_scheduler_type=linear",
    )  # fmt: skip
    assert (code, errors) == (0, [])
    model, processor = tiny_again(), tiny_processor("llava", chat=True)
    expected = mk.train(
        model, mk.PromptBuilder(processor, "chat", instruction="Say it."), records,
        mk.LIVEConfig(ce_weight=0.25), seed=3, progress=False,
        recipe=Recipe(steps=4, accumulate=1, shots=2, learning_rate=0.02, batch_size=8),
        arguments={"weight_decay": 0.5, "lr_scheduler_type": "linear"},
    )  # fmt: skip
    assert_same(mk.load(tmp_path / "out", model), expected)
    assert f"{tmp_path / 'out'}: LIVEAdapter, {expected.num_parameters()} parameters" in out
    described = json.loads((tmp_path / "out" / "training.json").read_text())
    assert described["prompt"] == {"template": "chat", "instruction": "Say it.", "image_marker": None}


def test_a_method_without_a_teacher(run, records, tmp_path):
    """By its recipe no demonstrations are read."""
    options = ["--method", "prompt_tuning", "--steps", "2", "--seed", "3", "--config", "num_tokens=3"]
    code, out, errors = run("--out", tmp_path / "out", *options, "--config", "std=0.5")
    assert (code, errors) == (0, []) and f"PromptTuningAdapter, {3 * 32} parameters" in out
    expected = mk.train(
        tiny_again(), tiny_processor("llava", chat=True), records, mk.PromptTuningConfig(3, 0.5),
        seed=3, progress=False, recipe=Recipe(steps=2, shots=0),
    )  # fmt: skip
    assert_same(mk.load(tmp_path / "out", tiny_again()), expected)
    code, out, errors = run(*options, "--dry-run")
    assert (code, errors) == (0, [])
    student, teacher = re.findall(r"^(?:student|teacher):\n(.*?)\n\n", out, re.DOTALL | re.MULTILINE)
    assert student == teacher and "adapter        96 parameters" in out


def tiny_again():
    torch.manual_seed(0)
    return tiny_model("llava-llama")


def test_dry_run(run, tmp_path):
    """The prompts as read, with what is aligned in brackets, their tokens, the cost; nothing is written."""
    code, out, errors = run("--out", tmp_path / "out", *SHORT, "--dry-run", "--batch-size", "2")
    assert (code, errors) == (0, []) and not (tmp_path / "out").exists()
    student, teacher = re.findall(r"^(?:student|teacher):\n(.*?)\n\n", out, re.DOTALL | re.MULTILINE)
    query = re.search(r"\[\[(.*)\]\]", student, re.DOTALL)[1]
    assert "<image> x 4" in query and "what?" in query and "red" in query
    assert teacher.endswith(f"[[{query}]]") and teacher.count("<image> x 4") == 3
    table = dict(re.findall(r"^(student|teacher|answer) +(.*)$", out, re.MULTILINE))
    tokens = {name: [int(x) for x in re.findall(r"\d+", row)] for name, row in table.items()}
    # Both queries have one image of four tokens and two more in the teacher's demonstrations.
    assert tokens["student"][2:] and tokens["teacher"][-3:-1] != tokens["student"][-3:-1]
    assert re.search(r"updates +4 of 2 x 1 queries", out)
    adapter = mk.create(tiny_again(), mk.LIVEConfig())
    assert f"adapter        {adapter.num_parameters()} parameters" in out
    assert re.search(r"time +\d+\.\d\d s a batch", out)


def test_dry_run_of_other_arguments(run):
    options = ["--set", "max_steps=7", "--set", "per_device_train_batch_size=3", "--bf16", "--checkpointing"]
    code, out, errors = run(*SHORT, "--dry-run", *options)
    assert (code, errors) == (0, []) and re.search(r"updates +7 of 3 x 1 queries", out)


def test_dry_run_of_shared_shots(run):
    """What stands before all queries is shown once, and the teacher's prompts are the queries."""
    options = ("--dry-run", "--batch-size", "2", "--template", "{image}{text} {answer}\n", "--shared-shots")
    code, out, errors = run(*SHORT, *options)
    assert (code, errors) == (0, [])
    shared, teacher = re.findall(
        r"^(?:shared by teachers|teacher):\n(.*?)\n\n", out, re.DOTALL | re.MULTILINE
    )
    assert shared.startswith("<s>") and shared.count("<image> x 4") == 2 and "[[" not in shared
    assert re.fullmatch(r"\[\[<image> x 4 \nwhat\? red</s>\]\]", teacher)
    table = dict(re.findall(r"^(shared by teachers|teacher) +\d.*? (\d+) +\S.*$", out, re.MULTILINE))
    assert table.keys() == {"shared by teachers", "teacher"}


def test_dry_run_of_aim(run):
    code, out, errors = run("--method", "aim", "--shots", "2-2", "--dry-run")
    assert (code, errors) == (0, [])
    demonstration, query = re.findall(r"^(?:demonstration|query):\n(.*?)\n\n", out, re.DOTALL | re.MULTILINE)
    fused = re.search(r"\[\[(.*?)\]\]", demonstration, re.DOTALL)[1]
    assert "what?" in fused and "<image>" not in fused
    assert "red" in re.search(r"\[\[(.*?)\]\]", query, re.DOTALL)[1]


@pytest.mark.parametrize("positions, end", [("answer", ""), ("answer_end", " ")])
def test_dry_run_of_aim_on_answers(run, positions, end):
    options = ["--method", "aim", "--shots", "2-2", "--dry-run", "--config", f"positions={positions}"]
    code, out, errors = run(*options)
    assert (code, errors) == (0, [])
    demonstration = re.search(r"^demonstration:\n(.*?)\n\n", out, re.DOTALL | re.MULTILINE)[1]
    fused = re.search(r"\[\[(.*?)\]\]", demonstration, re.DOTALL)[1]
    assert fused in [f" {answer}{end}" for answer in COLOURS]  # the template ends turns with a space
    code, out, errors = run(*options, "--template", "{image}{text} {answer}")
    assert (code, len(errors)) == ((1, 1) if end else (0, 0))
    assert not end or "positions is 'answer_end' and template is '{image}{text} {answer}'" in errors[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--method is None, expected one of mimic, m2iv, live, aim"),
        (["--recipe", "mimics"], "--method is None, expected one of mimic, m2iv, live, aim"),
        (["--recipe", "mimic-fast"], "--recipe is 'mimic-fast', expected one of mimic, live"),
        (["--method", "live"], "--out is missing, expected a folder, or --dry-run"),
        ([*SHORT, "--shots", "²", "--dry-run"], "--shots is '²', expected a number, or LOW-HIGH"),
        (["--method", "mimic", "--recipe", "live"], "--recipe is 'live', expected one of mimic's"),
        ([*SHORT, "--dtype", "bf16", "--dry-run"], "dtype is 'bf16', expected 'auto'"),
        ([*SHORT, "--seed", "-1", "--dry-run"], "seed is -1, expected 0 to 2^32 - 1"),
        ([*SHORT, "--set", "output_dir=x", "--dry-run"], "arguments has ['output_dir'], expected fields"),
        ([*SHORT, "--bf16", "--fp16", "--dry-run"], "fp16 and bf16 can be True, but not both"),
        ([*SHORT, "--set", "report_to=no_such_logger", "--out", "unused"], "no_such_logger"),
        (["--method", "mimic", "--checkpointing", "--dry-run"], "gradient checkpointing is on"),
        ([*SHORT, "--shots", "two"], "--shots is 'two', expected a number, or LOW-HIGH"),
        ([*SHORT, "--shots", "1-2", "--dry-run"], "shots is (1, 2), expected a number for method 'live'"),
        ([*SHORT, "--config", "ce_weight"], "--config is 'ce_weight', expected NAME=VALUE"),
        ([*SHORT, "--config", "rank=3"], "--config is 'rank=3', expected one of ce_weight, kl_weight"),
        ([*SHORT, "--config", "ce_weight=big"], "--config ce_weight is 'big', expected float"),
        ([*SHORT, "--set", "lr=3"], "--set is 'lr=3', expected one of "),
        ([*SHORT, "--set", "logging_steps=often"], "--set: argument --logging_steps"),
        ([*SHORT, "--template", "{text}", "--dry-run"], "template"),
        ([*SHORT, "--steps", "0", "--dry-run"], "steps is 0, expected at least 1"),
    ],
)
def test_errors(run, options, message):
    code, out, errors = run(*options)
    assert code == 1 and len(errors) == 1 and message in errors[0], errors


def test_bad_files(run, records, tmp_path):
    good = records.read_text()
    records.write_text(good + '{"image": "0.png", "text": 3, "answer": "red"}\n')
    (error,) = run(*SHORT, "--dry-run")[2]
    assert f"{records}:13: bad field: text is 3, expected a string" in error
    with records.open("a") as file:
        file.write('{"image": "0.png", "text": "what?", "answer": ""}\n')
    code, out, errors = run(*SHORT, "--dry-run", "--skip-bad")
    assert code == 0 and errors == [f"mmicl train: {records}: left out 1 bad lines and 1 without an answer"]
    records.write_text(good)
    (error,) = run(*SHORT, "--dry-run", model=tmp_path / "none")[2]
    assert "does not exist, expected a folder or a name on the hub" in error
    (error,) = run(*SHORT, "--dry-run", data=tmp_path / "none.jsonl")[2]
    assert "none.jsonl" in error


@pytest.mark.slow
def test_killed_and_resumed(saved, records, tmp_path):
    """With -9, at whatever it is doing: the adapter is bit for bit that of a run in one go."""
    command = [
        sys.executable, "-m", "mmicl_kernels.cli", "train", "--model", saved, "--data", records,
        "--method", "mimic", "--shots", "2", "--steps", "60", "--validation", records, "--resume",
        "--set", "save_steps=3", "--set", "eval_steps=3",
    ]  # fmt: skip
    whole = subprocess.run([*map(str, command), "--out", str(tmp_path / "whole")], capture_output=True)
    assert whole.returncode == 0, whole.stderr.decode()
    killed = tmp_path / "killed"
    kills = 0
    for wanted in (3, 12, 30):  # killed as soon as so many updates are in a checkpoint
        process = subprocess.Popen([*map(str, command), "--out", str(killed)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (killed / f"checkpoint-{wanted}").exists():
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 3
    last = subprocess.run([*map(str, command), "--out", str(killed)], capture_output=True)
    assert last.returncode == 0, last.stderr.decode()
    for name in ("mmicl_adapter.safetensors", "mmicl_adapter.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
