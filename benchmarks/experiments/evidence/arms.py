"""Ways to learn a task from labelled items: each method, and what could do the same without what it claims.

All learn from the same items, in as many updates of as many. What a *control* lacks is the teacher; a
*placebo* has one that knows nothing: the plain model itself without demonstrations, or after demonstrations
with each other's answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
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

from .forms import ANSWER_ALONE, FORMS, FormObjective
from .world import OfTheTask

BATCH = 4
NOISE = "noise"


@dataclass(frozen=True)
class Arm:
    """How an adapter learns.

    Attributes:
        config: of its method. rate: AdamW's.
        teacher: what it sees before a query: "demonstrations"; those with "shuffled" answers; "nothing".
        form: of the alignment, instead of the config's, of ``forms.FORMS``.
        held: parameters that are not learnt, by the ends of their names, and their value: a number, or
            ``NOISE`` of the variance that keeps lengths.
        tied: whether all heads of a layer have the same parameters.
    """

    config: object
    rate: float = 1e-2
    teacher: str = "demonstrations"
    form: str | None = None
    held: Mapping[str, float | str] = field(default_factory=dict)
    tied: bool = False


CONTROL, PULL, SHUFFLED = "answers alone", "pull to zero-shot", "shuffled teacher"
OFFICIAL, SMALL = "MimIC, mean square", "MimIC, mean square, weight 0.02"
STATES = "MimIC, states alone"
HIFICL, PROMPT, STAVE = "HiFICL", "prompt tuning", "STAVE"
ANSWERS = mk.MimICConfig(align_weight=0, ce_weight=1)
# Of the magnitude sigmoid(q.weight + bias - lse) what is left: sigmoid(bias - lse), or 1.
MAGNITUDES: Mapping[str, dict[str, float]] = {
    "of the keys alone": {"weight": 0},
    "constant": {"weight": 0, "bias": 100},
}
FUSED = mk.AIMConfig(positions="answer_end")
ARMS: Mapping[str, Arm] = {
    "MimIC": Arm(mk.MimICConfig()),
    CONTROL: Arm(ANSWERS, teacher="nothing"),
    PULL: Arm(mk.MimICConfig(), teacher="nothing"),
    SHUFFLED: Arm(mk.MimICConfig(), teacher="shuffled"),
    OFFICIAL: Arm(mk.MimICConfig(alignment="mean_square")),
    STATES: Arm(mk.MimICConfig(ce_weight=0)),
    "LIVE": Arm(mk.LIVEConfig(), rate=2e-2),
    "M2IV": Arm(mk.M2IVConfig()),
    "AIM": Arm(FUSED, rate=2e-2),
    HIFICL: Arm(mk.HiFICLConfig(), teacher="nothing"),
    PROMPT: Arm(mk.PromptTuningConfig(std=0.13), teacher="nothing"),
    STAVE: Arm(mk.STAVEConfig()),
    "AIM, random projection": Arm(FUSED, held={"fuser.weight": NOISE, "fuser.bias": 0}),
    **{f"MimIC, {form}": Arm(mk.MimICConfig(), form=form) for form in FORMS},
    SMALL: Arm(mk.MimICConfig(alignment="mean_square", align_weight=0.02)),
    "MimIC, residual stream": Arm(mk.MimICConfig(align="layer")),
    "MimIC, attention's output": Arm(mk.MimICConfig(align="self_attn")),
    **{f"MimIC, magnitude {name}": Arm(mk.MimICConfig(), held=x) for name, x in MAGNITUDES.items()},
    **{f"{CONTROL}, magnitude {x}": Arm(ANSWERS, teacher="nothing", held=MAGNITUDES[x]) for x in MAGNITUDES},
    "MimIC, heads alike": Arm(mk.MimICConfig(), tied=True),
    f"{CONTROL}, heads alike": Arm(ANSWERS, teacher="nothing", tied=True),
    f"{CONTROL}, LIVE's vectors": Arm(mk.LIVEConfig(kl_weight=0, ce_weight=1), rate=2e-2, teacher="nothing"),
    f"{CONTROL}, M2IV's vectors": Arm(
        mk.M2IVConfig(mimicry_weight=0, synergy_weight=0, ce_weight=1), teacher="nothing"
    ),
    "M2IV, no mimicry": Arm(mk.M2IVConfig(mimicry_weight=0), teacher="nothing"),
    "M2IV, no attention vectors": Arm(mk.M2IVConfig(), held={"attn.vector": 0}),
    "M2IV, no MLP vectors": Arm(mk.M2IVConfig(), held={"mlp.vector": 0}),
    "M2IV, no synergy": Arm(mk.M2IVConfig(synergy_weight=0)),
    "M2IV, synergy of tokens": Arm(mk.M2IVConfig(synergy_of="token")),
}

# Whose forms of alignment are compared.
ALIGNED = (
    CONTROL,
    "MimIC",
    OFFICIAL,
    SMALL,
    *(f"MimIC, {form}" for form in FORMS),
    "MimIC, residual stream",
    "MimIC, attention's output",
)


def learn(
    arm: Arm, model: nn.Module, prompts: mk.PromptBuilder, queries: Sequence[Row], pool: Sequence[Row],
    steps: int, seed: int, shots: int,
) -> Adapter:  # fmt: skip
    """An adapter for ``queries``, whose teacher has ``shots`` demonstrations of ``pool``, at most all: others
    of the queries where that is the same list. A batch shares them where there are enough; of few items each
    has all others. STAVE's gradients pass its demonstrations: each query has one of its own. Without
    ``steps`` an adapter is as it begins."""
    examples = as_records(queries)
    shown = as_records(shuffled(pool, seed) if arm.teacher == "shuffled" else pool)
    others = len(pool) - BATCH if queries is pool else len(pool)
    shared = others >= min(shots, len(pool) - 1)
    shots = 0 if arm.teacher == "nothing" else min(shots, len(pool) - (queries is pool))
    if isinstance(arm.config, mk.AIMConfig):
        collate = AggregationCollator(prompts, shown, (1, 4), draw=OfTheTask(), seed=seed)
    elif isinstance(arm.config, mk.STAVEConfig):
        collate = EpisodeCollator(prompts, shown, 1, seed=seed)
    else:
        collate = EpisodeCollator(prompts, shown, shots, shared_shots=shared and shots > 0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(examples, BATCH, shuffle=True, collate_fn=collate, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = mk.create(model, arm.config)
    module = TrainedModule(model, adapter)
    if arm.form is not None:
        only = arm.form == ANSWER_ALONE
        module.objective = FormObjective(module.handle, FORMS[arm.form], answer_only=only)
    try:
        config, learnt = TrainingConfig(arm.rate, measure_every=0), _learnt(adapter, arm, seed)
        if steps > 0:
            train(module, learnt, epochs(loader), steps, config=config, progress=False)
    finally:
        module.handle.detach()
    return adapter.requires_grad_(False).eval()


@torch.no_grad()
def _learnt(adapter: Adapter, arm: Arm, seed: int) -> dict[str, nn.Parameter]:
    learnt = trainable(adapter)
    generator = torch.Generator().manual_seed(seed)
    for end, value in arm.held.items():
        for name in [x for x in learnt if x.endswith(end)]:
            x = learnt.pop(name)
            if value == NOISE:
                x.normal_(std=x.shape[-1] ** -0.5, generator=generator)
            else:
                x.fill_(value)
    if arm.tied:
        for x in learnt.values():
            x.copy_(_alike(x))
            x.register_hook(_alike)
    return learnt


def _alike(x: Tensor) -> Tensor:
    """Of the heads ``[H, ...]`` the mean, as often as there are heads."""
    return x.mean(0, keepdim=True).expand_as(x)


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same questions with each other's answers: no answer stays, or of two different ones half of them,
    since two that were exchanged would be as good a lesson."""
    order = sorted(random.Random(seed).sample(range(len(rows)), len(rows)), key=lambda i: rows[i]["answer"])
    counts = Counter(row["answer"] for row in rows)
    shift = max(counts.values()) if len(counts) > 2 else max(counts.values()) // 2
    dealt = {i: rows[order[(k + shift) % len(rows)]]["answer"] for k, i in enumerate(order)}
    return [{**row, "answer": dealt[i]} for i, row in enumerate(rows)]
