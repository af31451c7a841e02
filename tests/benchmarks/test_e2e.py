"""The end-to-end benchmark: real sizes, right decoders, whole runs of a tiny model, failures recorded."""

import copy
import json
import math
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from torch._dynamo.utils import counters

from benchmarks.e2e import check as e2e_check
from benchmarks.e2e import report as e2e_report
from benchmarks.e2e import run as e2e
from benchmarks.e2e import shots
from benchmarks.e2e.decoding import NEW_TOKENS, Beams, Compiled, Eager, Graph, Stopwatch
from benchmarks.e2e.models import SIZES, Prompt, Subject, build_model, prompt_inputs, random_adapter
from mmicl_kernels.testing.budgets import assert_within_budget

ROOT = Path(__file__).parents[2]
TINY = SIZES["tiny"]
ZERO = Prompt(0, TINY.lengths[0])
CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def model():
    return build_model(TINY, **CPU)


@pytest.fixture
def subject(model):
    with Subject(model, random_adapter(model, keys=ZERO.tokens), {"ours": "auto"}) as subject:
        yield subject


@pytest.fixture
def wide(model):
    """The same in fp64."""
    model = copy.deepcopy(model).double()
    with Subject(model, random_adapter(model, keys=ZERO.tokens).double(), {"ours": "auto"}) as subject:
        yield subject


@pytest.fixture
def few_blocks(monkeypatch):
    """A plan of the two cheapest blocks, and few rounds."""
    plan = e2e.plan
    monkeypatch.setattr(e2e, "MIN_ROUNDS", 2)

    def cheap(size, ours):
        blocks = {block.name: block for block in plan(size, ours)}
        return [blocks[f"eager, {ZERO.tokens} tokens"], blocks[f"graph, {ZERO.tokens} tokens"]]

    monkeypatch.setattr(e2e, "plan", cheap)


def run(tmp_path, *arguments):
    path = tmp_path / "e2e.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--json", str(path), "--seconds", "0", *arguments]
    return e2e.main(arguments), json.loads(path.read_text())


def test_real_size():
    size = SIZES["real"]
    model = build_model(size, device="meta", dtype=torch.bfloat16)
    parts = {
        name: sum(x.numel() for x in part.parameters())
        for name, part in {**dict(model.model.named_children()), "lm_head": model.lm_head}.items()
    }
    # By hand, from the published sizes: Mistral-7B with 32,003 tokens, SigLIP-SO400M, a perceiver.
    C, intermediate, latents = 4096, 14336, 64
    layer = C * (2 * 4096 + 2 * 1024) + 3 * C * intermediate + 2 * C
    text = 32 * layer + 32003 * C + C
    vision_layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    vision = 27 * vision_layer + (3 * 14 * 14 + 1) * 1152 + 70 * 70 * 1152 + 2 * 1152
    projection = 2 * 1152 * intermediate + intermediate * C
    heads = C * 16 * 96 * 2 + C * 4 * 96 * 2
    perceiver = 3 * (heads + 3 * C * 4 * C + 3 * C) + latents * C + C
    assert parts == {
        "vision_model": vision,
        "connector": projection + perceiver,
        "text_model": text,
        "lm_head": 32003 * C,
    }
    assert sum(parts.values()) == 8_402_768_112
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert size.lengths == {0: 128, 8: 1026, 16: 1922, 32: 3717}
    text_config = model.config.get_text_config()
    assert (text_config.num_attention_heads, text_config.num_key_value_heads) == (32, 8)


