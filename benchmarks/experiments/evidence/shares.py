"""Who has most of an alignment before training: ``python -m benchmarks.experiments.evidence.shares``.

Four queries of `kind` and a teacher of eight demonstrations; writes ``results/shares.json``.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

import mmicl_kernels as mk
from mmicl_kernels.data import as_records
from mmicl_kernels.training import EpisodeCollator

from .forms import FormObjective
from .runs import RESULTS
from .world import labelled, world

SHARES = RESULTS / "shares.json"
BATCH, SHOTS = 4, 8


def parts(form: str, states: Tensor, targets: Tensor) -> Tensor:
    """What each token of each layer adds, ``[L, N]``; ``states`` and ``targets`` are ``[L, N, C]``."""
    apart, theirs = (states - targets).square().sum(-1), targets.square().sum(-1)
    scale = {
        "mean square": torch.tensor(float(states.shape[-1])),
        "by the layer's power": theirs.mean(1, keepdim=True),
        "by the token's power": theirs,
        "by both powers": theirs + states.square().sum(-1),
    }[form]
    return apart / scale / apart.numel()


FORMS = ("mean square", "by the layer's power", "by the token's power", "by both powers")


@torch.no_grad()
def measure() -> dict[str, dict[str, dict[str, float]]]:
    """By whether a prompt has a first token of its own, and by form: the loss and its largest shares."""
    found = {}
    for head in (True, False):
        model, prompts = world(head)
        rows = as_records(labelled("kind", 16, 0))
        batch = EpisodeCollator(prompts, rows, SHOTS, shared_shots=True)(rows[:BATCH])
        layers: list[tuple[Tensor, Tensor]] = []

        def note(x: Tensor, y: Tensor, layers: list[tuple[Tensor, Tensor]] = layers) -> Tensor:
            layers.append((x, y))
            return x.new_zeros(())

        with mk.attach(model, mk.create(model, mk.MimICConfig())) as handle:
            FormObjective(handle, note)(batch)
        states, targets = (torch.stack(x) for x in zip(*layers, strict=True))
        added = {form: parts(form, states, targets) for form in FORMS}
        found["first token" if head else "none"] = {form: _shares(x) for form, x in added.items()}
    return found


def _shares(x: Tensor) -> dict[str, float]:
    total = x.sum()
    of_tokens = x.unflatten(1, (BATCH, -1)).sum((0, 1))  # the k-th of each query, which have as many
    named = {"loss": total, "layer": x.sum(1).max() / total, "token": of_tokens.max() / total}
    return {name: float(f"{float(value):.3g}") for name, value in named.items()}


def main() -> None:
    torch.manual_seed(0)
    SHARES.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
