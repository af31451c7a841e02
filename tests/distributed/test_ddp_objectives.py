"""Every objective in two processes: TrainedModule under DistributedDataParallel, and what the old way did."""

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.training import TrainedModule, TrainingConfig, train, trainable
from tests.distributed.short_training import adapter_of, assert_same_gradients, gradients
from tests.distributed.two_processes import in_two_processes, two_processes
from tests.support.episode_inputs import aggregation, half_of, many_shot
from tests.support.same_adapter import by_kind

# Means over answers or a query's tokens: those of a whole batch are those of two halves with as many of them.
MEANS = ("mimic", "ffn_shift", "live", "many_shot", "m2iv_without_synergy", "aim", "prompt_tuning")
OBJECTIVES = (*MEANS, "m2iv")
CONFIGS = {
    "mimic_layer": ("mimic", mk.MimICConfig(align="layer")),
    "m2iv_without_synergy": ("m2iv", mk.M2IVConfig(synergy_weight=0.0)),
    "many_shot": ("live", mk.LIVEConfig(site="layer")),
}
# Before 5.23 transformers checkpoints the hooks of a layer too, where MimIC's alignment is refused.
ALIGNED = ("mimic_layer",) if GradientCheckpointingLayer.__call__ is nn.Module.__call__ else ()
CHECKPOINTED = (*ALIGNED, "live", "many_shot", "m2iv_without_synergy", "aim", "prompt_tuning")


def adapter_for(model, kind):
    """Every parameter matters."""
    torch.manual_seed(1)
    method, config = CONFIGS.get(kind, (kind, None))
    adapter = adapter_of(model, method)
    if kind == "m2iv":  # so small that a query's tokens differ, and so do the correlations over other tokens
        adapter.load_state_dict({name: x / 64 for name, x in adapter.state_dict().items()})
    if config is not None:
        like, adapter = adapter, mk.create(model, config)
        adapter.load_state_dict(like.state_dict())
    return adapter


def batch_for(model, kind, padding=None):
    """Four queries. Without padding both halves have as many tokens of each kind."""
    if kind == "aim":
        return aggregation(model, padding=padding, chosen=((0, 1), (1,), (2, 3), (3,)))
    return many_shot(model, passes=2 if kind == "many_shot" else 1, padding=padding, batch=4)


def same_on_both(tensors):
    for name, x in tensors.items():
        both = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(both, x.detach())
        if not torch.equal(*both):
            return False, name
    return True, None


def gradient_of(module, batch):
    """Of one batch, by name, and the losses."""
    module.zero_grad()
    losses = module(**batch.arguments())
    losses["loss"].backward()
    adapter = getattr(module, "module", module).adapter
    assert all(x.grad is not None for x in adapter.parameters()), "DDP would wait for it"
    return {name: x.grad.clone() for name, x in adapter.named_parameters()}, losses


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def check_gradients(rank, family, kind, checkpointing, padding=None):
    model = tiny_model(family)
    adapter, batch = adapter_for(model, kind), batch_for(model, kind, padding)
    alone = TrainedModule(copy.deepcopy(model), copy.deepcopy(adapter))
    whole, losses = gradient_of(alone, batch)
    (one, _), (other, _) = (gradient_of(alone, half_of(batch, i)) for i in range(2))
    mean = {name: (x + other[name]) / 2 for name, x in one.items()}

    module = TrainedModule(checkpointed(model) if checkpointing else model, adapter)
    ddp = DistributedDataParallel(module)
    for _ in range(2):  # at the second DDP says which parameters had no gradient at the first
        found, parts = gradient_of(ddp, half_of(batch, rank))
    assert same_on_both(found) == (True, None)
    for name, x in mean.items():
        assert torch.equal(found[name], x), f"{kind}: {name} is not the mean of the halves'"
    assert parts.keys() == losses.keys()
    assert all(x.isfinite() and x.dim() == 0 and x.device.type == "cpu" for x in parts.values())
    assert not same_on_both({"loss": parts["loss"]})[0], "each process has its own half"
    assert all(x.grad is None for x in module.model.parameters())
    return by_kind(mean), by_kind(whole)


