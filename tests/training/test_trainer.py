"""TrainedModule in others' loops: the Trainer of transformers, and accelerate."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.training import TrainedModule, trainable
from tests.support.episode_inputs import aggregation, episode, half_of, many_shot
from tests.support.published import random_adapter
from tests.support.residuals import random_shift
from tests.support.same_adapter import assert_same, by_kind

pytest.importorskip("accelerate")
# An update's roundings: the same sums in another order, through three or four layers.
EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 64 * EPS
ADAPTERS = {
    "mimic": random_adapter,
    "live": lambda model: random_shift(model, mk.LIVEConfig()),
    "m2iv": lambda model: random_shift(model, mk.M2IVConfig(synergy_weight=0.125)),
    "aim": lambda model: mk.create(model, mk.AIMConfig()),
    "prompt_tuning": lambda model: mk.create(model, mk.PromptTuningConfig(std=1.0)),
}
METHODS = [pytest.param(x, marks=[] if x == "live" else pytest.mark.slow) for x in ADAPTERS]


def module_for(method):
    model = tiny_model("llava-llama")
    torch.manual_seed(1)
    return TrainedModule(model, ADAPTERS[method](model))


def batches_for(method, count):
    """Of four queries each, all with as many answer tokens."""
    model, chosen = tiny_model("llava-llama"), ((0, 1), (1,), (2, 3), (3,))
    if method == "aim":
        return [aggregation(model, padding=None, chosen=chosen, seed=i) for i in range(count)]
    made = [episode(model, batch=4, seed=i) for i in range(count)]
    return [many_shot(model, batch=4), *made[1:]] if method == "live" else made


def trainer(module, folder, batches, **options):
    """Plain descent on batches that are made already; writes down which it was given."""
    from transformers import Trainer, TrainingArguments

    given = []

    def collate(rows):
        (batch,) = rows
        given.append(batch)
        return batch.arguments()

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, per_device_eval_batch_size=1,
        learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        remove_unused_columns=False, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        **options,
    )  # fmt: skip
    made = Trainer(module, arguments, train_dataset=batches, eval_dataset=batches[:3], data_collator=collate)
    return made, given


def descend(module, batches):
    module.train()
    optimizer = torch.optim.SGD(trainable(module.adapter).values(), lr=0.5)
    for batch in batches:
        optimizer.zero_grad()
        module(**batch.arguments())["loss"].backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_trainer(method, tmp_path):
    """Steps as written out, checkpoints of the adapter alone, resuming, the loss of an evaluation."""
    module, batches = module_for(method), batches_for(method, 4)
    start = copy.deepcopy(module.adapter.state_dict())
    training, given = trainer(module, tmp_path, batches, max_steps=3, save_steps=2)
    training.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == {f"adapter.{name}" for name in start}
    assert all(torch.equal(saved[f"adapter.{name}"], x) for name, x in module.adapter.state_dict().items())
    assert not any(torch.equal(x, start[name]) for name, x in module.adapter.state_dict().items())

    alone = module_for(method)
    descend(alone, given[:3])
    assert_same(module.adapter, alone.adapter)

    resumed = module_for(method)
    again, _ = trainer(resumed, tmp_path / "again", batches, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.adapter, module.adapter)

    with torch.no_grad():
        losses = [float(alone(**batch.arguments())["loss"]) for batch in batches[:3]]
    assert training.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 3, rel=ROUNDINGS)
    assert max(losses) - min(losses) > 10 * ROUNDINGS


@pytest.mark.parametrize("method", [x for x in METHODS if "m2iv" not in x.values])
def test_accumulated_halves_are_the_whole_batch(method, tmp_path):
    """The Trainer divides the loss, as it does not for a module whose loss is a sum, divided already."""
    (whole,) = batches_for(method, 1)
    module, alone = module_for(method), module_for(method)
    start = copy.deepcopy(module.adapter)
    halves = [half_of(whole, i) for i in range(2)]
    training, given = trainer(module, tmp_path, halves, max_steps=1, gradient_accumulation_steps=2)
    training.train()
    assert len(given) == 2
    descend(alone, [whole])
    for kind, x in by_kind(dict(module.adapter.named_parameters())).items():
        y, z = (by_kind(dict(of.named_parameters()))[kind] for of in (alone.adapter, start))
        # A scale's gradient is a sum over C terms, about sqrt(C) times smaller than they are.
        cancellation = 32**0.5 if kind == "scale" else 1.0
        allowed = ROUNDINGS * cancellation * (y - z).norm() + EPS * y.norm()
        assert (x - y).norm() <= allowed < (y - z).norm(), kind


def test_gradient_checkpointing(tmp_path):
    module, batches = module_for("live"), batches_for("live", 2)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    training, given = trainer(module, tmp_path, batches, max_steps=2, **options)
    calls = []
    module.handle.anchors[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    training.train()
    assert sum(calls) == 2 * 2, "each step runs the student's layer once more"
    alone = module_for("live")
    descend(alone, given[:2])
    assert_same(module.adapter, alone.adapter)


def test_accelerate_in_one_process():
    from accelerate import Accelerator

    module, batches = module_for("live"), batches_for("live", 2)
    optimizer = torch.optim.SGD(trainable(module.adapter).values(), lr=0.5)
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader([x.arguments() for x in batches], batch_size=None)
    prepared, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    for arguments in loader:
        optimizer.zero_grad()
        accelerator.backward(prepared(**arguments)["loss"])
        optimizer.step()
    alone = module_for("live")
    descend(alone, batches)
    assert_same(module.adapter, alone.adapter)
