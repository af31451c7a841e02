"""The loop's optimisation step by step, what it freezes, how it stops, and the same run in fp64."""

import functools
import math

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.methods.mimic.objective import MimICObjective
from mmicl_kernels.testing.budgets import unit_roundoff
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.training import Losses, TrainingConfig, train, trainable
from tests.support.episode_inputs import episode
from tests.support.published import in_double, random_adapter

STEPS = 20


@functools.cache
def trained(impl, dtype, normalizer, seed):
    """All parameters after ``STEPS`` steps, as one fp64 vector."""
    model = tiny_model("llava-llama")
    model = in_double(model) if dtype == torch.float64 else model
    torch.manual_seed(seed)
    adapter = mk.create(model, mk.MimICConfig(normalizer=normalizer)).to(dtype)
    start = nn.utils.parameters_to_vector(adapter.parameters()).detach().double()
    batches = (episode(model, seed=i, padding="left") for i in range(STEPS))
    with mk.attach(model, adapter, impl=impl) as handle:
        log = train(
            MimICObjective(handle), trainable(adapter), batches, STEPS, model=model,
            config=TrainingConfig(measure_every=0), progress=False,
        )  # fmt: skip
    assert [set(losses) for losses in log] == [{"loss", "align", "ce"}] * STEPS
    return nn.utils.parameters_to_vector(adapter.parameters()).detach().double() - start


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
def test_composed_trains_like_autograd_of_the_reference(normalizer, seed):
    """Twenty steps from one start; how far fp32 strays from fp64 by autograd alone sets the budgets."""
    exact = trained("reference", torch.float64, normalizer, seed)
    low = trained("reference", torch.float32, normalizer, seed)
    composed = trained("composed", torch.float32, normalizer, seed)
    composed_exact = trained("composed", torch.float64, normalizer, seed)
    assert exact.abs().max() > 0.01, "nothing was learned"
    low_error, error, exact_error = (
        float((x - exact).norm() / exact.norm()) for x in (low, composed, composed_exact)
    )
    assert error <= 2 * low_error + unit_roundoff(torch.float32)
    scale = unit_roundoff(torch.float64) / unit_roundoff(torch.float32)
    assert exact_error <= 2 * scale * low_error + unit_roundoff(torch.float64)


