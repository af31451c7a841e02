"""The GPU's benchmark without a GPU: peers, values, budget, errors, lost processes, tables."""

import dataclasses
import json
import math
import os
import sys
import time
from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import run
from benchmarks.harness import measure, registry, supervisor, timing, values
from benchmarks.harness.case import Case
from benchmarks.harness.spec import bound
from benchmarks.ops import attention_shift as shift_op
from benchmarks.ops import shifted_attention as attention_op
from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.testing.budgets import assert_within_budget, eager_shifted_attention
from mmicl_kernels.testing.inputs import attention_shift_inputs, shifted_attention_inputs

ATTENTION, SHIFT = attention_op.SPEC, shift_op.SPEC
SMALL = Case(B=2, H=4, G=2, T=48, S=48, D=16, dtype="bfloat16", model="small")
SMALL_CASES = (
    SMALL,
    dataclasses.replace(SMALL, backward=True),
    dataclasses.replace(SMALL, T=1, causal=False),
)


COMPOSED = attention_op.OURS["composed"]

# ---- cases and providers ----


@pytest.mark.parametrize("name", registry.OPS)
def test_cases_and_providers_have_one_place_each(name):
    for lineup in registry.OPS[name].lineups.values():
        assert len(set(lineup.cases)) == len(lineup.cases)
        assert len(lineup.providers) == len(lineup.floors) + len(lineup.others) + len(lineup.ours)
        assert set(lineup.stock) <= set(lineup.others)


UNKNOWN_ON_META = {
    "row_projection": ("indexed", "compiled"),  # the number of a mask's rows
    "alignment_loss": ("formula", "compiled", "mse"),
    "shifted_attention": ("flex + epilogue",),
    "residual_shift": ("compiled",),
    "residual_shift_preserve_norm": ("compiled",),
    "residual_shift_rms_norm": ("compiled", "liger"),
}


@pytest.mark.parametrize("name", registry.OPS)
def test_every_provider_of_every_cuda_case_runs_on_meta_tensors(name, monkeypatch):
    """To the shapes of the op's results, or of as many as it has."""
    monkeypatch.setattr(shift_op, "_compiled_formula", shift_op.shift_formula)
    spec, lineup = registry.OPS[name], registry.OPS[name].lineups["cuda"]
    for case in lineup.cases:
        inputs = spec.make_inputs(case, "meta")
        expected = _shapes(lineup.ours["composed"](case, inputs)())
        for provider in lineup.providers.keys() - {"memcpy", *UNKNOWN_ON_META.get(name, ())}:
            fn = lineup.providers[provider](case, inputs)
            if fn is None:
                assert case.backward and "epilogue" in provider
            else:
                found = _shapes(fn())
                assert found == expected[: len(found)], provider
        if case.backward:
            leaves = [x.shape for x in inputs if x.requires_grad]
            assert expected == leaves


def _shapes(outputs):
    return [x.shape for x in values.as_tuple(outputs)]


@pytest.mark.parametrize("T", (1, 200))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_and_epilogue_is_the_op(T, monkeypatch):
    """In the cases that it is compiled for; in others it takes no part."""
    case = dataclasses.replace(SMALL, T=T, S=200, D=32, dtype="float32", causal=T > 1)
    inputs = ATTENTION.make_inputs(case, "cpu")
    flex = ATTENTION.lineups["cuda"].others["flex + epilogue"]
    assert flex(case, inputs) is None
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setattr(attention_op, "WITH_FLEX", {case})
    assert values.find_fault(ATTENTION.parts(case, inputs), flex(case, inputs)()) is None


