"""What the methods ask of an optimizer: learning rates of their own, and decay to the identity."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float, objective: object
) -> list[dict[str, Any]]:
    """By learning rate and weight decay, which the biases have none of, as in the official code.

    ``objective`` may have ``learning_rates`` of its own, by the last part of a parameter's name.
    """
    rates = getattr(objective, "learning_rates", {})
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = rates.get(name.rpartition(".")[2], learning_rate)
        decay = 0.0 if "bias" in name else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def decay_to_identity(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], objective: object
) -> None:
    """From now on AdamW's decay pulls the matrices to the identity that ``objective`` names so.

    The decay takes a share of each matrix; after a step as much of the identity takes its place.
    """
    ends = getattr(objective, "decay_to_identity", ())
    matrices = _named(parameters, ends)
    if not matrices:
        return

    @torch.no_grad()
    def restore(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in matrices:
                    parameter.diagonal().add_(group["lr"] * group["weight_decay"])

    optimizer.register_step_post_hook(restore)


def _named(parameters: Mapping[str, nn.Parameter], ends: Iterable[str]) -> set[int]:
    """The ids of those whose name is, or ends with, one of ``ends``."""
    return {id(x) for name, x in parameters.items() if any(f".{name}".endswith(f".{end}") for end in ends)}