def test_prompts():
    inputs = prompt_inputs(TINY, Prompt(8, TINY.lengths[8], images=9), **CPU)
    ids = inputs["input_ids"]
    assert ids.shape == (1, TINY.lengths[8])
    assert (ids == TINY.image_token_id).sum() == 9 * TINY.perceiver["resampler_n_latents"]
    assert inputs["pixel_values"].shape == (1, 9, 3, *TINY.image)
    text = prompt_inputs(TINY, ZERO, **CPU)
    assert text.keys() == {"input_ids"} and not (text["input_ids"] == TINY.image_token_id).any()
    with pytest.raises(ValueError, match="more than 2 tokens for each image"):
        prompt_inputs(TINY, Prompt(0, 12, images=6), **CPU)
    for size in SIZES.values():  # every prompt of the plan leaves room for its images
        latents = size.perceiver["resampler_n_latents"]
        assert all(tokens // (shots + 1) > latents for shots, tokens in size.lengths.items())
        assert max(size.lengths.values()) + NEW_TOKENS <= size.text["max_position_embeddings"]


def test_the_plan_begins_with_what_matters():
    blocks = e2e.plan(SIZES["real"], ["ours", "ours triton"])
    names = [block.name for block in blocks]
    assert names[:4] == [
        "eager, 128 tokens", "graph, 128 tokens", "compiled, 128 tokens", "demonstrations",
    ]  # fmt: skip
    assert len(set(names)) == len(names) == 17
    assert [entry.variant for entry in blocks[0].entries] == ["plain", "ours", "ours triton", "published"]
    shown = [(entry.variant, entry.prompt.shots, entry.prompt.images) for entry in blocks[3].entries]
    assert shown == [("ours", 0, 0), ("plain", 8, 0), ("plain", 16, 0), ("plain", 32, 0)]
    shown = [(entry.variant, entry.prompt.shots, entry.prompt.images) for entry in blocks[5].entries]
    assert shown == [("ours", 0, 1), ("plain", 8, 9), ("plain", 16, 17), ("plain", 32, 33)]


def whole_logits(subject, inputs, tokens):
    """Without any cache: what decoding one token after the other must come to."""
    inputs = {key: x.to(subject.model.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    with torch.no_grad():
        return subject.model(**{**inputs, "input_ids": ids}).logits[:, -tokens.shape[1] - 1 :]


def assert_decodes(variant, decoder, subject, wide):
    """Token after token the decoder is about as near to fp64 as a whole forward in its dtype is."""
    tokens = decoder.inputs["input_ids"][:, -4:]  # no image among them
    logits = {}
    for other in (variant, *({"plain", "ours"} - {variant})):
        wide.use(other)
        logits[other] = whole_logits(wide, decoder.inputs, tokens)
    subject.use(variant)
    low = whole_logits(subject, decoder.inputs, tokens)
    assert_within_budget(variant, decoder.forced_logits(tokens), low, logits[variant])
    assert e2e_check.relative_error(logits["ours"], logits["plain"]) > 0.1


@pytest.mark.parametrize("decoder_class", [Eager, Graph])
@pytest.mark.parametrize("variant", ["plain", "ours"])
def test_a_decoder_computes_what_a_whole_forward_does(subject, wide, variant, decoder_class):
    subject.use(variant)
    decoder = decoder_class(subject.model, prompt_inputs(TINY, ZERO, **CPU))
    decoder.sample(Stopwatch("cpu"))  # an answer before must leave nothing behind
    assert_decodes(variant, decoder, subject, wide)


def test_images_are_read(subject, wide):
    inputs = prompt_inputs(TINY, Prompt(0, TINY.lengths[0], images=1), **CPU)
    decoder = Eager(subject.model, inputs)
    assert_decodes("ours", decoder, subject, wide)
    other = Eager(subject.model, {**inputs, "pixel_values": -inputs["pixel_values"]})
    tokens = inputs["input_ids"][:, -2:]
    assert not torch.equal(other.forced_logits(tokens), decoder.forced_logits(tokens))


def test_a_graph_is_captured_where_the_answer_stands(subject, wide, monkeypatch):
    """The CUDA path, with a stand-in for the capture that runs the step at every replay."""
    fake_cuda(monkeypatch)
    decoder = Graph(subject.model, prompt_inputs(TINY, ZERO, **CPU))
    monkeypatch.setattr(decoder, "_prepare", lambda token: Graph._prepare(decoder, OnCuda(token)))
    assert_decodes("ours", decoder, subject, wide)


def test_compiled_variants_are_right_and_change_without_recompilation(subject, wide):
    torch._dynamo.reset()
    counters.clear()
    inputs = prompt_inputs(TINY, ZERO, **CPU)
    decoders = {variant: Compiled(subject.model, inputs) for variant in ("plain", "ours")}
    for variant, decoder in [*decoders.items(), *decoders.items()]:
        assert_decodes(variant, decoder, subject, wide)
    assert counters["stats"]["unique_graphs"] == len(decoders)
    assert sum(counters["graph_break"].values()) == 0


def test_a_subject_leaves_no_trace(model):
    inputs = prompt_inputs(TINY, ZERO, **CPU)
    plain = model(**inputs).logits
    impls = {"ours": "auto", "exact": "reference", "not on CPU": "cuda"}
    with Subject(model, random_adapter(model, keys=12), impls) as subject:
        logits = {}
        subject.use("not on CPU")
        with pytest.raises((NotImplementedError, RuntimeError, ValueError), match="cuda"):
            model(**inputs)
        for variant in ("published", "ours", "exact", "plain"):
            subject.use(variant)
            logits[variant] = model(**inputs).logits
        with pytest.raises(KeyError):
            subject.use("theirs")
        subject.use("ours")
    assert torch.equal(logits["plain"], plain) and torch.equal(model(**inputs).logits, plain)
    assert not any(torch.equal(logits[variant], plain) for variant in ("published", "ours", "exact"))


def test_a_wrong_variant_is_caught(model):
    low = build_model(TINY, device="cpu", dtype=torch.bfloat16)
    checks = e2e_check.make_checks(low, TINY, {"ours": "auto"}, device="cpu")
    (verdict,) = checks.verdicts
    assert verdict["right"] and verdict["against"] == "published"
    assert 0 < verdict["error"] <= checks.budget < checks.effect
    inputs = prompt_inputs(TINY, ZERO, device="cpu", dtype=torch.bfloat16)
    adapter = random_adapter(low, keys=ZERO.tokens)
    with Subject(low, adapter, {"ours": "auto"}) as subject:
        subject.use("ours")
        assert checks.judge("ours", Eager(low, inputs))
        adapter.layers["1"].shift.data[0].mul_(1.5)  # one head of one layer
        assert not checks.judge("ours", Eager(low, inputs))
        adapter.layers["1"].shift.data[0] = math.nan
        assert not checks.judge("ours", Eager(low, inputs))


def test_a_run(few_blocks, tmp_path, capsys):
    status, result = run(tmp_path)
    assert status == 0
    assert (result["schema"], result["benchmark"], result["dtype"]) == (1, "e2e", "bfloat16")
    assert result["machine"]["torch"] == torch.__version__ and "transformers" in result["machine"]
    assert result["model_bytes"] == 2 * result["parameters"] > 0
    assert result["left_out"] == [] and result["new_tokens"] == NEW_TOKENS
    keys = [(row["mode"], row["variant"]) for row in result["rows"]]
    assert keys == [(mode, v) for mode in ("eager", "graph") for v in ("plain", "ours", "published")]
    for row in result["rows"]:
        assert row["error"] is None and row["rounds"] == e2e.MIN_ROUNDS and row["peak_bytes"] > 0
        for name in ("first_token", "token"):
            assert 0 < row[f"{name}_q10_ms"] <= row[f"{name}_ms"] <= row[f"{name}_q90_ms"]
    # The published gate counts the empty rows of a static cache: wrong logits, and so no ratio.
    right = {key: row["right"] for key, row in zip(keys, result["rows"], strict=True)}
    assert [key for key in keys if not right[key]] == [("graph", "published")]
    for key, row in zip(keys, result["rows"], strict=True):
        assert (row["ratio"] is not None) == right[key]
    assert result["rows"][0]["ratio"] == {"variant": "plain", "shots": 0, "first_token": 1.0, "token": 1.0}
    assert (tmp_path / "e2e.png").read_bytes()[:4] == b"\x89PNG"
    assert "wrong logits" in capsys.readouterr().out


def test_no_time_left(few_blocks, tmp_path):
    status, result = run(tmp_path, "--budget", "0")
    assert status == 0 and result["rows"] == []
    assert result["left_out"] == [f"{mode}, {ZERO.tokens} tokens" for mode in ("eager", "graph")]


def test_compilation_is_not_begun_where_it_cannot_end():
    session = e2e.Session(SIZES["real"], "cuda", None, None, 1.0, time.monotonic() + 100.0, {}, Path())
    blocks = {block.name: block for block in e2e.plan(SIZES["real"], ["ours"])}
    assert session.has_time_for(blocks["eager, 128 tokens"])
    assert not session.has_time_for(blocks["compiled, 128 tokens"])


def test_a_failure_of_ours_is_recorded_and_the_run_goes_on(few_blocks, tmp_path, monkeypatch):
    begin = Graph.begin

    def out_of_memory(decoder):
        if hasattr(decoder.model.model.text_model.layers[0].self_attn, "mmicl_layer"):
            raise torch.OutOfMemoryError("no room")
        begin(decoder)

    monkeypatch.setattr(Graph, "begin", out_of_memory)
    status, result = run(tmp_path)
    assert status == 1
    rows = {(row["mode"], row["variant"]): row for row in result["rows"]}
    assert rows["graph", "ours"]["error"] == "OutOfMemoryError: no room"
    assert rows["graph", "ours"]["ratio"] is None and "token_ms" not in rows["graph", "ours"]
    assert rows["graph", "plain"]["error"] is None and rows["graph", "plain"]["ratio"]["token"] == 1.0
    assert rows["eager", "ours"]["ratio"] is not None


def test_a_failure_while_timing_is_recorded(few_blocks, tmp_path, monkeypatch):
    sample, calls = Eager.sample, []

    def third_of_published(decoder, stopwatch):
        config = decoder.model.model.text_model.layers[0].self_attn.config
        calls.append(hasattr(config, "mimic_published"))
        if sum(calls) == 4 and calls[-1]:
            raise RuntimeError("lost")
        return sample(decoder, stopwatch)

    monkeypatch.setattr(Eager, "sample", third_of_published)
    status, result = run(tmp_path)
    assert status == 0  # not an error of ours
    errors = {(row["mode"], row["variant"]): row["error"] for row in result["rows"] if row["error"]}
    assert errors == {("eager", "published"): "RuntimeError: lost"}
    assert result["rows"][1]["rounds"] == e2e.MIN_ROUNDS


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    status, result = run(tmp_path)
    assert status == 0 and len(result["rows"]) == 44
    assert {row["mode"] for row in result["rows"]} == {"eager", "graph", "compiled", "beams"}
    assert {row["variant"] for row in result["rows"] if not row["right"]} == {"published"}
    assert all(row["error"] is None for row in result["rows"])


def test_beams_time_the_first_token_apart(subject, monkeypatch):
    asked = []
    monkeypatch.setattr(subject.model, "generate", lambda **options: asked.append(options))
    times = iter((3.0, 3.0 + 2.0 * (NEW_TOKENS - 1)))
    stopwatch = Stopwatch("cpu")
    monkeypatch.setattr(stopwatch, "stop", lambda: next(times))
    assert Beams(subject.model, {}).sample(stopwatch) == (3.0, 2.0)
    assert [options["max_new_tokens"] for options in asked] == [1, NEW_TOKENS]
    assert all(options["num_beams"] == 3 for options in asked)


def row(variant, shots, first, **more):
    return {
        "block": "b", "variant": variant, "mode": "eager", "shots": shots, "tokens": 128, "images": 0,
        "right": True, "error": None, "ratio": None, "rounds": 5, "peak_bytes": 2**29,
        "first_token_ms": first, "token_ms": 1.5, **more,
    }  # fmt: skip


def test_report(tmp_path):
    ratio = {"variant": "ours", "shots": 0, "first_token": 50.0, "token": 1.25}
    rows = [
        row("ours", 0, 2.0),
        row("plain", 8, 100.0, ratio=ratio),
        row("plain", 16, 0.0, error="Oops: x\ny"),
    ]
    rows[2].pop("token_ms")
    machine = {"gpu": "G", "torch": "2", "transformers": "5", "commit": "c", "date": "d"}
    result = {
        "machine": {"cpu": "C", **machine}, "parameters": 10**9, "model_bytes": 2**30, "dtype": "bfloat16",
        "new_tokens": 20, "command": "m", "left_out": ["beams"], "rows": rows,
    }  # fmt: skip
    readme, path = tmp_path / "README.md", tmp_path / "e2e.json"
    readme.write_text("before\n<!-- table: e2e -->\n<!-- end -->\n")
    path.write_text(json.dumps(result))
    plot = tmp_path / "plots" / "e2e.png"
    assert e2e_report.main([str(path), "--readme", str(readme), "--plot", str(plot)]) == 0
    lines = readme.read_text().splitlines()
    assert lines[4] == "| eager | 128 tokens | ours | 2.00 | 1.500 | 1.50 |  |  |  |"
    assert (
        lines[5] == "| eager | 128 tokens, 8 shots | plain | 100.00 | 1.500 | 1.50 | ours | 50.000 | 1.250 |"
    )
    assert lines[6] == "| eager | 128 tokens, 16 shots | plain | Oops: x |  |  |  |  |  |"
    assert "left out: beams" in lines[8]
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("stage", ["test", "ops", "e2e"])
def test_make_gpu(stage, tmp_path):
    command = ["make", "-n", "gpu", f"STAGE={stage}", f"OUT={tmp_path}/out"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = re.findall(r"python3 -m (\S+)", printed)
    expected = {
        "test": ["pytest"] * 2,
        "ops": ["benchmarks.run"],
        "e2e": ["benchmarks.e2e.shots", "benchmarks.e2e.run"],
    }
    assert modules == expected[stage]
    limits = [int(limit) for limit in re.findall(r"timeout \S+ \S+ (\d+) ", printed)]
    graces = [int(grace) for grace in re.findall(r"--kill-after=(\d+)", printed)]
    assert len(limits) == len(modules) and sum(limits) + sum(graces) <= 540
    assert printed.count(f"{tmp_path}/out") >= 1
    assert ".venv" not in printed and "pip install" not in printed
    if stage == "test":
        assert printed.index("tests/ops/test_stock_attention.py") < printed.index("--ignore")
    else:
        budgets = [int(budget) for budget in re.findall(r"--budget (\d+)", printed)]
        assert len(budgets) == 1 and budgets[0] < limits[-1]


class OnCuda:
    """A CPU tensor that says it is elsewhere."""

    def __init__(self, tensor):
        self._tensor, self.device = tensor, torch.device("cuda")

    def clone(self):
        return self._tensor.clone()


def fake_cuda(monkeypatch):
    """Streams that do nothing, and a graph whose capture advances nothing and whose replay runs the step."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Scope:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    captured = {}

    class CUDAGraph:
        def replay(self):
            captured["logits"].copy_(captured["step"]())

    class Capture(Scope):
        """Remembers the forward within the block, and undoes what it did to the cache."""

        def __enter__(self):
            forward = Graph._forward

            def recorded(decoder, *arguments):
                captured["step"] = lambda: forward(decoder, *arguments)
                captured["logits"] = captured["step"]()
                for layer in decoder._cache.layers:
                    layer.cumulative_length -= 1
                return captured["logits"]

            self._patch = pytest.MonkeyPatch()
            self._patch.setattr(Graph, "_forward", recorded)

        def __exit__(self, *_):
            self._patch.undo()
            return False

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Scope)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)


def test_demonstrations_as_prompts_and_as_fused_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(shots, "SHOTS", (0, 2))
    monkeypatch.setattr(shots, "ROUNDS", 2)
    assert shots.main(["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("shots.json")
    assert path.with_suffix(".png").stat().st_size > 0
    result = json.loads(path.read_text())
    tokens = {(row["name"], row["shots"]): row["tokens"] for row in result["rows"]}
    # An image has two latents and comes with two tokens of text; every prompt has one token before it.
    assert tokens == {("plain", 0): 5, ("AIM", 0): 5, ("plain", 2): 13, ("AIM", 2): 9}
    peaks = {(row["name"], row["shots"]): row["peak_bytes"] for row in result["rows"]}
    assert peaks["AIM", 0] < peaks["AIM", 2] < peaks["plain", 2]
