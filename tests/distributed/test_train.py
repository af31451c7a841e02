"""mk.train in two processes: the adapter, the log and the files of one process with all of the batches."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import TrainerCallback, TrainerState

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.training import TrainedModule
from mmicl_kernels.training.trainer import last_checkpoint
from tests.distributed.short_training import ROUNDINGS
from tests.distributed.tiny_runs import (
    CASES,
    CONFIGS,
    DESCENT,
    TOGETHER,
    assert_same_run,
    launch,
    log_of,
    of_both,
    tiny_training,
)
from tests.distributed.two_processes import in_two_processes, two_processes
from tests.support.records_of_colours import write_records
from tests.support.same_adapter import assert_same

pytest.importorskip("accelerate")


def train_and_save(rank, folder, records, method, cases):
    for case in cases:
        adapter = tiny_training(records, method, case, processes=2, out=folder / case)
        adapter.save_pretrained(folder / f"{case}{rank}")


def test_accelerate_launch(records, tmp_path):
    launch(["--multi_gpu"], tmp_path, records, "mimic", "adam")  # without GPUs, as with them
    expected = tiny_training(records, "mimic", "adam", out=tmp_path / "one")
    one, other = (mk.load(tmp_path / f"rank{rank}", tiny_model("llava-llama")) for rank in range(2))
    assert_same(one, other)
    assert_same(one, mk.load(tmp_path / "out", tiny_model("llava-llama")))
    assert_same_run(one, expected, "mimic")
    files = {x.name for x in (tmp_path / "out" / "checkpoint-3").iterdir()}
    alone = {x.name for x in (tmp_path / "one" / "checkpoint-3").iterdir()}
    assert files == alone - {"rng_state.pth"} | {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_the_adapter_and_the_log_of_one_process(records, method, tmp_path):
    """Answers of several lengths, shuffled and in order, accumulated, and a batch that is left over."""
    in_two_processes(train_and_save, tmp_path, records, method, tuple(CASES))
    for case, (recipe, _) in CASES.items():
        expected = tiny_training(records, method, case, out=tmp_path / "one" / case)
        one, other = of_both(tmp_path, case)
        assert_same(one, other)
        assert_same_run(one, expected, method, steps=recipe.steps)
        logs = [
            [x for x in log_of(folder) if "loss" in x]
            for folder in (tmp_path / "one" / case, tmp_path / case)
        ]
        assert len(logs[0]) == recipe.steps
        for alone, both in zip(*logs, strict=True):
            # A divergence is a difference of log-probabilities, which are about 1.
            assert both == pytest.approx(alone, rel=2 * ROUNDINGS, abs=ROUNDINGS), case


def asked_queries(records, shuffle, **options):
    """The names of those a process made batches of."""
    asked = []

    def draw(pool, query, shots, generator):
        asked.append(query.id)
        return range(shots)

    recipe = replace(TOGETHER, steps=6, shuffle=shuffle)  # two epochs
    tiny_training(records, "live", (recipe, DESCENT), draw=draw, **options)
    return asked


def check_queries(rank, records, whole):
    for shuffle, one in whole.items():
        assert len(set(one)) == 10 and (one[:10] == one[10:]) == (not shuffle)
        batches = [one[i : i + 4] for epoch in (0, 10) for i in range(epoch, epoch + 8, 4)]
        (a, b), (c, d), rest = batches[:2], batches[2:], (one[8:10], one[18:20])
        mine = slice(2 * rank, 2 * rank + 2)
        left = rest if rank == 0 else (["r0"], ["r0"])  # its process takes part, and this counts nothing
        expected = [*a[mine], *b[mine], *left[0], *c[mine], *d[mine], *left[1]]
        assert asked_queries(records, shuffle, processes=2) == expected


@pytest.mark.slow
def test_queries_are_those_of_one_process(records):
    in_two_processes(
        check_queries, records, {shuffle: asked_queries(records, shuffle) for shuffle in (False, True)}
    )


@pytest.mark.slow
def test_a_process_without_queries_counts_nothing(tmp_path):
    """Not in M2IV's synergy either: both queries are in the first process, which is one alone."""
    records = write_records(tmp_path, count=2)
    shots = {"config": mk.M2IVConfig(synergy_weight=0.5)}
    case = (replace(CASES["adam"][0], shots=1), CASES["adam"][1])
    expected = tiny_training(records, "m2iv", case, **shots)
    in_two_processes(check_left_over, records, tmp_path, case, shots)
    for rank in range(2):
        assert_same(mk.load(tmp_path / str(rank), tiny_model("llava-llama")), expected)


