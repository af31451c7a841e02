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

from .forms import FormObjective, mean_square, of_both, of_layer, of_token
from .runs import RESULTS
from .world import labelled, world

SHARES = RESULTS / "shares.json"
BATCH, SHOTS = 4, 8
SHOWN = {
    "mean square": mean_square,
    "by the layer's power": of_layer,
    "by the token's power": of_token,
    "by both powers": of_both,
}


@torch.no_grad()
def measure() -> dict[str, dict[str, dict[str, float]]]:
    """By whether a prompt has a first token of its own, and by form: the loss and its largest shares."""
    found = {}
    for head in (True, False):
        model, prompts = world(head)
        rows = as_records(labelled("kind", 16, 0))
        batch = EpisodeCollator(prompts, rows, SHOTS, shared_shots=True)(rows[:BATCH])
        with mk.attach(model, mk.create(model, mk.MimICConfig())) as handle:
            found["first token" if head else "none"] = {
                name: _shares(FormObjective(handle, form).added(batch)[0]) for name, form in SHOWN.items()
            }
    return found


def _shares(x: Tensor) -> dict[str, float]:
    """Of what each token of each layer adds, ``[L, N]``."""
    total = x.sum()
    of_tokens = x.unflatten(1, (BATCH, -1)).sum((0, 1))  # the k-th of each query, which have as many
    named = {"loss": x.mean(), "layer": x.sum(1).max() / total, "token": of_tokens.max() / total}
    return {name: float(f"{float(value):.3g}") for name, value in named.items()}


def main() -> None:
    torch.manual_seed(0)
    SHARES.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
