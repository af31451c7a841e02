"""A user's model and random numbers as they were, whatever a training did meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# transformers puts it on a model at its first call, and remembers that it did.
CAPTURE = "output_capturing_hook"


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What a training changes in a model is undone at the end of a ``with`` block.

    Which parameters ask for gradients, and those that they have, the modules' modes and hooks, gradient
    checkpointing, the cache.
    """
    parameters = {name: (x.requires_grad, x.grad) for name, x in model.named_parameters()}
    modes = {name: x.training for name, x in model.named_modules()}
    hooks = {name: _hooks(x) for name, x in model.named_modules()}
    checkpointing = {
        name: x.gradient_checkpointing
        for name, x in model.named_modules()
        if hasattr(x, "gradient_checkpointing")
    }
    config = vars(model.config)
    cache = {"use_cache": config["use_cache"]} if "use_cache" in config else {}
    try:
        yield
    finally:
        for name, x in model.named_parameters():
            requires_grad, x.grad = parameters.get(name, (False, None))
            x.requires_grad_(requires_grad)
        for name, x in model.named_modules():
            x.training = modes.get(name, False)
            _remove_new_hooks(x, hooks.get(name, set()))
            if name in checkpointing:
                x.gradient_checkpointing = checkpointing[name]
        vars(model.config).pop("use_cache", None)
        vars(model.config).update(cache)


def _hooks(module: nn.Module) -> set[int]:
    return {*module._forward_hooks, *module._forward_pre_hooks}


def _remove_new_hooks(module: nn.Module, known: set[int]) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if key not in known]:
            if CAPTURE not in getattr(hooks[key], "__qualname__", ""):
                del hooks[key]


@contextmanager
def undrawn() -> Iterator[None]:
    """The global generators of Python, numpy and torch go on afterwards where they were."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ()
    kind = torch.accelerator.current_accelerator().type if devices else "cuda"
    with torch.random.fork_rng(devices=list(devices), device_type=kind):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
