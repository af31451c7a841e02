"""TrainedModule is the method's objective: the same losses, gradients, checks and training."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.aim.objective import AIMObjective
from mmicl_kernels.methods.live.objective import LIVEObjective
from mmicl_kernels.methods.m2iv.objective import M2IVObjective
from mmicl_kernels.methods.mimic.objective import MimICObjective
from mmicl_kernels.methods.prompt_tuning.objective import PromptTuningObjective
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.training import TrainedModule, TrainingConfig, train, trainable
from tests.support.episode_inputs import aggregation, episode, many_shot, objective_of
from tests.support.published import logits, random_adapter
from tests.support.residuals import random_shift

CASES = {
    "mimic": (MimICObjective, random_adapter, episode),
    "live": (LIVEObjective, lambda model: random_shift(model, mk.LIVEConfig()), many_shot),
    "m2iv": (M2IVObjective, random_shift, episode),
    "aim": (AIMObjective, lambda model: mk.create(model, mk.AIMConfig()), aggregation),
    "prompt_tuning": (
        PromptTuningObjective,
        lambda model: mk.create(model, mk.PromptTuningConfig()),
        episode,
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_it_is_the_objective(method):
    kind, make, draw = CASES[method]
    model = tiny_model("llava-llama").requires_grad_(False)
    torch.manual_seed(0)
    adapter, batch = make(model), draw(model)
    with mk.attach(model, adapter) as handle:
        losses = kind(handle)(batch)
        losses.total.backward()
    expected = {name: x.grad.clone() for name, x in adapter.named_parameters()}
    adapter.zero_grad()
    module = TrainedModule(model, adapter)
    assert type(module.objective) is kind
    found = module(**batch.arguments())
    found["loss"].backward()
    assert list(found) == ["loss", *losses.parts]
    assert torch.equal(found["loss"], losses.total)
    assert all(
        torch.equal(found[name], x) and not found[name].requires_grad for name, x in losses.parts.items()
    )
    assert all(torch.equal(x.grad, expected[name]) for name, x in adapter.named_parameters())
    assert all(x.grad is None for x in model.parameters())

    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.adapter.parameters():
            parameter.add_(1.0)
    assert not torch.equal(other(**batch.arguments())["loss"], losses.total)
    assert torch.equal(module(**batch.arguments())["loss"], losses.total)


def test_its_signature_is_what_trainers_read():
    parameters = inspect.signature(TrainedModule.forward).parameters
    assert list(parameters) == ["self", "inputs", "labels", "shares"]
    assert {x.kind for x in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    module = TrainedModule(tiny_model("llava-llama"), random_adapter(tiny_model("llava-llama")))
    assert module.accepts_loss_kwargs is False


def test_what_a_batch_must_be_is_checked():
    model = tiny_model("llava-llama")
    module, batch = TrainedModule(model, random_adapter(model)), many_shot(model, passes=1)
    arguments = batch.arguments()
    other = {**batch.teacher, "input_ids": batch.teacher["input_ids"].roll(1, 1)}
    with pytest.raises(ValueError, match="teacher_query marks id"):
        module(arguments["inputs"] | {"teacher": other}, arguments["labels"])
    with pytest.raises(ValueError, match=r"labels is torch.int64 \[2, 11\], expected torch.int64 \[2, 12\]"):
        module(arguments["inputs"], arguments["labels"][:, 1:])
    with pytest.raises(TypeError, match="unexpected keyword argument 'pupil'"):
        module(arguments["inputs"] | {"pupil": other}, arguments["labels"])
    with pytest.raises(ValueError, match="further has 2 teacher passes, expected none for MimIC"):
        module(**many_shot(model).arguments())
    module(**arguments)


def test_an_adapter_without_an_objective():
    class Other(Adapter):
        method = "other"

    model = tiny_model("llava-llama")
    plain = logits(model, episode(model).student)
    stranger = Other.__new__(Other)
    with pytest.raises(TypeError, match="adapter is a Other: Other has no objective_class"):
        TrainedModule(model, stranger)
    assert torch.equal(logits(model, episode(model).student), plain)
    mk.attach(model, random_adapter(model)).detach()


@pytest.mark.parametrize("method", CASES)
def test_train_is_that_of_the_objective(method):
    """With the learning rates of scales and the decay to the identity, however parameters are named."""
    _, make, draw = CASES[method]
    config = TrainingConfig(learning_rate=0.05, weight_decay=0.5)
    logs, states = [], []
    for through in ("objective", "module", "module's names"):
        model = tiny_model("llava-llama")
        torch.manual_seed(0)
        adapter, batch = make(model), draw(model)
        if through == "objective":
            given = {"model": model, "config": config, "progress": False}
            with mk.attach(model, adapter) as handle:
                logs.append(train(objective_of(handle), trainable(adapter), [batch] * 3, 3, **given))
        else:
            module = TrainedModule(model, adapter)
            parameters = trainable(adapter if through == "module" else module)
            logs.append(train(module, parameters, [batch] * 3, 3, config=config, progress=False))
        states.append(adapter.state_dict())
    assert logs[0] == logs[1] == logs[2]
    for name, x in states[0].items():
        assert torch.equal(x, states[1][name]) and torch.equal(x, states[2][name])


def test_a_query_needs_a_token():
    batch = episode(tiny_model("llava-llama"))
    mine, theirs = torch.zeros_like(batch.student_query), torch.zeros_like(batch.teacher_query)
    with pytest.raises(ValueError, match="student_query marks no token, expected at least one"):
        replace(batch, student_query=mine, teacher_query=theirs)