class Toy(nn.Module):
    """A model with frozen and unfrozen parameters beside the ones that are trained."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.never = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.adapter = nn.Linear(3, 1)

    def objective(self, batch):
        total = self.adapter(self.base(batch)).square().mean()
        return Losses(total, {"square": total.detach()})

    def trained(self):
        return dict(self.adapter.named_parameters())


def inputs(count):
    return [torch.randn(4, 3) for _ in range(count)]


def watch_optimizer(monkeypatch, watch):
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        watch(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)


@pytest.mark.parametrize("steps, warmup", [(20, 0.1), (7, 0.5), (1, 0.1), (10, 0.0)])
def test_learning_rates(monkeypatch, steps, warmup):
    rates = []
    watch_optimizer(monkeypatch, lambda optimizer: rates.append([x["lr"] for x in optimizer.param_groups]))
    model = Toy()
    config = TrainingConfig(learning_rate=0.5, warmup=warmup)
    train(model.objective, model.trained(), inputs(steps), steps, model=model, config=config, progress=False)
    assert all(len(set(groups)) == 1 for groups in rates)
    rates = [groups[0] for groups in rates]
    rising = max(1, round(steps * warmup))
    assert len(rates) == steps
    assert rates[0] == pytest.approx(0.5 / rising, rel=1e-12)
    assert rates[rising - 1] == pytest.approx(0.5, rel=1e-12), "the end of the warm-up"
    if steps > 1:
        length = steps - rising
        assert rates[-1] == pytest.approx(0.25 * (1 + math.cos(math.pi * (length - 1) / length)), rel=1e-12)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)


def test_defaults_are_the_papers():
    assert TrainingConfig() == TrainingConfig(learning_rate=5e-3, weight_decay=1e-3, warmup=0.1, clip=1.0)


def test_biases_do_not_decay():
    """With no gradient at all only the decay moves parameters: by ``1 - lr * decay`` each step."""
    model = Toy()
    before = {name: x.detach().clone() for name, x in model.trained().items()}

    def objective(batch):
        return Losses(sum((x * 0.0).sum() for x in model.adapter.parameters()), {})

    config = TrainingConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0)
    train(objective, model.trained(), inputs(1), 1, model=model, config=config, progress=False)
    torch.testing.assert_close(model.adapter.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.adapter.bias.detach(), before["bias"])


def test_decay_to_the_identity():
    """With no gradient a matrix moves along the line to the identity, by ``lr * decay`` of it each step."""
    model = Toy()
    matrix = torch.nn.Parameter(torch.randn(3, 3))
    before, plain = matrix.detach().clone(), model.adapter.weight.detach().clone()

    class Objective:
        decay_to_identity = ("matrix",)

        def __call__(self, batch):
            return Losses((matrix * 0.0).sum() + (model.adapter.weight * 0.0).sum(), {})

    config = TrainingConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0)
    parameters = {"matrix": matrix, "weight": model.adapter.weight}
    train(Objective(), parameters, inputs(1), 1, model=model, config=config, progress=False)
    torch.testing.assert_close(matrix.detach(), torch.lerp(before, torch.eye(3), 0.1 * 0.5))
    torch.testing.assert_close(model.adapter.weight.detach(), plain * (1 - 0.1 * 0.5))


def test_an_adapters_biases_are_found(monkeypatch):
    groups = []
    watch_optimizer(monkeypatch, lambda optimizer: groups.extend(optimizer.param_groups))
    model = tiny_model("llava-llama")
    adapter = random_adapter(model)
    with mk.attach(model, adapter) as handle:
        train(MimICObjective(handle), trainable(adapter), [episode(model)], 1, model=model, progress=False)
    decays = {id(x): group["weight_decay"] for group in groups for x in group["params"]}
    assert {name: decays[id(x)] for name, x in adapter.named_parameters()} == {
        name: 0.0 if name.endswith("bias") else 1e-3 for name, _ in adapter.named_parameters()
    }


def test_gradients_are_clipped_together(monkeypatch):
    norms = []

    def watch(optimizer):
        grads = [x.grad for group in optimizer.param_groups for x in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    watch_optimizer(monkeypatch, watch)
    model = Toy()
    data = [x * 1e3 for x in inputs(3)]
    config = TrainingConfig(clip=0.25)
    train(model.objective, model.trained(), data, 3, model=model, config=config, progress=False)
    assert norms == pytest.approx([0.25] * 3, rel=1e-4)  # clip_grad_norm_ adds 1e-6 to the norm


@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_frozen_meanwhile(fails):
    model = Toy()
    flags = {name: x.requires_grad for name, x in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    seen = []

    def objective(batch):
        seen.append({name for name, x in model.named_parameters() if x.requires_grad})
        if fails and len(seen) == 2:
            raise ZeroDivisionError
        return model.objective(batch)

    def run():
        return train(objective, model.trained(), inputs(3), 3, model=model, progress=False)

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert seen == [{"adapter.weight", "adapter.bias"}] * (2 if fails else 3)
    assert {name: x.requires_grad for name, x in model.named_parameters()} == flags
    assert model.base.weight.grad is None and model.base.bias.grad is None
    assert model.adapter.weight.grad is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(value):
    model = Toy()
    kept = []

    def objective(batch):
        kept[:] = [x.detach().clone() for x in model.adapter.parameters()]
        losses = model.objective(batch)
        if float(batch[0, 0]) == 7.0:
            return Losses(losses.total * value, losses.parts)
        return losses

    data = inputs(4)
    data[2][0, 0] = 7.0
    flags = [x.requires_grad for x in model.parameters()]
    with pytest.raises(FloatingPointError, match="step 2"):
        train(objective, model.trained(), data, 4, model=model, progress=False)
    assert all(torch.equal(x, y) for x, y in zip(model.adapter.parameters(), kept, strict=True))
    assert [x.requires_grad for x in model.parameters()] == flags


def test_batches_that_end_early():
    model = Toy()
    with pytest.raises(ValueError, match="batches ended after 2, expected 3"):
        train(model.objective, model.trained(), inputs(2), 3, model=model, progress=False)


def test_only_the_steps_asked_for_are_drawn():
    model = Toy()
    batches = iter(inputs(5))
    log = train(model.objective, model.trained(), batches, 3, model=model, progress=False)
    assert len(list(batches)) == 2
    assert [sorted(losses) for losses in log] == [["loss", "square"]] * 3
    assert all(losses["loss"] == losses["square"] for losses in log)


def test_nothing_to_train():
    model = Toy()
    with pytest.raises(ValueError, match="parameters is empty"):
        train(model.objective, {}, inputs(1), 1, model=model, progress=False)
    with pytest.raises(TypeError, match="model is None, expected one: the objective is a method"):
        train(model.objective, model.trained(), inputs(1), 1, progress=False)


def test_progress(capsys):
    model = Toy()
    train(model.objective, model.trained(), inputs(2), 2, model=model, progress=False)
    assert capsys.readouterr().err == ""
    train(model.objective, model.trained(), inputs(2), 2, model=model)
    assert "training: 100%" in capsys.readouterr().err


def test_trainable_leaves_out_what_is_frozen():
    adapter = random_adapter(tiny_model("llava-llama"))
    adapter.layers["1"].shift.requires_grad_(False)
    assert set(trainable(adapter)) == {x for x, _ in adapter.named_parameters()} - {"layers.1.shift"}
