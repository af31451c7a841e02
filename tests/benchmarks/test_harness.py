"""The benchmark harness: peers compute what they claim, memory is counted exactly, red ops get no ratio."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import report, run
from benchmarks.harness import registry, timing
from benchmarks.harness.case import Case
from benchmarks.harness.values import find_fault
from benchmarks.ops.attention_shift import shift_formula
from benchmarks.ops.shifted_attention import plain_attention
from benchmarks.peers import published, published_shifted_attention
from mmicl_kernels.ops import alignment_loss, attention_shift, shifted_attention
from mmicl_kernels.testing.budgets import (
    assert_all_within_budget,
    assert_within_budget,
    eager_shifted_attention,
    gradients,
)
from mmicl_kernels.testing.inputs import (
    attention_shift_inputs,
    normal,
    output_gradients,
    shifted_attention_inputs,
)

ROOT = Path(__file__).parents[2]
RESIDUAL = [name for name in registry.OPS if name.startswith("residual")]
NAMES = ("out", "dq", "dk", "dv", "dweight", "dbias", "dshift")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("G", (2, 4))
def test_published_is_the_op_with_all_keys(G, causal, dtype):
    inputs = shifted_attention_inputs(G=G, dtype=dtype, layout="heads_last")
    dout = output_gradients(*inputs[0].shape, dtype=dtype)[:1]
    options = {"causal": causal, "normalizer": "all_keys"}
    actual = gradients(lambda *x: published_shifted_attention(*x, causal=causal), inputs, dout)
    low = gradients(lambda *x: eager_shifted_attention(*x, **options)[0], inputs, dout)
    exact = gradients(
        lambda *x: shifted_attention(*x, **options, impl="reference"),
        [x.double() for x in inputs],
        [dout[0].double()],
    )
    assert_all_within_budget(NAMES, sum(actual, ()), [sum(low, ())], sum(exact, ()))


@pytest.mark.parametrize("causal", (False, True))
def test_plain_is_the_op_without_a_shift(causal):
    q, k, v, weight, bias, shift = shifted_attention_inputs(dtype=torch.float32)
    unshifted = (weight, bias, torch.zeros_like(shift))
    exact = shifted_attention(*(x.double() for x in (q, k, v, *unshifted)), causal=causal, impl="reference")
    low = eager_shifted_attention(q, k, v, *unshifted, causal=causal)[0]
    assert_within_budget("out", plain_attention(q, k, v, causal=causal), low, exact)


@pytest.mark.parametrize("padding", (None, "right"))
@pytest.mark.parametrize("family", ("idefics", "idefics2", "llava-qwen2", "qwen2_5_vl"))
def test_published_model_is_the_attached_one(family, padding):
    pytest.importorskip("transformers")
    import mmicl_kernels as mk
    from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model

    logits = {}
    for dtype in (torch.float32, torch.float64):
        model = tiny_model(family).to(dtype)
        adapter = mk.create(model, mk.MimICConfig(normalizer="all_keys")).to(dtype)
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                parameter.copy_(normal(*parameter.shape, dtype=torch.float32, seed=index))
            inputs = tiny_inputs(model, padding=padding)
            inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
            plain = model(**inputs).logits
            with published(model, adapter):
                logits["published", dtype] = model(**inputs).logits
            assert torch.equal(model(**inputs).logits, plain)
            with mk.attach(model, adapter):
                logits["attached", dtype] = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    low, exact = (logits["published", dtype][real] for dtype in (torch.float32, torch.float64))
    assert_within_budget("attached", logits["attached", torch.float32][real], low, exact)
    assert_within_budget("attached fp64", logits["attached", torch.float64][real], low, exact)
    assert (exact - plain[real]).norm() > 0.1 * plain[real].norm()


def test_published_wants_sdpa_and_restores_the_model_after_an_error():
    pytest.importorskip("transformers")
    import mmicl_kernels as mk
    from mmicl_kernels.testing.tiny_models import tiny_model

    model = tiny_model("llava-llama", attn_implementation="eager")
    adapter = mk.create(model, mk.MimICConfig())
    with pytest.raises(ValueError, match="'eager', expected 'sdpa'"), published(model, adapter):
        pass
    model = tiny_model("llava-llama")
    attention = model.model.language_model.layers[0].self_attn
    config = attention.config
    with pytest.raises(KeyError), published(model, adapter):
        assert attention.config is not config
        raise KeyError("within")
    assert attention.config is config


def test_peak_allocated_bytes_is_exact():
    def work():
        a = torch.empty(1000)
        del a
        b = torch.empty(500)
        c = torch.empty(2000)
        del b
        return c, torch.empty(100, dtype=torch.bfloat16)

    # 1000 alone is less than 500 and 2000 together; the halves come after b is gone.
    assert timing.peak_allocated_bytes(work) == 4 * (500 + 2000)
    assert timing.peak_allocated_bytes(lambda: None) == 0
    kept, ready = [], []
    assert timing.peak_allocated_bytes(lambda: kept.append(torch.empty(250))) == 1000

    def sets_up():
        if not ready:
            ready.append(torch.empty(999))
        return torch.empty(250)

    assert timing.peak_allocated_bytes(sets_up) == 1000


def test_memory_of_ours_grows_with_T_and_of_published_with_its_square():
    def peak(fn, T):
        inputs = shifted_attention_inputs(1, 2, 2, T, T, 16, layout="heads_last")
        return timing.peak_allocated_bytes(lambda: fn(*inputs, causal=True))

    assert peak(published_shifted_attention, 512) > 3.5 * peak(published_shifted_attention, 256)
    assert peak(shifted_attention, 512) < 2.1 * peak(shifted_attention, 256)


def test_interleaved_samples():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = timing.time_interleaved(functions, device="cpu", seconds=1e-9)
    rounds = 2 + timing.MIN_ROUNDS
    assert [len(samples[name].ms) for name in "abc"] == [timing.MIN_ROUNDS] * 3
    assert all(sorted(calls[3 * i : 3 * i + 3]) == ["a", "b", "c"] for i in range(rounds))
    assert calls[6:12] == ["a", "b", "c", "b", "c", "a"]
    slow, fast = timing.Samples((2.0, 6.0, 40.0)), timing.Samples((1.0, 2.0, 10.0))
    assert (slow.median, slow.ratio(fast), fast.ratio(slow)) == (6.0, 3.0, 1 / 3)
    assert (slow.low, slow.high) == pytest.approx((2.8, 33.2))


@pytest.mark.parametrize("name", RESIDUAL)
def test_work_of_the_residual_ops_is_counted(name):
    """A forward reads and writes what comes in and goes out; dx is dout where the norm is not preserved."""
    spec = registry.OPS[name]
    case = dataclasses.replace(spec.lineups["cpu"].cases[0], backward=True)
    inputs = spec.make_inputs(case, "cpu")
    nbytes = inputs[0].nbytes
    passes, rows = {
        "residual_shift": ((2, 1), 0),
        "residual_shift_preserve_norm": ((2, 3), 0),
        "residual_shift_rms_norm": ((4, 4), 4 * case.B * case.T),
    }[name]
    forward = dataclasses.replace(case, backward=False)
    assert spec.bytes(forward) == passes[0] * nbytes + rows
    assert spec.bytes(case) == sum(passes) * nbytes + 2 * rows
    assert spec.flops(case) == 2 * inputs[0].numel()


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("backward", (False, True))
def test_residual_providers_have_no_fault(name, backward):
    spec, lineup = registry.OPS[name], registry.OPS[name].lineups["cpu"]
    case = Case(B=2, H=2, G=2, T=40, S=40, D=32, dtype="float32", backward=backward)
    inputs = spec.make_inputs(case, "cpu")
    parts = spec.parts(case, inputs)
    assert len(parts) >= (3 if backward else 2)
    for provider in ("formula", *lineup.ours):
        outputs = lineup.providers[provider](case, inputs)()
        assert find_fault(parts, outputs) is None, provider
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        assert find_fault(parts, tuple(1.01 * x for x in outputs)) is not None


@pytest.mark.parametrize("backward", (False, True))
def test_alignment_providers_have_no_fault(backward):
    """Of peers and ours; what is read and written is counted."""
    spec, lineup = registry.OPS["alignment_loss"], registry.OPS["alignment_loss"].lineups["cpu"]
    case = Case(B=2, H=2, G=2, T=40, S=40, D=32, dtype="float32", backward=backward)
    mask, *layers = inputs = spec.make_inputs(case, "cpu")
    states, targets = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    read = 2 * sum(y.nbytes for y in targets)
    assert spec.bytes(case) == read + backward * (read + sum(x.nbytes for x in states))
    assert all(len(y) == mask.sum() for y in targets)
    parts = spec.parts(case, inputs)
    for provider in ("formula", "composed"):
        outputs = lineup.providers[provider](case, inputs)()
        assert find_fault(parts, outputs) is None, provider
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        assert find_fault(parts, tuple(1.01 * x for x in outputs)) is not None
    if not backward:
        mean = lineup.providers["mse"](case, inputs)()
        torch.testing.assert_close(mean, alignment_loss(states, targets, mask, form="mean_square"))


@pytest.mark.parametrize("name", ("shifted_attention", "attention_shift"))
def test_work_is_counted(name):
    spec = registry.OPS[name]
    case = spec.lineups["cpu"].cases[0]
    tensors = spec.make_inputs(case, "cpu")
    forward = dataclasses.replace(case, backward=False)
    parameters = sum(x.nbytes for x in tensors if x.dim() < 4 and x.shape[:1] == (case.H,))
    if name == "attention_shift":
        expected = sum(x.nbytes for x in tensors) - parameters + tensors[0].nbytes
        assert spec.flops(forward) == 4 * tensors[0].numel()
    else:
        lse = case.B * case.H * case.T * 4
        expected = sum(x.nbytes for x in tensors) - parameters + lse
        assert spec.flops(forward) == 2 * case.B * case.H * case.T * case.S * case.D
        both = dataclasses.replace(case, backward=True)
        assert spec.flops(both) == 3.5 * spec.flops(forward)
        assert spec.bytes(both) == 3 * spec.bytes(forward) - lse
    assert spec.bytes(forward) == expected


def test_the_formula_of_the_epilogue_is_the_op():
    inputs = attention_shift_inputs(dtype=torch.float32, layout="heads_last")
    exact = attention_shift(*(x.double() for x in inputs), impl="reference")
    low = attention_shift(*inputs, impl="reference")
    assert_within_budget("out", shift_formula(*inputs), low, exact)


@pytest.fixture
def small_op(monkeypatch, tmp_path):
    """shifted_attention at tiny sizes, with a test of its own that passes."""
    test = tmp_path / "test_op.py"
    test.write_text("def test_op():\n    pass\n")
    cases = tuple(
        Case(B=1, H=2, G=2, T=T, S=T, D=16, dtype="float32", backward=backward)
        for backward in (False, True)
        for T in (16, 32)
    )
    spec = registry.OPS["shifted_attention"]
    lineup = dataclasses.replace(spec.lineups["cpu"], cases=cases)
    spec = dataclasses.replace(spec, tests=(str(test),), lineups={"cpu": lineup})
    monkeypatch.setitem(run.OPS, spec.name, spec)
    return test


def test_a_quick_run_writes_valid_json(small_op, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--op", "shifted_attention", "--quick", "--runs", "2", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    (path,) = tmp_path.glob("cpu-*/shifted_attention.json")
    (result,) = json.loads(path.read_text())
    assert (result["op"], result["device"], result["peers"][0]) == ("shifted_attention", "cpu", "plain")
    assert result["machine"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads", "python", "commit", "date", "load"} <= set(result["machine"])
    keys = [(row["run"], row["backward"], row["T"], row["provider"]) for row in result["rows"]]
    providers = ("plain", "published", "composed")
    assert keys == [(n, b, 16, p) for n in (0, 1) for b in (False, True) for p in providers]
    for row in result["rows"]:
        assert 0 < row["q10_ms"] <= row["median_ms"] <= row["q90_ms"]
        assert row["gb_per_s"] > 0 and row["gflop_per_s"] > 0 and row["peak_bytes"] > 0
        assert row["ratio"].get(row["provider"], 1.0) == 1.0 and set(row["ratio"]) == {"plain", "published"}
        assert all(low <= row["ratio"][peer] <= high for peer, (low, high) in row["ratio_range"].items())
    assert "composed / plain" in capsys.readouterr().out


def test_measuring_needs_no_matplotlib():
    modules = "benchmarks.run, benchmarks.report, benchmarks.e2e.run, benchmarks.e2e.shots"
    script = f"import sys; sys.modules['matplotlib'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_red_op_is_not_measured(small_op, tmp_path, capsys):
    small_op.write_text("def test_op():\n    assert 1 == 2\n")
    path = tmp_path / "result.json"
    assert run.main(["--op", "shifted_attention", "--quick", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "assert 1 == 2" in printed and "its tests fail" in printed
    assert "/ plain" not in printed and not path.exists()


def rows_of(run, D, ratio):
    """Of one case; the op takes ratio times plain's 2 ms."""
    return [
        {
            "run": run, "backward": False, "dtype": "float32", "D": D, "G": 8, "T": 256, "provider": provider,
            "median_ms": 2.0 * factor, "ratio": {"plain": factor},
            "ratio_range": {"plain": (factor - 0.1, factor + 0.1)}, "peak_bytes": 3 * 2**19,
        }
        for provider, factor in (("plain", 1.0), ("composed", ratio))
    ]  # fmt: skip


