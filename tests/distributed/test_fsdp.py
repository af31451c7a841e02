"""``fully_shard`` of the frozen model; the adapter stays whole in every process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from mmicl_kernels.training import TrainedModule
from tests.distributed.short_training import (
    ROUNDINGS,
    adapter_of,
    assert_same_gradients,
    assert_same_logits,
    assert_same_steps,
    fitting_rate,
    gradients,
    half_of,
    loss_of,
    train,
)
from tests.distributed.test_ddp_objectives import ALIGNED, adapter_for, batch_for, checkpointed, gradient_of
from tests.distributed.two_processes import WORLD_SIZE, two_processes
from tests.support.episode_inputs import half_of as half_of_batch
from tests.support.same_adapter import by_kind

# Where the shift acts: the attention, two branches, and the layer itself, which FSDP hooks too.
METHODS = ("mimic", "ffn_shift", "hificl", "stave", "m2iv", "live")


def shard(model):
    """Each decoder layer, then what is left of the model."""
    for anchor in find_anchors(model):
        fully_shard(anchor.layer)
    return fully_shard(model)


def assert_sharded(model):
    """Loss parity alone could not tell."""
    whole = local = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        whole, local = whole + parameter.numel(), local + parameter.to_local().numel()
    # Rows that two processes cannot share evenly: one each at most.
    odd = sum(x[0].numel() for x in model.parameters() if len(x) % WORLD_SIZE)
    assert abs(local - whole / WORLD_SIZE) <= odd / WORLD_SIZE < 0.1 * whole


def sharded_and_attached(model, adapter, order):
    if order == "attach_first":
        handle = mk.attach(model, adapter)
        return shard(model), handle
    shard(model)
    return model, mk.attach(model, adapter)


def check_one_batch(family, method, order, checkpointing):
    whole = tiny_model(family).requires_grad_(False)
    inputs = tiny_inputs(whole, padding="left")
    with torch.no_grad():
        plain = whole(**inputs).logits
    adapter = adapter_of(whole, method)
    model, handle = sharded_and_attached(copy.deepcopy(whole), copy.deepcopy(adapter), order)
    assert_sharded(model)

    with mk.attach(whole, adapter) as reference, torch.no_grad():
        expected = whole(**inputs).logits
        tokens = whole.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert_same_logits(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
        assert (expected - plain).norm() > 0.01 * plain.norm()
        with torch.enable_grad():
            loss_of(whole, reference, inputs).backward()
    loss_of(checkpointed(model) if checkpointing else model, handle, inputs).backward()
    assert_same_gradients(gradients(handle.single), gradients(adapter))
    assert_sharded(model)

    handle.detach()
    model.eval()
    with torch.no_grad():
        assert_same_logits(model(**inputs).logits, plain)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("order", ["attach_first", "shard_first"])
@two_processes
def test_logits_and_gradients(rank, order, checkpointing):
    for method in METHODS:
        check_one_batch("llava-llama", method, order, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "idefics", "qwen2_5_vl"])
@two_processes
def test_other_families(rank, family):
    for method in METHODS:
        check_one_batch(family, method, "shard_first", True)


def check_training(rank, method, checkpointing):
    whole = tiny_model("llava-llama")
    start = adapter_of(whole, method)
    inputs = tiny_inputs(whole, batch=4, length=16, padding="left")
    model = shard(copy.deepcopy(whole).requires_grad_(False))
    alone = mk.AdaptedModel(whole, copy.deepcopy(start))
    rate = fitting_rate(alone, alone.handle, alone.adapter, inputs)
    train(alone, alone.handle, alone.adapter, inputs, rate)

    adapted = mk.AdaptedModel(checkpointed(model) if checkpointing else model, copy.deepcopy(start))
    train(DistributedDataParallel(adapted), adapted.handle, adapted.adapter, half_of(inputs, rank), rate)
    assert_same_steps(adapted.adapter, alone.adapter, start)
    assert_sharded(model)


@two_processes
def test_adapter_trains_by_ddp(rank):
    check_training(rank, "mimic", checkpointing=True)
    check_training(rank, "m2iv", checkpointing=False)


def check_objective(rank, kind, checkpointing):
    """TrainedModule of the sharded model under DDP, with what is measured, against the whole model."""
    whole = tiny_model("llava-llama").requires_grad_(False)
    model, adapter = shard(copy.deepcopy(whole)), adapter_for(whole, kind)
    batch = half_of_batch(batch_for(whole, kind), rank)
    module = TrainedModule(checkpointed(model) if checkpointing else model, copy.deepcopy(adapter))
    ddp, alone = DistributedDataParallel(module), TrainedModule(whole, adapter)
    module.objective.measures = alone.objective.measures = True
    for _ in range(2):
        found, losses = gradient_of(ddp, batch)
    mine, expected = gradient_of(alone, batch)
    for x in mine.values():  # DDP has done as much
        dist.all_reduce(x.div_(2))
    assert_same_gradients(by_kind(found), by_kind(mine))
    assert_sharded(model)
    assert losses.keys() == expected.keys() and sum("gradient_norm" in name for name in losses) >= 2
    for name, x in expected.items():
        torch.testing.assert_close(losses[name], x, rtol=ROUNDINGS, atol=ROUNDINGS)


@two_processes
def test_objectives_of_a_sharded_model(rank):
    for kind in ("mimic", "ffn_shift", "live", "many_shot", "m2iv"):
        check_objective(rank, kind, False)
    for kind in (*ALIGNED, "live"):
        check_objective(rank, kind, True)


@two_processes
def test_rows(rank):
    whole = tiny_model("llava-llama").requires_grad_(False)
    inputs = tiny_inputs(whole, batch=4, length=16, padding="left")
    adapters = {method: adapter_of(whole, method) for method in METHODS}
    rows = ["mimic", None, ("m2iv", "live"), {"ffn_shift": 1.0, "m2iv": -0.5}]
    model = shard(copy.deepcopy(whole))
    with (
        torch.no_grad(),
        mk.attach(whole, adapters) as one,
        mk.attach(model, adapters) as other,
        one.rows(rows),
        other.rows(rows),
    ):
        assert_same_logits(model(**inputs).logits, whole(**inputs).logits)


@two_processes
def test_fused_tokens_are_read_and_not_made(rank):
    whole = tiny_model("llava-llama").requires_grad_(False)
    inputs = tiny_inputs(whole, padding="left")
    adapter = adapter_of(whole, "aim")
    model = shard(copy.deepcopy(whole))
    tokens = FusedTokens(torch.randn(5, 32), torch.tensor([0, 2, 5]), None)
    with torch.no_grad(), mk.attach(whole, adapter) as one, mk.attach(model, adapter) as other:
        expected = whole(**one.splice(inputs, [[0], [1, 0]], tokens=tokens)).logits
        assert_same_logits(model(**other.splice(inputs, [[0], [1, 0]], tokens=tokens)).logits, expected)
        with pytest.raises(NotImplementedError, match="fully_shard.*aggregate before"):
            other.aggregate(inputs)
