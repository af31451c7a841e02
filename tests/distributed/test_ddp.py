"""DistributedDataParallel over a frozen model and its adapter."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.distributed.short_training import (
    METHODS,
    STEPS,
    adapter_of,
    assert_same_steps,
    fitting_rate,
    half_of,
    train,
)
from tests.distributed.test_ddp_objectives import same_on_both
from tests.distributed.two_processes import two_processes


def check_training(rank, family, method, checkpointing):
    model = tiny_model(family)
    start = adapter_of(model, method)
    inputs = tiny_inputs(model, batch=4, length=16, padding="left")

    alone = mk.AdaptedModel(copy.deepcopy(model), copy.deepcopy(start))
    rate = fitting_rate(alone, alone.handle, alone.adapter, inputs)
    train(alone, alone.handle, alone.adapter, inputs, rate)

    adapted = mk.AdaptedModel(model, copy.deepcopy(start))
    if rank == 1:  # the first process's parameters count
        with torch.no_grad():
            for parameter in adapted.adapter.parameters():
                parameter.add_(1.0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    calls = []
    layer = adapted.handle.anchors[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train(DistributedDataParallel(adapted), adapted.handle, adapted.adapter, half_of(inputs, rank), rate)

    assert sum(calls) == STEPS * (1 + checkpointing)
    assert same_on_both(dict(adapted.adapter.named_parameters())) == (True, None)
    assert_same_steps(adapted.adapter, alone.adapter, start)
    assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@two_processes
def test_two_halves_train_as_the_whole(rank, checkpointing):
    for method in METHODS:
        check_training(rank, "llava-llama", method, checkpointing)


@pytest.mark.slow
@two_processes
def test_other_families(rank):
    for family in ("gemma3", "idefics2", "qwen2_5_vl"):
        check_training(rank, family, "mimic", False)
        check_training(rank, family, "m2iv", True)
