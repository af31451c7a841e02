"""One adapter of each method for a task, and what they are compared with, trained by ``mk.train``.

Chosen on the validation split of "kind". MimIC's alignment, whose weight is 1 in the paper, is here some
forty times the cross-entropy (one layer has most of it), and M2IV's synergy, a sum over layers, thousands
of times its divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import trange

import mmicl_kernels as mk
from mmicl_kernels.data import as_records
from mmicl_kernels.methods import Adapter

from . import tasks

SHIPPED = Path(__file__).with_name("adapters")  # what ``--quick`` shows
TASK = "kind"
STEPS = 40
RECIPE = mk.Recipe(
    steps=STEPS, batch_size=8, accumulate=1, shots=8, shared_shots=True, learning_rate=5e-3, weight_decay=1e-3
)  # fmt: skip
# Prompts are made while the model is busy, and the bar is all that is shown.
ARGUMENTS = {"dataloader_num_workers": 1, "logging_strategy": "no"}
LORA_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """How a row of the table is trained."""

    config: object
    recipe: mk.Recipe = RECIPE


AIM = replace(RECIPE, shots=(1, 8), shared_shots=False)
SETTINGS: Mapping[str, Setting] = {
    "MimIC": Setting(mk.MimICConfig(align_weight=0.02)),
    "answers-only": Setting(mk.MimICConfig(align_weight=0, ce_weight=1)),  # MimIC's parameters, no teacher
    "LIVE": Setting(mk.LIVEConfig()),
    "M2IV": Setting(mk.M2IVConfig(synergy_weight=0)),
    "AIM": Setting(mk.AIMConfig(positions="answer"), AIM),
}


def train(model: nn.Module, prompts: mk.PromptBuilder, task: str, name: str, seed: int = 0) -> Adapter:
    """The model is left as it was."""
    setting = SETTINGS[name]
    return mk.train(
        model, prompts, tasks.records(task, "train"), setting.config,
        recipe=setting.recipe, seed=seed, arguments=ARGUMENTS,
    )  # fmt: skip


@contextmanager
def lora(model: nn.Module, prompts: mk.PromptBuilder, task: str, seed: int = 0) -> Iterator[None]:
    """Within, the model has a LoRA of rank 8 (peft), trained on as many answers as the adapters were."""
    generator = torch.Generator().manual_seed(seed)
    rows = [x.demonstration() for x in as_records(tasks.records(task, "train"))]
    layers = r".*language_model.*\.(q|k|v|o)_proj"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    optimizer = torch.optim.AdamW([x for x in wrapped.parameters() if x.requires_grad], LORA_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in trange(STEPS, desc="LoRA", unit="step"):
        chosen = torch.randint(len(rows), (RECIPE.batch_size,), generator=generator).tolist()
        inputs, labels = prompts.queries([rows[i] for i in chosen])
        loss = wrapped(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    try:
        yield
    finally:
        wrapped.unload()
