"""The whole point in one table, on a real small LVLM and real handwritten digits (`mmicl demo`)."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.experiments.digits import aim, data, uses
from benchmarks.experiments.digits.evaluate import Accuracy, accuracy, questions
from benchmarks.experiments.digits.measure import SETTINGS
from benchmarks.experiments.digits.model import load_model
from benchmarks.experiments.digits.processor import DigitsPrompts
from benchmarks.experiments.digits.train import train_adapter
from benchmarks.harness.timing import peak_allocated_bytes
from benchmarks.peers import published
from mmicl_kernels.methods import Adapter
from mmicl_kernels.models.anchors import find_anchors

TASKS = data.TASKS
LABELS = {0: "zero-shot", 1: "1-shot", 4: "4-shot", 8: "8-shot", 16: "16-shot"}
ROUNDS, QUICK_ROUNDS = 20, 2
QUICK_STEPS, QUICK_SAMPLES = 20, 32
FURTHER_TOKENS = 16
BOTH = "M2IV + style"


@dataclass(frozen=True)
class Row:
    """One way to answer; times in milliseconds, memory in bytes."""

    name: str
    accuracy: float
    interval: tuple[float, float]
    prompt_tokens: int
    first_token_ms: float
    further_token_ms: float
    attention_peak_bytes: int


@dataclass(frozen=True)
class Way:
    """A number of demonstrations, and what is attached to the model while it is answered.

    With a ``bank``, that of the attached handle, the fused tokens of its demonstrations stand in the prompt;
    they are drawn from ``pool``, which the bank holds.
    """

    name: str
    shots: int
    attached: Callable[[], AbstractContextManager]
    bank: mk.DemonstrationBank | None = None
    pool: data.Examples | None = None

    def question(
        self, queries: Sequence[data.Example], shots: Sequence[Sequence[data.Example]]
    ) -> "Question":
        if self.bank is None:
            return Question(DigitsPrompts().asked(queries, shots), None)
        ids = [[self.bank.find(x.demonstration()) for x in row] for row in shots]
        return Question(DigitsPrompts().asked(queries), ids)


@dataclass(frozen=True)
class Question:
    """Prompts, and for each the ids of its banked demonstrations, if that is what it has."""

    prompt: dict
    demonstrations: list[list[int]] | None

    def inputs(self, handle: mk.Handle | None) -> dict:
        """What the model is given."""
        if handle is None or handle.single.embedding_site is None:
            return self.prompt
        return handle.splice(self.prompt, self.demonstrations)


def run_demo(*, task: str, seed: int, out: Path, quick: bool) -> None:
    """Train every method for ``task``, measure every way to answer, print the table, save it and a plot.

    ``quick`` trains, samples and times just enough to see that it runs.
    """
    # The model is too small to share out, and threads that wait for a busy core cost a hundredfold.
    torch.set_num_threads(1)
    model = load_model()
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(model, task, seed, quick, Path(folder))
        rows = _measure(model, task, ways, seed, quick)
        with next(way for way in ways if way.name == BOTH).attached():
            asks = uses.measure_style(model, "test", task, shots=0)[f"{task}: right, then asks back"]
    out.mkdir(parents=True, exist_ok=True)
    described = {"task": task, "seed": seed, "quick": quick, "asks_back": asks}
    described["rows"] = [asdict(row) for row in rows]
    (out / "demo.json").write_text(json.dumps(described, indent=1) + "\n")
    _plot(rows, task, out / "demo.png")
    _print(rows, task)
    print(f"{BOTH}: both vectors come from a VLibrary, and {asks:.1%} of the answers are right and ask back")
    print(f"saved {out / 'demo.json'} and {out / 'demo.png'}")


def _ways(model: nn.Module, task: str, seed: int, quick: bool, folder: Path) -> list[Way]:
    """Prompts with demonstrations, and what is trained here in their place and stored in ``folder``."""

    def trained(method: str, **config: object) -> Adapter:
        setting = SETTINGS[method]
        recipe = replace(setting.recipe, steps=QUICK_STEPS) if quick else setting.recipe
        return train_adapter(model, task, config=replace(setting.config, **config), recipe=recipe, seed=seed)

    print(f"training for the task {task!r}: MimIC with the gate as published and over visible keys, LIVE,")
    print(f"M2IV, prompt tuning; and M2IV for the style {uses.STYLE!r}")
    gates = {name: trained("mimic", normalizer=name) for name in ("all_keys", "visible")}
    live, m2iv, prompt = (trained(method) for method in ("live", "m2iv", "prompt_tuning"))
    style = uses.learn(model, uses.STYLE, QUICK_STEPS if quick else None)
    library = mk.VLibrary(folder / "library")
    library.put("task", m2iv, task=task)
    library.put("style", style, tags=["style"])
    both = library.combine({"task": 1.0, "style": 1.0})
    print("training AIM's projection for all tasks, and filling a bank with demonstrations")
    recipe = replace(aim.RECIPE, steps=QUICK_STEPS) if quick else aim.RECIPE
    fuser = aim.train_aim(model, seed=seed, recipe=recipe)
    pool = aim.banked(task, seed)
    bank = aim.fill_bank(folder / "bank", model, fuser, pool)
    return [
        *(Way(name, shots, nullcontext) for shots, name in LABELS.items()),
        Way("MimIC, published", 0, lambda: published(model, gates["all_keys"])),
        Way("MimIC, ours", 0, lambda: mk.attach(model, gates["visible"])),
        Way("LIVE", 0, lambda: mk.attach(model, live)),
        Way("M2IV", 0, lambda: mk.attach(model, m2iv)),
        Way("Prompt tuning", 0, lambda: mk.attach(model, prompt)),
        Way(BOTH, 0, lambda: mk.attach(model, both)),
        *(
            Way(f"AIM, {LABELS[shots]}", shots, lambda: mk.attach(model, fuser, bank=bank), bank, pool)
            for shots in aim.SHOTS
        ),
    ]


def _measure(model: nn.Module, task: str, ways: list[Way], seed: int, quick: bool) -> list[Row]:
    accuracies = {}
    for way in tqdm(ways, desc="held-out images", unit="row"):
        with way.attached() as handle:
            accuracies[way.name] = _accuracy(model, task, way, handle, seed, QUICK_SAMPLES if quick else None)
    timed = {}
    for way in ways:
        asked = next(questions(task, way.shots, "test", samples=1, seed=seed, pool=way.pool))
        timed[way.name] = way.question(*asked)
    times = _times(model, ways, timed, QUICK_ROUNDS if quick else ROUNDS)
    rows = []
    for way in ways:
        with way.attached() as handle:
            inputs = timed[way.name].inputs(handle)
            peak = _attention_peak_bytes(model, inputs)
        found = accuracies[way.name]
        tokens = inputs["input_ids"].shape[1]
        rows.append(Row(way.name, found.value, found.interval, tokens, *times[way.name], peak))
    return rows


def _accuracy(
    model: nn.Module, task: str, way: Way, handle: mk.Handle | None, seed: int, samples: int | None
) -> Accuracy:
    def ask(queries: Sequence[data.Example], shots: Sequence[Sequence[data.Example]]) -> dict:
        return way.question(queries, shots).inputs(handle)

    return accuracy(model, task, way.shots, "test", samples=samples, seed=seed, pool=way.pool, ask=ask)


def _times(
    model: nn.Module, ways: list[Way], questions: dict[str, Question], rounds: int
) -> dict[str, tuple[float, float]]:
    """Medians of time to first token and per further token; the ways take turns, as machines drift."""
    first, further = ({way.name: [] for way in ways} for _ in range(2))
    for number in tqdm(range(rounds + 1), desc="timing", unit="round"):
        for way in ways:
            with way.attached() as handle:
                one = _generate_seconds(model, questions[way.name], handle, 1)
                many = _generate_seconds(model, questions[way.name], handle, 1 + FURTHER_TOKENS)
            if number > 0:  # the first round warms up
                first[way.name].append(1e3 * one)
                further[way.name].append(1e3 * (many - one) / FURTHER_TOKENS)
    return {
        way.name: (statistics.median(first[way.name]), statistics.median(further[way.name])) for way in ways
    }


def _generate_seconds(model: nn.Module, question: Question, handle: mk.Handle | None, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(**question.inputs(handle), min_new_tokens=tokens, max_new_tokens=tokens)
    return time.perf_counter() - start


def _attention_peak_bytes(model: nn.Module, inputs: dict) -> int:
    """Peak allocated bytes of one attention module on the whole prompt."""
    attention = find_anchors(model)[0].self_attn
    calls: list[dict] = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, use_cache=False)
        hook.remove()
        return peak_allocated_bytes(lambda: attention(**calls[0]))


def _print(rows: list[Row], task: str) -> None:
    table = Table(title=f"task {task!r}, held-out images, batch 1 on this CPU", box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("correct", "95 % interval", "prompt\ntokens", "first\nms", "further\nms", "memory\nKiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.interval
        table.add_row(
            row.name,
            f"{row.accuracy:.1%}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            str(row.prompt_tokens),
            f"{row.first_token_ms:.1f}",
            f"{row.further_token_ms:.2f}",
            f"{row.attention_peak_bytes / 1024:.0f}",
        )
    Console().print(table)
    print("first, further: time to the first token, to each further one. memory: peak of one attention layer")


def _plot(rows: list[Row], task: str, path: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    accuracy, latency = figure.subplots(1, 2, sharey=True)
    names = [row.name for row in rows][::-1]
    colours = ["tab:blue" if name in LABELS.values() else "tab:orange" for name in names]
    values = [row.accuracy for row in rows][::-1]
    spread = [
        [row.accuracy - row.interval[0] for row in rows][::-1],
        [row.interval[1] - row.accuracy for row in rows][::-1],
    ]
    accuracy.barh(names, values, xerr=spread, color=colours)
    accuracy.set(xlim=(0, 1), xlabel=f"accuracy on {task!r}, held-out images")
    latency.barh(names, [row.first_token_ms for row in rows][::-1], color=colours)
    latency.set(xlabel="time to first token (ms)")
    figure.savefig(path, dpi=120)