@two_processes
def test_gradients_are_the_mean_of_both_processes(rank):
    """Bit for bit that of the halves' gradients in one process; of a mean also that of the whole batch."""
    for kind in OBJECTIVES:
        mean, whole = check_gradients(rank, "llava-llama", kind, False)
        if kind in MEANS:
            assert_same_gradients(mean, whole)
        else:
            # Synergy is of the correlations over all tokens of a batch: no mean of halves.
            with pytest.raises(AssertionError):
                assert_same_gradients(mean, whole)


@two_processes
def test_gradient_checkpointing(rank):
    for kind in CHECKPOINTED:
        check_gradients(rank, "llava-llama", kind, True)


@pytest.mark.slow
@two_processes
def test_other_families(rank):
    for family in ("gemma3", "idefics", "idefics2", "qwen2_5_vl"):
        for kind in OBJECTIVES:
            check_gradients(rank, family, kind, False)


@two_processes
def test_processes_count_the_same_however_many_labels_they_have(rank):
    """What README says: the mean of the processes' means, not of all tokens."""
    model = tiny_model("llava-llama")
    adapter, batch = adapter_for(model, "live"), batch_for(model, "live")
    labels = batch.labels.clone()
    labels[:2, -3:-1] = -100  # one answer token in each of the first half's rows, three in the others
    batch = replace(batch, labels=labels)
    alone = TrainedModule(copy.deepcopy(model), copy.deepcopy(adapter))
    halves = [by_kind(gradient_of(alone, half_of(batch, i))[0]) for i in range(2)]
    whole = by_kind(gradient_of(alone, batch)[0])
    ddp = DistributedDataParallel(TrainedModule(model, adapter))
    found = by_kind(gradient_of(ddp, half_of(batch, rank))[0])
    for name, x in found.items():
        one, other = (half[name] for half in halves)
        assert torch.equal(x, (one + other) / 2)
        assert (x - whole[name]).norm() > 0.01 * x.norm()
    assert_same_gradients({name: (half + 3 * halves[1][name]) / 4 for name, half in halves[0].items()}, whole)


@two_processes
def test_a_process_without_demonstrations_takes_part(rank):
    """One process's queries have none; the other's do."""
    model = tiny_model("llava-llama")
    ddp = DistributedDataParallel(TrainedModule(model, adapter_for(model, "aim")))
    batch = half_of(batch_for(model, "aim"), rank)
    mine = batch if rank == 1 else replace(batch, chosen=[[], []])
    for _ in range(2):
        found, losses = gradient_of(ddp, mine)
    assert same_on_both(found) == (True, None)
    assert all(x.any() and x.isfinite().all() for x in found.values())
    assert losses["loss"].isfinite()
    alone = TrainedModule(tiny_model("llava-llama"), adapter_for(model, "aim"))
    expected, _ = gradient_of(alone, half_of(batch_for(model, "aim"), 1))
    for name, x in expected.items():
        assert torch.equal(found[name], x / 2)


@two_processes
def test_an_objective_around_ddp_is_refused(rank):
    """The old recipe, an objective beside DDP of an AdaptedModel, calls the model and not DDP."""
    for kind in OBJECTIVES:
        model = tiny_model("llava-llama")
        adapted = TrainedModule(model, adapter_for(model, kind))
        ddp = DistributedDataParallel(adapted)
        batch = half_of(batch_for(model, kind), rank)
        adapted.objective(batch).total.backward()
        found = gradients(adapted.adapter)
        both = {name: [torch.empty_like(x) for _ in range(2)] for name, x in found.items()}
        for name, x in found.items():
            dist.all_gather(both[name], x)
        assert all((x - y).norm() > 0.01 * x.norm() for x, y in both.values()), kind
        before = copy.deepcopy(adapted.adapter.state_dict())
        for wrong in (adapted.objective, adapted):
            with pytest.raises(
                RuntimeError, match=r"2 processes train and objective is a .*DistributedDataP.*Tra"
            ):
                train(wrong, trainable(adapted.adapter), [batch], 1, model=ddp, progress=False)
        assert all(torch.equal(x, before[name]) for name, x in adapted.adapter.state_dict().items())


