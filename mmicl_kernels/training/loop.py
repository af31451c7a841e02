"""A plain training loop: AdamW, linear warm-up, cosine decay, clipping, a progress bar."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from mmicl_kernels.training.objectives import Losses

Batch = TypeVar("Batch")  # what the objective takes


@dataclass(frozen=True)
class TrainingConfig:
    """The MimIC paper's optimisation; ``warmup`` is a fraction of the steps."""

    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0


def train(
    objective: Callable[[Batch], Losses],
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Batch],
    steps: int,
    *,
    model: nn.Module,
    config: TrainingConfig | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Minimise ``objective`` over ``parameters`` for ``steps`` batches, one update each.

    All other parameters of ``model`` are frozen meanwhile, so that no gradient is computed for them.
    An objective may have ``learning_rates``, by the last part of a parameter's name, as those of M2IV and
    LIVE have for their scales; they follow the same schedule. One may have ``decay_to_identity``, names of
    square matrices that weight decay pulls to the identity instead of to 0, as AIM has.

    Returns:
        the losses of each step.

    Raises:
        ValueError: nothing to train, or ``batches`` ends early. FloatingPointError: a loss or a
        gradient is not finite; the parameters are those before that step.
    """
    if not parameters:
        raise ValueError("parameters is empty, expected at least one to train")
    config = config or TrainingConfig()
    rates = getattr(objective, "learning_rates", {})
    to_identity = {id(parameters[name]) for name in getattr(objective, "decay_to_identity", ())}
    optimizer = torch.optim.AdamW(_groups(parameters, config, rates))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup))
    log = []
    bar = tqdm(total=steps, desc="training", unit="step", disable=not progress)
    with bar, frozen(model, parameters):
        for batch in islice(batches, steps):
            losses = objective(batch)
            log.append({"loss": losses.total.item()} | {k: x.item() for k, x in losses.parts.items()})
            if not math.isfinite(log[-1]["loss"]):
                raise FloatingPointError(f"the loss is {log[-1]} at step {len(log) - 1}, expected finite")
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient's norm is {norm} at step {len(log) - 1}")
            optimizer.step()
            _decay_to_identity(optimizer, to_identity)
            schedule.step()
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in log[-1].items()}, refresh=False)
    if len(log) < steps:
        raise ValueError(f"batches ended after {len(log)}, expected {steps}")
    return log


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


@torch.no_grad()
def _decay_to_identity(optimizer: torch.optim.Optimizer, matrices: set[int]) -> None:
    """AdamW's decay took a share of each matrix; as much of the identity takes its place."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in matrices:
                parameter.diagonal().add_(group["lr"] * group["weight_decay"])


def _groups(
    parameters: dict[str, nn.Parameter], config: TrainingConfig, rates: dict[str, float]
) -> list[dict]:
    """By learning rate and weight decay, which the biases have none of, as in the official code."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = rates.get(name.rpartition(".")[2], config.learning_rate)
        decay = 0.0 if "bias" in name else config.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: up to 1 over the warm-up, then along a half cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
