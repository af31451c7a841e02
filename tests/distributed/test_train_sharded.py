"""mk.train under FSDP2: the model is sharded over two processes, the adapter and its checkpoints are not."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mmicl_kernels as mk
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.training.sharding import check_deepspeed
from tests.distributed.short_training import EPS, ROUNDINGS
from tests.distributed.test_train import INDEXED_CPU, Kill, Killed
from tests.distributed.tiny_runs import (
    CASES,
    CONFIGS,
    assert_same_run,
    assert_sharded,
    launch,
    log_of,
    model_for,
    of_both,
    start_of,
    tiny_training,
)
from tests.distributed.two_processes import in_two_processes, two_processes
from tests.support.same_adapter import assert_same, by_kind

pytestmark = pytest.mark.slow
SHARDED = ("mimic", "live", "m2iv", "prompt_tuning")
CHECKED = ("adam", "accumulated")
WRAP = "TRANSFORMER_BASED_WRAP"


def test_accelerate_launch(records, tmp_path):
    """Which loads the first process's weights into all, by default; the script asserts the sharding."""
    options = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", WRAP]
    launch(options, tmp_path, records, "mimic", "adam")
    one, other = (mk.load(tmp_path / f"rank{rank}", model_for()) for rank in range(2))
    assert_same(one, other)
    assert_same(one, mk.load(tmp_path / "out", model_for()))
    assert_same_run(one, tiny_training(records, "mimic", "adam", out=tmp_path / "one"), "mimic")
    sizes = {x.name: x.stat().st_size for x in (tmp_path / "out" / "checkpoint-3").iterdir()}
    alone = {x.name for x in (tmp_path / "one" / "checkpoint-3").iterdir()}
    assert sizes.keys() == alone - {"rng_state.pth"} | {"rng_state_0.pth", "rng_state_1.pth"}
    model = sum(x.nbytes for x in model_for().parameters())
    assert sum(sizes[x] for x in sizes if "rng" not in x) < model / 2, "no half of the model is in it"


def fsdp(**options):
    """As arguments of a Trainer have it."""
    return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": WRAP, **options}}


def check_methods(rank, records, folder):
    for method in SHARDED:
        for case in CHECKED:
            model, out = model_for(), folder / method / case
            adapter = tiny_training(
                records, method, case, processes=2, model=model, out=out, arguments=fsdp()
            )
            assert_sharded(model, adapter)
            adapter.save_pretrained(folder / f"{method}-{case}{rank}")


def test_the_adapter_of_one_process(records, tmp_path):
    in_two_processes(check_methods, records, tmp_path)
    for method in SHARDED:
        for case in CHECKED:
            expected = tiny_training(
                records, method, case, out=tmp_path / "one" / method / case, validation=records
            )
            one, other = of_both(tmp_path, f"{method}-{case}")
            assert_same(one, other)
            assert_same_run(one, expected, method)


def check_resuming(rank, records, folder):
    for method in SHARDED:
        recipe, arguments = CASES["accumulated"]
        options = {"processes": 2, "seed": 1, "validation": records}
        case = (replace(recipe, steps=8), arguments | fsdp())
        whole = tiny_training(records, method, case, out=folder / method / "whole", **options)
        options["out"] = folder / method / "killed"
        with pytest.raises(Killed):
            tiny_training(records, method, case, callbacks=[Kill()], **options)
        dist.barrier()
        assert_same(tiny_training(records, method, case, resume=True, **options), whole)


@pytest.mark.skipif(INDEXED_CPU, reason="this version of transformers cannot resume on CPUs")
def test_resumed_is_the_same(records, tmp_path):
    in_two_processes(check_resuming, records, tmp_path)
    for method in SHARDED:
        logs = [log_of(tmp_path / method / name) for name in ("whole", "killed")]
        losses = [[x["loss"] for x in log if "loss" in x] for log in logs]
        assert losses[0] == losses[1] and len(losses[0]) == 8