@pytest.mark.parametrize("G", (2, 4))
def test_stock_and_epilogue_is_the_op_and_has_no_gradient(G, monkeypatch):
    def cpu_flash(q, k, v, *, causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    monkeypatch.setitem(attention_op.WITH_LSE, "flash", cpu_flash)
    monkeypatch.setattr(shift_op, "_compiled_formula", shift_op.shift_formula)
    inputs = [x.requires_grad_() for x in shifted_attention_inputs(G=G, layout="heads_last")]
    actual = attention_op.stock_and_epilogue("flash")(*inputs, causal=True)
    assert not actual.requires_grad
    _assert_is_the_op(actual, inputs, causal=True)


def _assert_is_the_op(actual, inputs, causal):
    inputs = [x.detach() for x in inputs]
    exact = shifted_attention(*(x.double() for x in inputs), causal=causal, impl="reference")
    assert_within_budget("out", actual, eager_shifted_attention(*inputs, causal=causal)[0], exact)


def test_a_forced_backend_runs_or_raises():
    q, k, v = shifted_attention_inputs(layout="heads_last")[:3]
    flash = attention_op.forced_attention("flash")(q, k, v, causal=True)
    assert torch.equal(flash, attention_op.plain_attention(q, k, v, causal=True))
    with pytest.raises(RuntimeError, match="No (viable|available)"):
        attention_op.forced_attention("cudnn")(q, k, v, causal=True)


def test_the_epilogue_is_compiled_once_for_all_lengths(monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(shift_op.shift_formula, dynamic=False, backend=backend)
    monkeypatch.setattr(shift_op, "_compiled_formula", compiled)
    for number, (B, T, D) in enumerate(((2, 37, 16), (3, 50, 16), (2, 64, 16), (2, 64, 32))):
        inputs = attention_shift_inputs(B=B, T=T, D=D, layout="heads_last")
        torch.testing.assert_close(
            shift_op.compiled_shift(*inputs), attention_shift(*inputs, impl="reference")
        )
        assert not hasattr(inputs[2], "_dynamo_weak_dynamic_indices")
        assert len(graphs) == (2 if number == 3 else 1)


# ---- values ----


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.section)
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_right_values_have_no_fault(case, dtype, monkeypatch):
    monkeypatch.setattr(attention_op, "BLOCK_ELEMENTS", 2 * 2 * 48 * 20)  # 20 queries a block
    monkeypatch.setattr(values, "ROWS", 20)
    case = dataclasses.replace(case, dtype=dtype)
    inputs = ATTENTION.make_inputs(case, "cpu")
    assert values.find_fault(ATTENTION.parts(case, inputs), COMPOSED(case, inputs)()) is None


def test_blocks_of_queries_add_up(monkeypatch):
    case = dataclasses.replace(SMALL_CASES[1], dtype="float64")
    inputs = ATTENTION.make_inputs(case, "cpu")
    whole = ATTENTION.parts(case, inputs)
    reference = bound(partial(shifted_attention, causal=True, impl="reference"), 6)
    monkeypatch.setattr(attention_op, "BLOCK_ELEMENTS", 2 * 2 * 48 * 20)
    for part, expected in zip(ATTENTION.parts(case, inputs), whole, strict=True):
        torch.testing.assert_close(part.exact, expected.exact)
        actual = reference(case, inputs)()[part.output][part.index]
        torch.testing.assert_close(actual, expected.exact)


@pytest.mark.parametrize(
    ("output", "index", "name"),
    [
        (0, (-1, -1, -1), "out[1, 2:4, 28:48]"),
        (0, (0, 0, 0), "out[0, 0:2, 0:20]"),
        (0, (1, 3, 20), "out[1, 2:4, 14:34]"),
    ],
)
def test_a_wrong_output_has_a_fault(output, index, name, monkeypatch):
    monkeypatch.setattr(values, "ROWS", 20)
    inputs = ATTENTION.make_inputs(SMALL, "cpu")
    out = COMPOSED(SMALL, inputs)()
    out[index] *= 1.5
    assert values.find_fault(ATTENTION.parts(SMALL, inputs), out).startswith(name)


@pytest.mark.parametrize("number", range(6))
def test_a_wrong_gradient_has_a_fault(number):
    case = SMALL_CASES[1]
    inputs = ATTENTION.make_inputs(case, "cpu")
    grads = [x.clone() for x in COMPOSED(case, inputs)()]
    (grads[number][-1] if number > 2 else grads[number][-1, -1]).mul_(1.1)
    fault = values.find_fault(ATTENTION.parts(case, inputs), grads)
    assert fault.startswith(("dq", "dk", "dv", "dweight", "dbias", "dshift")[number] + " of key head 1")


def test_a_dropped_gradient_of_lse_is_a_fault():
    """What an attention backward that knows no lse gives: the mistake a peer would make."""
    case = SMALL_CASES[1]
    *inputs, dout = ATTENTION.make_inputs(case, "cpu")
    q, k, v, *parameters = inputs
    out, lse = shifted_attention(q, k, v, *parameters[:2], torch.zeros_like(parameters[2]), causal=True,
                                 return_lse=True)  # fmt: skip
    wrong = attention_shift(out, lse.detach(), q, *parameters)
    grads = torch.autograd.grad(wrong, inputs, dout)
    fault = values.find_fault(ATTENTION.parts(case, (*inputs, dout)), grads)
    assert fault.startswith(("dq", "dk"))


@pytest.mark.parametrize("impl", ("composed", "reference"))
def test_values_of_attention_shift(impl):
    inputs = SHIFT.make_inputs(SMALL, "cpu")
    parts = SHIFT.parts(SMALL, inputs)
    out = attention_shift(*inputs, impl=impl)
    assert values.find_fault(parts, out) is None
    out[1, 3] += 0.1
    assert values.find_fault(parts, out).startswith("out[1, :")


# ---- measuring ----


@pytest.fixture
def as_cuda(monkeypatch, tmp_path):
    """The op's cuda line-up at small sizes, on the CPU; what only a GPU can do is replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(timing, "_cuda_sampler", lambda: timing._cpu_sampler(time.perf_counter))
    monkeypatch.setattr(timing, "_cuda_ready", lambda functions: (dict(functions), {"auto"}))
    monkeypatch.setattr(timing, "_cuda_peak_bytes", lambda fn: fn() is not None)
    monkeypatch.setattr(timing, "cuda_rates", lambda: {"copy_gb_per_s": 4e3, "matmul_tflop_per_s": 780.0})
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setitem(run.SECONDS, "cuda", 1e-9)
    plain = ATTENTION.lineups["cpu"].floors["plain"]
    on_cpu = {"cudnn": plain, "efficient": plain, "triton": _refused}
    on_cpu |= {f"{name} + epilogue": _forward_only for name in attention_op.WITH_LSE}
    lineup = ATTENTION.lineups["cuda"]

    def install(**changes):
        groups = {
            group: {
                name: {**on_cpu, **changes}.get(name, bind) for name, bind in getattr(lineup, group).items()
            }
            for group in ("floors", "others", "ours")
        }
        spec = dataclasses.replace(
            ATTENTION,
            lineups={"cuda": dataclasses.replace(lineup, cases=SMALL_CASES, **groups)},
            make_inputs=lambda case, device: ATTENTION.make_inputs(case, "cpu"),
        )
        monkeypatch.setitem(run.OPS, spec.name, spec)
        return spec

    install()
    return install


def _forward_only(case, inputs):
    return None if case.backward else COMPOSED(case, inputs)


def _refused(case, inputs):
    raise RuntimeError("too new\nfor this device")


def _work(*options):
    """As in the process that the supervisor starts."""
    return run.main(["--op", "shifted_attention", "--device", "cuda", *options])


def _worker(tmp_path, budget=math.inf):
    return ["--out", str(tmp_path / "out"), "--budget", str(budget), "--worker", str(tmp_path)]


def _result(tmp_path):
    (result,) = json.loads((tmp_path / "out" / "nvidia-h200" / "shifted_attention.json").read_text())
    return result


def _row(rows, provider):
    return next(row for row in rows if row["provider"] == provider)


def test_a_cuda_run(as_cuda, tmp_path, capsys):
    assert _work(*_worker(tmp_path)) == 1  # for the triton that raises
    result = _result(tmp_path)
    rows = [row for row in result["rows"] if row["T"] == 48 and not row["backward"]]
    assert [row["provider"] for row in rows] == [
        *("cudnn", "flash", "efficient", "published", "cudnn + epilogue", "flash + epilogue"),
        *("composed", "triton", "auto"),
    ]
    assert _row(rows, "triton")["error"] == "RuntimeError: too new" and "ratio" not in _row(rows, "triton")
    for row in rows:
        if row["provider"] != "triton":
            assert row["median_ms"] > 0 and row["graph"] == (row["provider"] == "auto")
            assert set(row["ratio"]) == {row["provider"] for row in rows} - {"composed", "triton", "auto"}
            assert ("fault" in row) == (row["provider"] not in ("cudnn", "flash", "efficient", "published"))
            assert row.get("fault") is None
    assert (
        result["command"]
        == f"python -m benchmarks.run --op shifted_attention --device cuda --out {tmp_path}/out"
    )
    assert result["machine"]["copy_gb_per_s"] == 4e3 and result["left_out"] == []
    trained = [row["provider"] for row in result["rows"] if row["backward"]]
    assert "flash + epilogue" not in trained and "published" in trained
    printed = capsys.readouterr().out
    for section in ("forward", "training", "decode"):
        assert f"shifted_attention-cuda-{section}" in printed
    assert "triton small B=2 T=48 S=48: RuntimeError: too new" in printed


def test_only_our_errors_and_faults_count(as_cuda, tmp_path):
    def wrong(case, inputs):
        right = COMPOSED(case, inputs)
        return lambda: [x * 1.5 for x in right()] if case.backward else right() * 1.5

    fine = COMPOSED
    as_cuda(flash=_refused, triton=fine, **{"cudnn + epilogue": wrong})
    assert _work(*_worker(tmp_path)) == 0
    rows = _result(tmp_path)["rows"]
    assert _row(rows, "cudnn + epilogue")["fault"].startswith("out[0, 0:2, 0:48]: relative error")
    as_cuda(triton=wrong)
    assert _work(*_worker(tmp_path)) == 1
    as_cuda(triton=wrong)
    assert _work("--no-check", *_worker(tmp_path)) == 0


def test_the_budget_is_kept_and_says_what_was_left_out(as_cuda, tmp_path, monkeypatch):
    as_cuda(triton=COMPOSED)
    assert _work(*_worker(tmp_path, budget=0)) == 0
    result = _result(tmp_path)
    left_out = [(case["backward"], case["T"]) for case in result["left_out"]]
    assert result["rows"] == [] and left_out == [(False, 48), (True, 48), (False, 1)]

    clock = iter((0.0, 0.0, 20.0, 99.0))  # the start, then before each case; the second begins in time
    monkeypatch.setattr(run, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    assert _work(*_worker(tmp_path, budget=60)) == 0
    result = _result(tmp_path)
    assert [case["T"] for case in result["left_out"]] == [1]
    assert {(row["backward"], row["T"]) for row in result["rows"]} == {(False, 48), (True, 48)}


def test_time_is_shared_and_handed_on():
    deadlines = run._deadlines(list(registry.OPS), 100.0, 50.0)
    shares = [spec.share for spec in registry.OPS.values()]
    assert list(deadlines.values()) == pytest.approx(
        [100.0 + 50.0 * sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
    )
    assert run._deadlines(["attention_shift"], 100.0, 50.0) == {"attention_shift": 150.0}


def test_a_provider_that_fails_while_timed_leaves_the_others(as_cuda):
    calls = []

    def fails_late(case, inputs):
        def fn():
            calls.append(case)
            if len(calls) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
            return COMPOSED(case, inputs)()

        return fn

    spec = as_cuda(triton=fails_late)
    rows = measure.measure_case(spec, SMALL, "cuda", 1e-9)
    assert _row(rows, "triton")["error"] == "OutOfMemoryError: CUDA out of memory. Tried"
    assert _row(rows, "auto")["rounds"] == 2 and len(calls) == 5


def test_inputs_that_do_not_fit_are_an_error_of_every_provider(as_cuda):
    spec = dataclasses.replace(as_cuda(), make_inputs=_refused)
    rows = measure.measure_case(spec, SMALL, "cuda", 1e-9, check=True)
    assert {row["provider"] for row in rows} == set(spec.lineups["cuda"].providers)
    assert {row["error"] for row in rows} == {"inputs: RuntimeError: too new"}


def test_unchecked_values_are_a_fault(as_cuda):
    spec = dataclasses.replace(as_cuda(), parts=_refused)
    rows = measure.measure_case(spec, SMALL, "cuda", 1e-9, check=True)
    assert _row(rows, "auto")["fault"] == "not checked: RuntimeError: too new"
    assert "fault" not in _row(rows, "cudnn")


def test_small_work_becomes_a_graph_and_the_rest_stays(monkeypatch):
    def slow(): ...
    def waits(): ...
    def refuses(): ...
    def small(): ...

    replay = type("Graph", (), {"replay": staticmethod(lambda: None)})
    monkeypatch.setattr(timing, "_is_small", lambda fn: fn is not slow)
    monkeypatch.setattr(timing, "_synchronizes", lambda fn: fn is waits)
    monkeypatch.setattr(timing, "_captured", lambda fn: None if fn is refuses else replay)
    functions = {fn.__name__: fn for fn in (slow, waits, refuses, small)}
    ready, graphs = timing._cuda_ready(functions)
    assert graphs == {"small"} and ready == {**functions, "small": replay.replay}


# ---- processes ----


def test_a_lost_device_ends_the_process_with_its_name_noted(as_cuda, tmp_path, monkeypatch):
    def lose(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def loses(case, inputs):
        monkeypatch.setattr(torch.cuda, "synchronize", lose)
        return lose

    monkeypatch.setattr(os, "_exit", sys.exit)
    as_cuda(triton=loses)
    with pytest.raises(SystemExit) as exited:
        _work(*_worker(tmp_path))
    assert exited.value.code == supervisor.LOST
    now = json.loads((tmp_path / "now.json").read_text())
    assert (now["op"], now["provider"], now["case"]) == ("shifted_attention", "triton", SMALL.label)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (tmp_path / "lost.json").write_text(json.dumps([{**now, "error": "the device was lost"}]))
    as_cuda(triton=COMPOSED)
    assert _work(*_worker(tmp_path)) == 1
    result = _result(tmp_path)
    errors = {
        (row["backward"], row["T"]): row.get("error") for row in result["rows"] if row["provider"] == "triton"
    }
    assert errors == {(False, 48): "the device was lost", (True, 48): None, (False, 1): None}


def test_another_process_goes_on_where_one_was_lost(as_cuda, tmp_path, monkeypatch):
    as_cuda(triton=COMPOSED)
    assert _work(*_worker(tmp_path)) == 0
    before = _result(tmp_path)
    path = tmp_path / "out" / "nvidia-h200" / "shifted_attention.json"
    kept = [row for row in before["rows"] if row["T"] == 48 and not row["backward"]]
    path.write_text(json.dumps([{**before, "rows": kept}]))
    lost = {"op": "shifted_attention", "section": "training", "case": SMALL_CASES[1].label, "error": "gone"}
    (tmp_path / "lost.json").write_text(json.dumps([{**lost, "provider": "published"}]))
    assert _work(*_worker(tmp_path)) == 0
    rows = _result(tmp_path)["rows"]
    assert rows[: len(kept)] == kept and len(rows) == len(before["rows"])
    assert _row([row for row in rows if row["backward"]], "published")["error"] == "gone"


@pytest.mark.parametrize("stage", sorted(measure.STAGES))
def test_a_process_lost_between_providers_costs_the_case(as_cuda, stage):
    called = []
    spec = dataclasses.replace(as_cuda(), make_inputs=lambda *arguments: called.append(arguments))
    rows = measure.measure_case(spec, SMALL, "cuda", 1e-9, lost={stage: "killed"})
    assert not called
    assert {row["error"] for row in rows} == {f"{stage}: killed"}


def test_lost_twice_in_a_section_is_not_tried_again(tmp_path):
    one = {"op": "x", "section": "decode", "case": "a", "provider": "p", "error": "gone"}
    (tmp_path / "lost.json").write_text(json.dumps([one, {**one, "case": "b"}, {**one, "provider": "q"}]))
    worker = supervisor.Worker(tmp_path)
    assert worker.lost_in("x", "decode", "a") == {"p": "gone", "q": "gone"}
    assert worker.lost_in("x", "decode", "c") == {"p": "gone"}
    assert worker.lost_in("x", "training", "a") == worker.lost_in("y", "decode", "a") == {}


SCRIPT = """
import json, os, pathlib, signal, sys
log, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--worker") + 1])
number = len(log.read_text().splitlines()) if log.exists() else 0
lost = json.loads((folder / "lost.json").read_text()) if number else []
with log.open("a") as file:
    file.write(json.dumps([sys.argv[2:], lost]) + "\\n")
(folder / "now.json").write_text(json.dumps({"provider": f"p{number}"}))
if number == 0:
    os._exit(70)
if number == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
sys.exit(1)
"""


def test_the_supervisor_starts_again_until_it_is_done(tmp_path, monkeypatch):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, str(script), str(log)))
    assert supervisor.supervise(["--op", "all"], 60.0) == 1
    started = [json.loads(line) for line in log.read_text().splitlines()]
    assert [len(lost) for _, lost in started] == [0, 1, 2]
    assert [x["error"] for x in started[2][1]] == ["the device was lost", "exit status -11"]
    assert [x["provider"] for x in started[2][1]] == ["p0", "p1"]
    assert all(words[:3] == ["--op", "all", "--budget"] and float(words[3]) <= 60 for words, _ in started)


def test_the_supervisor_gives_up_one_that_stalls(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "if (folder / 'lost.json').exists():\n    sys.exit(0)\n"
        "(folder / 'now.json').write_text('{}')\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(supervisor, "STALL_SECONDS", 1.0)
    assert supervisor.supervise([], 60.0) == 0


def test_a_process_that_never_starts_is_not_started_again(monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", "import sys; sys.exit(5)"))
    assert supervisor.supervise([], 60.0) == 1
    assert "exit status 5 before anything was measured" in capfd.readouterr().err


def test_cuda_is_measured_under_supervision(as_cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "supervise", lambda arguments, budget: (arguments, budget))
    arguments = ["--device", "cuda", "--out", "x", "--budget", "500"]
    assert run.main(arguments) == (arguments, 500.0)
