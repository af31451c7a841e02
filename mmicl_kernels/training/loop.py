"""A plain training loop: AdamW, linear warm-up, cosine decay, clipping, a progress bar."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mmicl_kernels.methods.measures import describe_large_shares
from mmicl_kernels.methods.objective import Losses, Objective
from mmicl_kernels.training.module import TrainedModule
from mmicl_kernels.training.optimizer import decay_to_identity, parameter_groups

Batch = TypeVar("Batch")  # what the objective takes


@dataclass(frozen=True)
class TrainingConfig:
    """The MimIC paper's optimisation; ``warmup`` is a fraction of the steps.

    At the first step and every ``measure_every`` steps it is measured which part of the loss decides, for one
    more backward pass of each part; 0 is never.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    measure_every: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.measure_every, bool) or not isinstance(self.measure_every, int):
            raise TypeError(f"measure_every is {self.measure_every!r}, expected an int")
        if self.measure_every < 0:
            raise ValueError(f"measure_every is {self.measure_every}, expected at least 0")


def train(
    objective: Callable[[Batch], Losses] | nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Batch],
    steps: int,
    *,
    model: nn.Module | None = None,
    config: TrainingConfig | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Minimise ``objective`` over ``parameters`` for ``steps`` batches, one update each.

    ``objective`` is one of the methods', any function that returns ``Losses``, a :class:`TrainedModule`, or
    DistributedDataParallel of that, which is the only way with several processes. All other parameters of
    ``model``, by default of such a module, are frozen meanwhile, so that no gradient is computed for them.
    The learning rates that an :class:`Objective` asks for follow the same schedule.

    Warns, once, when one layer, token or channel has more than half of a part of the loss.

    Returns:
        the losses of each step, this process's own, and where measured also what
        :mod:`mmicl_kernels.methods.measures` names: "align/gradient_norm", "align/layer_share", and so on.

    Raises:
        ValueError: nothing to train, or ``batches`` ends early. RuntimeError: several processes whose
        gradients would not be averaged. FloatingPointError: a loss or a gradient is not finite; the
        parameters are those before that step.
    """
    if not parameters:
        raise ValueError("parameters is empty, expected at least one to train")
    _refuse_unaveraged(objective, parameters)
    config = config or TrainingConfig()
    inner = _inner(objective)
    groups = parameter_groups(parameters, config.learning_rate, config.weight_decay, inner)
    optimizer = torch.optim.AdamW(groups)
    decay_to_identity(optimizer, parameters, inner)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup))
    log, warned = [], False
    bar = tqdm(total=steps, desc="training", unit="step", disable=not progress)
    with bar, frozen(_frozen_model(objective, model), parameters):
        for batch in islice(batches, steps):
            with _measuring(inner, len(log), config.measure_every):
                losses = _call(objective, batch)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            log.append({"loss": losses.total.item()} | {k: x.item() for k, x in losses.parts.items()})
            _refuse_infinite(log, norm)
            optimizer.step()
            schedule.step()
            warned = warned or _warn_of_shares(log[-1])
            bar.update()
            shown = {name: f"{value:.4f}" for name, value in log[-1].items() if "/" not in name}
            bar.set_postfix(shown, refresh=False)
    if len(log) < steps:
        raise ValueError(f"batches ended after {len(log)}, expected {steps}")
    return log


def _inner(objective: object) -> object:
    """The objective inside of a :class:`TrainedModule`, which DDP may wrap; any other is its own."""
    module = objective.module if isinstance(objective, DistributedDataParallel) else objective
    return module.objective if isinstance(module, TrainedModule) else objective


def _call(objective: Callable, batch: Batch) -> Losses:
    if _inner(objective) is objective:
        return objective(batch)
    parts = dict(objective(**batch.arguments()))
    return Losses(parts.pop("loss"), parts)


def _frozen_model(objective: object, model: nn.Module | None) -> nn.Module:
    model = objective if model is None else model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is None, expected one: the objective is a {type(objective).__name__}")
    return model


def _refuse_unaveraged(objective: object, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise RuntimeError if there are several processes and DDP does not average all the gradients."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    expected = "expected DistributedDataParallel(TrainedModule(model, adapter)): they would drift apart"
    if not isinstance(objective, DistributedDataParallel):
        kind = type(objective).__name__
        raise RuntimeError(f"{dist.get_world_size()} processes train and objective is a {kind}, {expected}")
    ignored = objective.parameters_to_ignore
    averaged = {id(x) for name, x in objective.module.named_parameters() if name not in ignored}
    left = [name for name, x in parameters.items() if id(x) not in averaged]
    if left:
        raise RuntimeError(
            f"parameters has {left}, which DistributedDataParallel does not average, {expected}"
        )


@contextmanager
def _measuring(inner: object, step: int, every: int) -> Iterator[None]:
    if not isinstance(inner, Objective):
        yield
        return
    inner.measures = every > 0 and step % every == 0
    try:
        yield
    finally:
        inner.measures = False


def _refuse_infinite(log: list[dict[str, float]], norm: torch.Tensor) -> None:
    # After the backward pass, which carries it to the other processes: all of them stop.
    if not math.isfinite(log[-1]["loss"]):
        raise FloatingPointError(f"the loss is {log[-1]} at step {len(log) - 1}, expected finite")
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm} at step {len(log) - 1}")


def _warn_of_shares(measured: Mapping[str, float]) -> bool:
    message = describe_large_shares(measured)
    if message is not None:
        warnings.warn(message, stacklevel=3)
    return message is not None


@contextmanager
def frozen(model: nn.Module, except_for: dict[str, nn.Parameter]) -> Iterator[None]:
    """No parameter of ``model`` but ``except_for`` asks for gradients within a ``with`` block."""
    kept = {id(parameter) for parameter in except_for.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: up to 1 over the warm-up, then along a half cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