def check_other_ways(rank, records, folder):
    """Checkpointed layers; bf16, in which the model computes; a model that was sharded before."""

    def refuse(self, model, *args, **kwargs):  # as with GPUs
        raise ValueError("Your model contains `DTensor` parameters, which is incompatible with DDP.")

    Accelerator.prepare_model, made = refuse, {}
    for name, arguments in {
        "checkpointed": {"gradient_checkpointing": True, **fsdp()},
        "bf16": {"bf16": True, **fsdp()},
        "before": {},
    }.items():
        model = model_for()
        if name == "before":
            for anchor in find_anchors(model):
                fully_shard(anchor.layer)
            fully_shard(model)
        made[name] = tiny_training(records, "live", "adam", processes=2, model=model, arguments=arguments)
        assert_sharded(model, made[name])
        made[name].save_pretrained(folder / f"{name}{rank}")
    assert_same(made["checkpointed"], made["before"])


def test_checkpointing_bf16_and_models_that_are_sharded(records, tmp_path):
    in_two_processes(check_other_ways, records, tmp_path)
    expected = tiny_training(records, "live", "adam")
    for name in ("checkpointed", "bf16", "before"):
        one, other = of_both(tmp_path, name)
        assert_same(one, other)
        if name != "bf16":
            assert_same_run(one, expected, "live")
    rounded = of_both(tmp_path, "bf16")[0]
    start, roundings = start_of("live"), ROUNDINGS / EPS * torch.finfo(torch.bfloat16).eps
    for kind, x in by_kind(rounded.state_dict()).items():
        y, z = (by_kind(of.state_dict())[kind] for of in (expected, start))
        assert x.dtype == torch.float32 and 0 < (x - y).norm() <= roundings * (y - z).norm(), kind


ONE = {"version": 1, "reshard_after_forward": "full_shard", "sync_module_states": False}


@two_processes
def test_what_is_refused(rank, records):
    for options, method, error, message in (
        (ONE, "live", ValueError, "fsdp_version is 1, expected 2"),
        ({"activation_checkpointing": True}, "live", ValueError, "fsdp_activation_checkpointing is on"),
        ({"cpu_offload": True}, "live", ValueError, "fsdp_offload_params is on, expected off"),
        ({}, "aim", NotImplementedError, "'aim' reads hidden states of a whole model, expected DDP"),
    ):  # fmt: skip
        model = model_for()
        with pytest.raises(error, match=message):
            tiny_training(records, method, "adam", processes=2, model=model, arguments=fsdp(**options))
        assert not any(isinstance(x, DTensor) for x in model.parameters())
        assert os.environ["ACCELERATE_USE_FSDP"] == "false"


def test_what_deepspeed_cannot_train():
    """It is not installed with the tests; what was tried by hand is in the README."""
    adapters = {method: start_of(method) for method in CONFIGS}
    for method in ("mimic", "prompt_tuning"):
        check_deepspeed(2, adapters[method])
    with pytest.raises(NotImplementedError, match="zero_stage is 3.*, or FSDP version 2"):
        check_deepspeed(3, adapters["mimic"])
    for method in ("live", "m2iv", "aim"):
        with pytest.raises(
            NotImplementedError, match=f"cannot train method '{method}'.*expected MimIC or DDP"
        ):
            check_deepspeed(1, adapters[method])


def check_shared_shots(rank, records, folder):
    recipe, arguments = CASES["adam"]
    for method in SHARDED:
        for name, sharding in {"ddp": {}, "fsdp": fsdp()}.items():
            case, model = (replace(recipe, shared_shots=True), arguments | sharding), model_for()
            adapter = tiny_training(records, method, case, processes=2, model=model)
            if sharding:
                assert_sharded(model, adapter)
            adapter.save_pretrained(folder / f"{method}-{name}{rank}")


def test_shared_shots(records, tmp_path):
    """A teacher that keeps keys and values: the same where the model is sharded as where it is whole."""
    in_two_processes(check_shared_shots, records, tmp_path)
    for method in SHARDED:
        one, other = of_both(tmp_path, f"{method}-fsdp")
        assert_same(one, other)
        assert_same_run(one, of_both(tmp_path, f"{method}-ddp")[0], method)
