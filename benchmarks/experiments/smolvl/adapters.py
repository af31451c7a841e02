"""One adapter of each method for a task, and what they are compared with, trained by ``mk.train``.

Learning rates and the number of updates were tried on the validation split of "kind"; the methods are as they
are by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import mmicl_kernels as mk
from mmicl_kernels.data import as_records
from mmicl_kernels.methods import Adapter

from . import tasks

SHIPPED = Path(__file__).with_name("shipped")  # what ``--quick`` shows
TASK = "kind"
STEPS = 45
RECIPE = mk.Recipe(
    steps=STEPS, batch_size=4, accumulate=1, shots=8, shared_shots=True, learning_rate=1e-2, weight_decay=1e-3
)  # fmt: skip
# Prompts are made while the model is busy, and the bar is all that is shown.
ARGUMENTS = {"dataloader_num_workers": 1, "logging_strategy": "no"}
LORA_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """How a row of the table is trained."""

    config: object
    recipe: mk.Recipe = RECIPE


SETTINGS: Mapping[str, Setting] = {
    "MimIC": Setting(mk.MimICConfig()),
    "answers-only": Setting(mk.MimICConfig(align_weight=0, ce_weight=1)),  # MimIC's parameters, no teacher
    "LIVE": Setting(mk.LIVEConfig(), replace(RECIPE, learning_rate=2e-2)),
    "M2IV": Setting(mk.M2IVConfig()),
    "AIM": Setting(
        mk.AIMConfig(positions="answer_end"),
        replace(RECIPE, shots=(1, 4), shared_shots=False, learning_rate=2e-2),
    ),
    "HiFICL": Setting(mk.HiFICLConfig(), replace(RECIPE, shots=0, shared_shots=False)),
    # Of the size of the model's embeddings.
    "prompt-tuning": Setting(mk.PromptTuningConfig(std=0.13), replace(RECIPE, shots=0, shared_shots=False)),
    # Its gradients pass the demonstrations, which a batch cannot share then; its rate is that of words.
    "STAVE": Setting(mk.STAVEConfig(), replace(RECIPE, shots=1, shared_shots=False, learning_rate=5e-2)),
}


def train(
    model: nn.Module, prompts: mk.PromptBuilder, task: str, name: str, out: Path, seed: int = 0,
    steps: int | None = None,
) -> Adapter:  # fmt: skip
    """The model is left as it was. What ``out`` has of the same training is taken, or gone on with."""
    setting = SETTINGS[name]
    return mk.train(
        model, prompts, tasks.records(task, "train"), setting.config, out=out, resume=out.exists(),
        recipe=setting.recipe, steps=steps, seed=seed, arguments=ARGUMENTS,
    )  # fmt: skip


@contextmanager
def lora(
    model: nn.Module, prompts: mk.PromptBuilder, rows: Sequence[tasks.Row], steps: int = STEPS,
    rate: float = LORA_RATE, seed: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Within, the model has a LoRA of rank 8 (peft), trained on as many answers as the adapters, with their
    schedule, decay and clipping; how many parameters that are."""
    generator = torch.Generator().manual_seed(seed)
    rows = [x.demonstration() for x in as_records(rows)]
    layers = r".*language_model.*\.(q|k|v|o)_proj"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    try:
        trained = [x for x in wrapped.parameters() if x.requires_grad]
        optimizer = torch.optim.AdamW(trained, rate, weight_decay=RECIPE.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(RECIPE.warmup * steps), steps)
        count = steps * RECIPE.batch_size
        laps = [torch.randperm(len(rows), generator=generator) for _ in range(-(-count // len(rows)))]
        batches = torch.cat(laps)[:count].view(steps, -1).tolist()
        for batch in tqdm(batches, desc="LoRA", unit="step"):
            inputs, labels = prompts.queries([rows[i] for i in batch])
            optimizer.zero_grad()
            wrapped(**inputs, labels=labels).loss.backward()
            nn.utils.clip_grad_norm_(trained, RECIPE.clip)
            optimizer.step()
            schedule.step()
        yield sum(x.numel() for x in trained)
    finally:
        wrapped.unload()
