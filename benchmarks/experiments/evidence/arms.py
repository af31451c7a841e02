"""Ways to learn a task from labelled items: each method, and what could do the same without what it claims.

All see the same items in the same order, for as many updates. What a *control* lacks is the teacher; a
*placebo* has one that knows nothing: the plain model itself without demonstrations, or after demonstrations
whose answers were dealt out anew.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

import mmicl_kernels as mk
from benchmarks.experiments.smolvl.tasks import Row
from mmicl_kernels.data import as_records
from mmicl_kernels.methods import Adapter
from mmicl_kernels.training import (
    AggregationCollator,
    EpisodeCollator,
    TrainedModule,
    TrainingConfig,
    epochs,
    train,
    trainable,
)

from .forms import FORMS, FormObjective

BATCH = 4
SHOTS = 8  # of a teacher


@dataclass(frozen=True)
class Arm:
    """How an adapter learns.

    Attributes:
        config: of its method. rate: AdamW's.
        teacher: what it sees before a query: "demonstrations"; those with "shuffled" answers; "nothing".
        form: of the alignment, instead of the config's, of ``forms.FORMS``.
        frozen: the last parts of names of parameters that stay as they begin; those are set to 0.
    """

    config: object
    rate: float = 1e-2
    teacher: str = "demonstrations"
    form: str | None = None
    frozen: tuple[str, ...] = ()


CONTROL, PULL, SHUFFLED = "answers alone", "pull to zero-shot", "shuffled teacher"
OFFICIAL, SMALL = "MimIC, mean square", "MimIC, mean square, weight 0.02"
STATES = "MimIC, states alone"
ANSWERS = mk.MimICConfig(align_weight=0, ce_weight=1)
ARMS: Mapping[str, Arm] = {
    "MimIC": Arm(mk.MimICConfig()),
    CONTROL: Arm(ANSWERS, teacher="nothing"),
    PULL: Arm(mk.MimICConfig(), teacher="nothing"),
    SHUFFLED: Arm(mk.MimICConfig(), teacher="shuffled"),
    OFFICIAL: Arm(mk.MimICConfig(alignment="mean_square")),
    STATES: Arm(mk.MimICConfig(ce_weight=0)),
    "LIVE": Arm(mk.LIVEConfig(), rate=2e-2),
    "M2IV": Arm(mk.M2IVConfig()),
    "AIM": Arm(mk.AIMConfig(positions="answer_end"), rate=2e-2),
    **{f"MimIC, {form}": Arm(mk.MimICConfig(), form=form) for form in FORMS},
    SMALL: Arm(mk.MimICConfig(alignment="mean_square", align_weight=0.02)),
    "MimIC, residual stream": Arm(mk.MimICConfig(align="layer")),
    "MimIC, attention's output": Arm(mk.MimICConfig(align="self_attn")),
}


def learn(
    arm: Arm, model: nn.Module, prompts: mk.PromptBuilder, queries: Sequence[Row], pool: Sequence[Row],
    steps: int, seed: int,
) -> Adapter:  # fmt: skip
    """An adapter for ``queries``, whose teacher has demonstrations of ``pool``, which is those or has none of
    them. A batch shares its demonstrations, no query is among them, and of few items both are smaller."""
    size = min(BATCH, max(1, len(queries) // 2))
    most = len(pool) - size if queries is pool else len(pool)
    shots = 0 if arm.teacher == "nothing" else min(SHOTS, most)
    examples = as_records(queries)
    shown = as_records(shuffled(pool, seed) if arm.teacher == "shuffled" else pool)
    if isinstance(arm.config, mk.AIMConfig):
        collate = AggregationCollator(prompts, shown, (1, 4), seed=seed)
    else:
        collate = EpisodeCollator(prompts, shown, shots, shared_shots=shots > 0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(examples, size, shuffle=True, collate_fn=collate, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = mk.create(model, arm.config)
    module = TrainedModule(model, adapter)
    if arm.form is not None:
        module.objective = FormObjective(module.handle, FORMS[arm.form])
    try:
        config = TrainingConfig(arm.rate, measure_every=0)
        train(module, _learnt(adapter, arm), epochs(loader), steps, config=config, progress=False)
    finally:
        module.handle.detach()
    return adapter.requires_grad_(False).eval()


@torch.no_grad()
def _learnt(adapter: Adapter, arm: Arm) -> dict[str, nn.Parameter]:
    learnt = trainable(adapter)
    for name in [x for x in learnt if x.rpartition(".")[2] in arm.frozen]:
        learnt.pop(name).zero_()
    return learnt


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same questions, with answers that were dealt out anew."""
    answers = [row["answer"] for row in rows]
    random.Random(seed).shuffle(answers)
    return [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
