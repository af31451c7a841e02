"""The whole point in one table, on a real vision-language model (`mmicl demo`).

A task is asked of unseen pictures: without demonstrations, after 1 to 16 of them, and with an adapter of each
method in their place, trained here. Beside them the control that could embarrass them, the same parameters
trained on the same answers without a teacher, and LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.data import as_records
from mmicl_kernels.evaluation.systems import System
from mmicl_kernels.methods import Adapter

from . import adapters, tasks
from .measure import GENERATION, QUERIES, SHOTS
from .model import load_model, load_processor
from .speed import Way, bank_of, costs

TASKS = tuple(tasks.TASKS)
WIDTH = 100  # columns, also where nobody watches
CONTROL, LORA = "answers-only", "LoRA"
COSTS = {"prompt_tokens": "prompt tokens", "first_token_ms": "time to first token (ms)"}
_PLAIN = {System(None, k).name for k in SHOTS}
ROUNDS, QUICK_ROUNDS, QUICK_QUERIES, QUICK_SHOTS, QUICK_STEPS = 3, 1, 12, (0, 4), 3


@dataclass(frozen=True)
class Row:
    """One way to answer; times in milliseconds at batch 1, bytes that are allocated for the first token."""

    name: str
    parameters: int
    accuracy: float
    interval: tuple[float, float]
    prompt_tokens: float
    first_token_ms: float
    further_token_ms: float
    peak_bytes: int


def run_demo(*, task: str, seed: int, out: Path, quick: bool) -> None:
    """Train an adapter of each method for ``task``, measure every way to answer, print the table, and save
    it, a plot and the adapters in ``out``.

    ``quick`` asks few queries, and has no LoRA; of "kind" it has the adapters that are shipped, of another
    task some that were hardly trained.
    """
    model, prompts = load_model(), tasks.task_prompts(load_processor())
    queries, shots = tasks.records(task, "test")[:QUERIES], SHOTS
    if quick:
        queries, shots = queries[:QUICK_QUERIES], QUICK_SHOTS
    made = _adapters(model, prompts, task, seed, out, quick)
    ask = partial(
        mk.evaluate, model, prompts, queries,
        demonstrations=tasks.records(task, "train"), generation=GENERATION, seed=seed,
    )  # fmt: skip
    found = list(ask(adapters=made, shots=shots).rows)
    with TemporaryDirectory() as folder:
        ways = _ways(model, prompts, task, made, shots, Path(folder))
        measured = costs(model, ways, QUICK_ROUNDS if quick else ROUNDS)
    parameters = {name: adapter.num_parameters() for name, adapter in made.items()}
    if not quick:
        with adapters.lora(model, prompts, tasks.records(task, "train"), seed=seed) as parameters[LORA]:
            found.append(replace(ask(shots=(0,)).rows[0], system=System(LORA, 0)))
        measured[LORA] = measured["zero-shot"]  # what it costs when it is merged
    rows = [
        Row(
            x.name, parameters.get(x.name.partition(",")[0], 0), x.score.value,
            (x.interval.low, x.interval.high), x.prompt_tokens, *measured[x.name],
        )
        for x in found
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    described = {"task": task, "seed": seed, "quick": quick, "rows": [asdict(row) for row in rows]}
    (out / "demo.json").write_text(json.dumps(described, indent=1) + "\n")
    _plot(rows, task, out / "demo.png")
    _print(rows, task, len(queries))
    print(f"saved {out / 'demo.json'} and {out / 'demo.png'}")


def _adapters(
    model: nn.Module, prompts: mk.PromptBuilder, task: str, seed: int, out: Path, quick: bool
) -> dict[str, Adapter]:
    """By name; those that are trained are kept under ``out``."""
    if quick and task == adapters.TASK:
        shipped = [name for name in adapters.SETTINGS if (adapters.SHIPPED / name).is_dir()]
        return {name: mk.load(adapters.SHIPPED / name, model) for name in shipped}
    print(
        f"training an adapter of each method for {task!r}; {CONTROL} has MimIC's parameters, and no teacher"
    )
    folder, steps = out / "adapters" / f"{task}, seed {seed}", QUICK_STEPS if quick else None
    return {
        name: adapters.train(model, prompts, task, name, folder / name, seed, steps)
        for name in adapters.SETTINGS
    }


def _ways(
    model: nn.Module,
    prompts: mk.PromptBuilder,
    task: str,
    made: Mapping[str, Adapter],
    shots: Sequence[int],
    folder: Path,
) -> dict[str, Way]:
    """By the name of a row what is timed: one query, after the first demonstrations or none."""
    query = as_records(tasks.records(task, "test"))[0].demonstration()
    shown = [x.demonstration() for x in as_records(tasks.records(task, "train"))[: max(shots)]]
    ways = {}
    for k in shots:
        inputs = prompts.prompt([query], [shown[:k]])
        ways[System(None, k).name] = Way(nullcontext, lambda _, inputs=inputs: inputs)
    alone = prompts.prompt([query])
    for name, adapter in made.items():
        if adapter.embedding_site is None:
            ways[name] = Way(partial(mk.attach, model, adapter), lambda _: alone)
            continue
        if not adapter.fuses:
            ways[name] = Way(partial(mk.attach, model, adapter), lambda handle: handle.splice(alone))
            continue
        bank, ids = bank_of(model, prompts, adapter, shown, folder / name)
        attach = partial(mk.attach, model, adapter, bank=bank)
        for k in filter(None, shots):
            row = System(name, k, fused=True).name
            ways[row] = Way(attach, lambda handle, k=k, ids=ids: handle.splice(alone, [ids[:k]]))
    return ways


def _print(rows: Sequence[Row], task: str, queries: int) -> None:
    table = Table(title=f"{task!r} of {queries} unseen pictures or words, batch 1 on this CPU", box=SIMPLE)
    table.add_column("", no_wrap=True)
    for column in (
        "trained\nparameters",
        "correct",
        "95 %",
        "prompt\ntokens",
        "first\nms",
        "further\nms",
        "memory\nMiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.interval
        table.add_row(
            row.name,
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.accuracy:.1%}",
            f"{100 * low:.0f} - {100 * high:.0f}",
            f"{row.prompt_tokens:.0f}",
            f"{row.first_token_ms:.0f}",
            f"{row.further_token_ms:.0f}",
            f"{row.peak_bytes / 2**20:.0f}",
        )
    Console(width=WIDTH).print(table)
    print(
        "first, further: time to the first token, to each further one. memory: allocated for the first token"
    )
    print(
        f"{CONTROL}: MimIC's parameters, trained without a teacher. {LORA}: when it is merged it costs what"
    )
    print("zero-shot costs, whose times are shown")


def _plot(rows: Sequence[Row], task: str, path: Path) -> None:
    """Accuracy against what a prompt costs; the points of a method are joined."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        method, _, shots = row.name.partition(",")
        lines.setdefault(method if shots or method not in _PLAIN else "demonstrations", []).append(row)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (field, label) in zip(axes, COSTS.items(), strict=True):
        for name, own in lines.items():
            x, y = [getattr(row, field) for row in own], [row.accuracy for row in own]
            spread = [
                [row.accuracy - row.interval[0] for row in own],
                [row.interval[1] - row.accuracy for row in own],
            ]
            axis.errorbar(x, y, spread, marker="o", capsize=2, label=name, linewidth=1)
            if name == "demonstrations":
                for row in own:
                    axis.annotate(
                        row.name,
                        (getattr(row, field), row.accuracy),
                        (4, -10),
                        textcoords="offset points",
                        fontsize=8,
                    )
        axis.set(xlabel=label, ylim=(-0.03, 1.03))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"accuracy on {task!r}")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