@two_processes
def test_train(rank):
    """The loop, with what objectives ask of it, against one process that has the mean of both gradients."""
    settings = TrainingConfig(learning_rate=0.05, weight_decay=0.5, measure_every=2)
    for kind in ("mimic", "live", "aim"):
        model = tiny_model("llava-llama")
        start, batch = adapter_for(model, kind), batch_for(model, kind)
        ddp = DistributedDataParallel(TrainedModule(model, copy.deepcopy(start)))
        log = train(
            ddp, trainable(ddp.module.adapter), [half_of(batch, rank)] * 3, 3, config=settings,
            progress=False,
        )  # fmt: skip
        assert same_on_both(dict(ddp.module.adapter.named_parameters())) == (True, None)
        assert [("ce/gradient_norm" in row) for row in log] == [True, False, True]

        alone = TrainedModule(tiny_model("llava-llama"), copy.deepcopy(start))

        def mean_of_halves(batch, alone=alone):
            halves = [alone.objective(half_of(batch, i)) for i in range(2)]
            return replace(halves[0], total=(halves[0].total + halves[1].total) / 2)

        mean_of_halves.learning_rates = alone.objective.learning_rates
        mean_of_halves.decay_to_identity = alone.objective.decay_to_identity
        with patch("torch.distributed.is_initialized", return_value=False):  # alone
            train(
                mean_of_halves, trainable(alone.adapter), [batch] * 3, 3, model=alone, config=settings,
                progress=False,
            )  # fmt: skip
        for (name, x), y in zip(
            trainable(ddp.module.adapter).items(), alone.adapter.parameters(), strict=True
        ):
            assert torch.equal(x, y) and not torch.equal(x, start.get_parameter(name)), (kind, name)


@two_processes
def test_parameters_that_are_not_averaged_are_refused(rank):
    """A parameter of the model beside the adapter's would drift apart."""
    model = tiny_model("llava-llama")
    ddp = DistributedDataParallel(TrainedModule(model, adapter_for(model, "live")))
    model.lm_head.weight.requires_grad_(True)
    parameters = trainable(ddp.module.adapter) | {"head": model.lm_head.weight}
    with pytest.raises(
        RuntimeError, match=r"parameters has \['head'\], which DistributedDataParallel does not"
    ):
        train(ddp, parameters, [], 1, progress=False)


@two_processes
def test_a_loss_that_is_not_finite_stops_both(rank):
    """One process's loss is not finite: both stop, and neither waits for the other."""
    model = tiny_model("llava-llama")
    ddp = DistributedDataParallel(TrainedModule(model, adapter_for(model, "live")))
    before = copy.deepcopy(ddp.module.adapter.state_dict())
    batch = half_of(batch_for(model, "live"), rank)
    if rank == 1:
        batch.student["pixel_values"].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="at step 0"):
        train(ddp, trainable(ddp.module.adapter), [batch] * 2, 2, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in ddp.module.adapter.state_dict().items())


@two_processes
def test_looking_for_unused_parameters_changes_nothing(rank):
    """As a Trainer asks for it of modules that are not transformers' own."""
    for kind in ("mimic", "live", "m2iv", "aim"):
        model = tiny_model("llava-llama")
        module = TrainedModule(model, adapter_for(model, kind))
        batch = half_of(batch_for(model, kind), rank)
        expected, _ = gradient_of(DistributedDataParallel(module), batch)
        found, _ = gradient_of(DistributedDataParallel(module, find_unused_parameters=True), batch)
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


def check_accelerate(rank):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for kind in ("mimic", "aim"):
        model = tiny_model("llava-llama")
        module, batch = TrainedModule(model, adapter_for(model, kind)), batch_for(model, kind)
        expected, _ = gradient_of(DistributedDataParallel(module), half_of(batch, rank))
        prepared = accelerator.prepare(module)
        assert isinstance(prepared, DistributedDataParallel)
        module.zero_grad()
        accelerator.backward(prepared(**half_of(batch, rank).arguments())["loss"])
        assert all(torch.equal(x.grad, expected[name]) for name, x in module.adapter.named_parameters())
        train(prepared, trainable(module.adapter), [half_of(batch, rank)], 1, progress=False)
        assert same_on_both(dict(module.adapter.named_parameters())) == (True, None)


def test_accelerate():
    pytest.importorskip("accelerate")
    in_two_processes(check_accelerate)