def result_of(*ratios, D=64):
    """A result of one case with as many runs as ratios."""
    rows = [row for number, ratio in enumerate(ratios) for row in rows_of(number, D, ratio)]
    machine = {"cpu": "C", "cores": 2, "threads": 1, "torch": "2", "commit": "c", "date": "d", "load": [0.5]}
    names = {"op": "x", "device": "cpu", "peers": ["plain"], "command": "m", "clock": "wall"}
    return {**names, "machine": machine, "rows": rows}


def test_report_fills_tables_idempotently(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "r.json"
    readme.write_text("before\n<!-- table: x-cpu -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    results.write_text(json.dumps([result_of(1.25, 1.0, 1.5)]))
    arguments = [str(results), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    report.main(arguments)
    first = readme.read_text()
    report.main(arguments)
    assert readme.read_text() == first
    lines = first.splitlines()
    assert lines[:3] == [
        "before",
        "<!-- table: x-cpu -->",
        "| pass | dtype | T | plain ms | composed ms | composed / plain | plain MiB | composed MiB |",
    ]
    assert lines[4] == "| forward | float32 | 256 | 2.00 | 2.50 | 1.25 (1.00-1.50) | 1.50 | 1.50 |"
    assert lines[-2:] == ["<!-- end -->", "after <!-- end -->"] and "old" not in first
    assert (tmp_path / "plots" / "x-cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_tables_of_one_run_and_several_sizes():
    result = result_of(1.25)
    result["rows"] += rows_of(0, 128, 0.8)
    tables = report.tables(result)
    lines = tables["x-cpu"].splitlines()
    assert lines[0].startswith("| pass | dtype | D | T | plain ms |")
    assert lines[2].startswith("| forward | float32 | 64 | 256 | 2.00 | 2.50 | 1.25 (1.15-1.35) |")
    assert lines[3].startswith("| forward | float32 | 128 | 256 | 2.00 | 1.60 | 0.80 (0.70-0.90) |")
    assert tables["x-cpu-mean"].splitlines()[2] == "| forward | float32 | 1.00 (0.80-1.25) |"
    assert all("interleaved rounds" in text for text in tables.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [("no marker", "among x-cpu"), ("<!-- table: x-cpu -->\n", "has no <!-- end --> after it")],
)
def test_report_refuses_a_readme_without_markers(text, message):
    with pytest.raises(ValueError, match=message):
        report.fill_tables(text, {"x-cpu": "table"})
