"""One run: learn a task from labelled items, answer unseen ones. What was run is kept, line by line."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import mmicl_kernels as mk
from benchmarks.experiments.smolvl import adapters as smolvl
from benchmarks.experiments.smolvl import tasks
from benchmarks.experiments.smolvl.measure import GENERATION
from benchmarks.experiments.smolvl.tasks import Row
from mmicl_kernels.evaluation.report import Row as Answers
from mmicl_kernels.methods import Adapter, AIMAdapter

from .arms import ARMS, CONTROL, learn, shuffled
from .world import PASSAGE, labelled, prose, records, unlabelled, world

RESULTS = Path(__file__).with_name("results")
QUERIES = 80  # asked, at most
ELSEWHERE, ELSEWHERE_SHOTS, FEWER_QUERIES = ("feeling", "past", "colour"), 4, 40
ICL, LORA = "demonstrations", "LoRA"


@dataclass(frozen=True)
class Run:
    """What is learnt from what.

    Attributes:
        task, arm: their names; several tasks are "kind + past". ``ICL`` is no training: the labelled items,
            at most ``shots``, in the prompt.
        labelled: how many items with answers; None is all of the train split.
        seed: of the draw of items, and of everything random in training.
        unlabelled: if any, so many other items are learnt from instead, with the answers that ``labeller``
            gives: "teacher" is the model after ``shots`` of the labelled ones, "shuffled" after those with
            shuffled answers, "control" an adapter of ``CONTROL`` that learnt from them; or the "truth".
        shots: demonstrations before a query, at most: a teacher's, a labeller's, those of ``ICL`` and those
            that AIM answers after.
        rate: instead of the arm's. split: whose items are asked.
        head: whether prompts begin with a token that is not the query's, and takes the attention of those
            that look at nothing. Without, that is the query's first, with a state a thousand times as large.
        asked: the task whose items are asked, if another.
        elsewhere: whether the adapter is also on where it has no business: before demonstrations of other
            tasks, and in prose.
    """

    task: str
    arm: str
    labelled: int | None
    seed: int
    steps: int = 60
    unlabelled: int = 0
    labeller: str | None = None
    shots: int = 8
    rate: float | None = None
    split: str = "test"
    head: bool = True
    asked: str | None = None
    elsewhere: bool = False


def read(experiment: str) -> dict[Run, dict]:
    """What each run found, by arms as they are today: the "texts" that were answered, "right" as 0 and 1,
    "cpu_seconds" of everything."""
    path = RESULTS / f"{experiment}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [(Run(**row["run"]), row) for row in map(json.loads, lines)]
    return {run: row for run, row in rows if row["arm"] == described(run)}


def keep(experiment: str, run: Run, found: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    row = {"run": asdict(run), "arm": described(run), **found}
    with (RESULTS / f"{experiment}.jsonl").open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def described(run: Run) -> dict | None:
    """How the run's arm learns, as JSON has it; None where it is not one of ``ARMS``."""
    arm = ARMS.get(run.arm)
    if arm is None:
        return None
    return {**asdict(arm), "method": type(arm.config).__name__.removesuffix("Config")}


def perform(run: Run) -> dict:
    """What :func:`read` has of it."""
    model, prompts = world(run.head)
    asked = records(run.asked or run.task, run.split)[:QUERIES]
    pool = labelled(run.task, run.labelled, run.seed)
    shown = labelled(run.asked, run.labelled, run.seed) if run.asked else pool
    began = time.process_time()
    queries = _unlabelled(run, model, prompts, pool) if run.unlabelled else pool
    answer = partial(_answer, model, prompts, seed=run.seed)
    if run.arm == ICL:
        row = answer(asked, pool=shown, shots=run.shots)
        found = _elsewhere(run, model, prompts)
    elif run.arm == LORA:
        with smolvl.lora(model, prompts, queries, run.steps, run.rate or smolvl.LORA_RATE, run.seed):
            row = answer(asked)
            found = _elsewhere(run, model, prompts)
    else:
        arm = ARMS[run.arm] if run.rate is None else replace(ARMS[run.arm], rate=run.rate)
        adapter = learn(arm, model, prompts, queries, pool, run.steps, run.seed, run.shots)
        row = answer(asked, adapter, shown, run.shots if isinstance(adapter, AIMAdapter) else 0)
        found = _elsewhere(run, model, prompts, adapter)
    found |= {"cpu_seconds": round(time.process_time() - began, 1)}
    return {"accuracy": row.score.value, "right": _right(row), "texts": list(row.texts), **found}