def check_left_over(rank, records, folder, case, options):
    tiny_training(records, "m2iv", case, processes=2, **options).save_pretrained(folder / str(rank))


def unlearnable(records):
    """Examples whose loss rises, five of them: two batches of two and one that is left over."""
    examples = [x.demonstration() for x in mk.Records(records)][:5]
    return [Demonstration(x.images, x.text, "what is it what is it " + x.answer) for x in examples]


RISING = (replace(TOGETHER, steps=5, learning_rate=2.0, shuffle=False), {"warmup_steps": 2})


def check_validation(rank, records, folder):
    found = {}
    options = {"validation": unlearnable(records), "processes": 2}
    for name, out in {"kept": folder / "kept", "nothing": None}.items():
        adapter = tiny_training(records, "mimic", RISING, out=out, **options)
        adapter.save_pretrained(folder / f"{name}{rank}")
        found[name] = adapter
    assert_same(found["kept"], found["nothing"])


@pytest.mark.slow
def test_validation_and_the_best_checkpoint(records, tmp_path):
    """Also where nothing is kept, when each process has a folder of its own."""
    in_two_processes(check_validation, records, tmp_path)
    expected = tiny_training(
        records, "mimic", RISING, out=tmp_path / "one", validation=unlearnable(records)
    )  # fmt: skip
    logs = [[x for x in log_of(tmp_path / name) if "eval_ce" in x] for name in ("one", "kept")]
    losses = [x["eval_ce"] for x in logs[0]]
    assert len(losses) == 5 and losses.index(min(losses)) not in (0, 4), "the best is neither end"
    for alone, both in zip(*logs, strict=True):
        assert both == pytest.approx(alone, rel=5 * ROUNDINGS)
    for name in ("kept", "nothing"):
        one, other = of_both(tmp_path, name)
        assert_same(one, other)
        assert_same_run(one, expected, "mimic", steps=5)


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise Killed


def check_resuming(rank, records, folder, method):
    case = (replace(TOGETHER, steps=8, batch_size=4, accumulate=2), {})
    options = {"processes": 2, "seed": 1, "validation": records}
    whole = tiny_training(records, method, case, out=folder / "whole", **options)
    options["out"] = folder / "killed"
    with pytest.raises(Killed):
        tiny_training(records, method, case, callbacks=[Kill()], **options)
    dist.barrier()
    with pytest.raises(ValueError, match="has an adapter or a training already: expected resume=True"):
        tiny_training(records, method, case, **options)
    dist.barrier()
    assert_same(tiny_training(records, method, case, resume=True, **options), whole)


# Before 5.23 a Trainer loads an optimizer's state to the device "cpu:0", which torch refuses.
INDEXED_CPU = transformers.__version__ < "5.23"


@pytest.mark.slow
@pytest.mark.skipif(INDEXED_CPU, reason="this version of transformers cannot resume on CPUs")
@pytest.mark.parametrize("method", ("mimic", "aim"))
def test_resumed_is_the_same(records, tmp_path, method):
    in_two_processes(check_resuming, records, tmp_path, method)
    losses = [[x["loss"] for x in log_of(tmp_path / name) if "loss" in x] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.slow
@two_processes
def test_a_checkpoint_is_complete_when_all_have_written(rank, records, tmp_path):
    """The second process is late with its own file, without which a checkpoint is not whole."""
    save, write, seen = torch.save, TrainerState.save_to_json, []

    def save_late(x, path, *args):
        time.sleep(1.0 if "rng_state_1" in str(path) else 0.0)
        save(x, path, *args)

    def write_seeing(state, path):
        seen.append({x.name for x in Path(path).parent.glob("rng_state_*")})
        write(state, path)

    torch.save, TrainerState.save_to_json = save_late, write_seeing
    arguments = {"save_steps": 1}
    tiny_training(records, "live", "one_step", processes=2, out=tmp_path / "out", arguments=arguments)
    assert seen == ([{"rng_state_0.pth", "rng_state_1.pth"}] if rank == 0 else [])


@pytest.mark.slow
@two_processes
def test_a_loss_that_is_not_finite_stops_both(rank, records, tmp_path):
    """Of one process, at the third step: none makes the update, or a checkpoint of it."""
    forward, calls = TrainedModule.forward, []

    def breaking(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        calls.append(found)
        return {**found, "loss": found["loss"] * (math.nan if rank == len(calls) // 3 == 1 else 1.0)}

    TrainedModule.forward = breaking
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        case = (replace(TOGETHER, steps=5), {"save_steps": 1})
        tiny_training(records, "live", case, processes=2, out=tmp_path / "out")
    dist.barrier()
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"