def _right(row: Answers) -> str:
    return "".join(str(int(x)) for x in row.score.samples)


def _elsewhere(run: Run, model: nn.Module, prompts: mk.PromptBuilder, adapter: Adapter | None = None) -> dict:
    """By other task what was right after demonstrations; of each passage of prose a token's mean nats. Empty
    unless the run is to know."""
    if not run.elsewhere:
        return {}
    found = {}
    for task in [x for x in ELSEWHERE if x != run.task]:
        asked, pool = records(task, run.split)[:FEWER_QUERIES], labelled(task, None, run.seed)
        row = _answer(model, prompts, asked, adapter, pool, ELSEWHERE_SHOTS, run.seed)
        found[task] = _right(row)
    return {"elsewhere": found, "nats": _nats(model, prompts, adapter)}


@torch.no_grad()
def _nats(model: nn.Module, prompts: mk.PromptBuilder, adapter: Adapter | None) -> list[float]:
    found = []
    with nullcontext() if adapter is None else mk.attach(model, adapter) as handle:
        for text in prose():
            ids = prompts.processor.tokenizer(tasks.BEGIN + text, return_tensors="pt")["input_ids"]
            inputs = {"input_ids": ids[:, :PASSAGE], "labels": ids[:, :PASSAGE].clone()}
            inputs["labels"][:, 0] = -100  # nor do learned tokens predict it
            if adapter is not None and adapter.embedding_site is not None:
                inputs = handle.splice(inputs)
            found.append(round(model(**inputs).loss.item(), 4))
    return found


def _answer(
    model: nn.Module, prompts: mk.PromptBuilder, asked: Sequence[Row], adapter: Adapter | None = None,
    pool: Sequence[Row] = (), shots: int = 0, seed: int = 0,
) -> Answers:  # fmt: skip
    """Answers after ``shots`` of ``pool``, at most all, of the plain model or with an adapter; AIM's fuses
    them."""
    shots = (min(shots, len(pool)),)
    own = {"shots": shots}
    if adapter is not None:
        fused = isinstance(adapter, AIMAdapter)
        own = {"adapters": {"adapter": adapter}, "shots": (), "shots" if fused else "adapter_shots": shots}
    evaluation = mk.evaluate(
        model, prompts, asked, demonstrations=pool or None, seed=seed, generation=GENERATION, progress=False,
        **own,
    )  # fmt: skip
    return evaluation.rows[-1]


def _unlabelled(
    run: Run, model: nn.Module, prompts: mk.PromptBuilder, pool: Sequence[Row]
) -> list[Row]:  # fmt: skip
    """Other rows of the train split with what the labeller answers; those without an answer are left out."""
    rows = unlabelled(run.task, run.unlabelled, run.seed, pool)
    if run.labeller == "truth":
        return rows
    if run.labeller == "control":
        adapter = learn(ARMS[CONTROL], model, prompts, pool, pool, run.steps, run.seed, run.shots)
        texts = _answer(model, prompts, rows, adapter).texts
    else:
        shown = shuffled(pool, run.seed) if run.labeller == "shuffled" else pool
        texts = _answer(model, prompts, rows, pool=shown, shots=run.shots, seed=run.seed).texts
    return [{**row, "answer": text} for row, text in zip(rows, texts, strict=True) if text.strip()]
