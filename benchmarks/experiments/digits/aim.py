"""AIM on the digits: ``python -m benchmarks.experiments.digits.aim`` writes ``aim.json`` and a plot.

One projection for all seven tasks, and fused tokens of demonstrations it never saw, beside the same
demonstrations in the prompt. Demonstrations come from the split of the queries.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, count
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.evaluate import Ask, accuracy, questions
from benchmarks.experiments.digits.model import WEIGHTS, load_model
from benchmarks.experiments.digits.processor import DigitsPrompts
from benchmarks.experiments.digits.train import ARGUMENTS, training_examples
from benchmarks.harness.timing import peak_allocated_bytes
from mmicl_kernels.methods import AIMAdapter
from mmicl_kernels.methods.sites import FusedTokens

RESULTS = Path(__file__).with_name("aim.json")
SEEDS, SHOTS = (0, 1, 2), (1, 4, 8, 16)
MEMORY_SHOTS = (0, 1, 2, 4, 8, 16, 32, 64)
FUSER = mk.AIMConfig(positions="answer_end")
BANKED = 256  # demonstrations


RECIPE = mk.Recipe(steps=200, batch_size=32, accumulate=1, shots=(1, 8), learning_rate=5e-3, weight_decay=0)


def train_aim(
    model: nn.Module, *, fused: str = "label", recipe: mk.Recipe = RECIPE, seed: int = 0,
    tasks: tuple[str, ...] = data.TASKS, progress: bool = True,
) -> AIMAdapter:  # fmt: skip
    """A projection trained on episodes of ``tasks`` from the train split; the model is left as it was.

    ``fused`` is which positions of a demonstration become tokens, as ``DigitsPrompts`` has it.
    """
    return mk.train(
        model, DigitsPrompts(fused=fused), training_examples(tasks, recipe, seed), FUSER,
        recipe=recipe, draw=data.other_scans, seed=seed, arguments=ARGUMENTS, progress=progress,
    )  # fmt: skip


def fused_prompts(
    handle: mk.Handle,
    prompts: DigitsPrompts,
    queries: Sequence[data.Example],
    shots: Sequence[Sequence[data.Example]],
) -> dict[str, object]:
    """The demonstrations as fused tokens, before their query."""
    inputs = prompts.asked(queries)
    if not any(shots):
        return inputs
    places = count()
    chosen = [[next(places) for _ in row] for row in shots]
    tokens = handle.aggregate(*prompts.demonstrations([x.demonstration() for row in shots for x in row]))
    offsets = torch.tensor([0, *accumulate(map(len, tokens))])
    return handle.splice(inputs, chosen, tokens=FusedTokens(torch.cat(tokens).detach(), offsets, None))


def banked(task: str, seed: int) -> data.Examples:
    """What a bank of ``task`` is filled with: drawings of the train split."""
    return data.Examples((task,), "train", generator=torch.Generator().manual_seed(seed), count=BANKED)


def fill_bank(
    folder: Path, model: nn.Module, adapter: AIMAdapter, examples: Sequence[data.Example]
) -> mk.DemonstrationBank:
    """A bank of ``examples`` in a new ``folder``."""
    bank = mk.DemonstrationBank.create(folder, adapter, dtype=torch.float32)
    shown, collate = [x.demonstration() for x in examples], DigitsPrompts(fused="label").demonstrations
    with mk.attach(model, adapter, bank=bank) as handle:
        handle.add_demonstrations(shown, collate, batch_size=64, progress=False)
    return bank


def prompt_tokens(ask: Ask, shots: int) -> int:
    question = next(questions("digit", shots, "validation", samples=1))
    return ask(*question)["input_ids"].shape[1]


def measure_memory(model: nn.Module, adapter: AIMAdapter, prompts: DigitsPrompts) -> dict[str, dict]:
    """Peak bytes that one forward pass allocates, and its tokens, by shots: plain prompts and fused ones."""
    found = {}
    with mk.attach(model, adapter) as handle:
        for name, ask in (("plain", prompts.asked), ("fused", partial(fused_prompts, handle, prompts))):
            rows = found[name] = {"shots": list(MEMORY_SHOTS), "tokens": [], "bytes": []}
            for shots in MEMORY_SHOTS:
                inputs = ask(*next(questions("digit", shots, "validation", samples=1)))
                rows["tokens"].append(inputs["input_ids"].shape[1])
                with torch.no_grad():
                    rows["bytes"].append(peak_allocated_bytes(partial(model, **inputs)))
    return found


def plot(results: dict, path: Path) -> None:
    """Memory and accuracy against the number of demonstrations."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    memory, correct = figure.subplots(1, 2)
    for name, rows in results["memory"].items():
        memory.plot(rows["shots"], [x / 2**20 for x in rows["bytes"]], marker="o", label=name)
    memory.set(xlabel="demonstrations", ylabel="peak MiB of a forward pass", ylim=(0, None))
    shots = list(results["plain"])
    lines = {"plain": [results["plain"][k] for k in shots]}
    for fused, found in results["fused"].items():
        lines[f"fused: {fused}"] = [mean_row(found["seeds"], k) for k in shots]
    for name, rows in lines.items():
        correct.plot([int(k) for k in shots], [mean_of(row) for row in rows], marker="o", label=name)
    correct.set(xlabel="demonstrations", ylabel="accuracy, mean of seven tasks", ylim=(0, 1.02))
    for axes in (memory, correct):
        axes.legend()
    figure.savefig(path, dpi=120)


def mean_row(seeds: dict[str, dict], shots: str) -> dict[str, float]:
    """By task the mean over seeds."""
    return {task: statistics.mean(rows[shots][task] for rows in seeds.values()) for task in data.TASKS}


def mean_of(row: dict[str, float]) -> float:
    return statistics.mean(row[task] for task in data.TASKS)


def measure(model: nn.Module, split: str, seeds: tuple[int, ...], out: Path) -> dict:
    """Accuracies of plain prompts and of fused ones, by shots and task; written after every row."""
    results = {
        "split": split,
        "weights": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "recipe": RECIPE.description(),
        "plain": {str(shots): _row(model, split, shots, DigitsPrompts().asked) for shots in SHOTS},
        "fused": {},
    }
    for fused in ("label", "end"):
        found = results["fused"][fused] = {"seconds": [], "seeds": {}}
        prompts = DigitsPrompts(fused=fused)
        for seed in tqdm(seeds, desc=f"fused: {fused}", unit="seed"):
            start = time.perf_counter()
            adapter = train_aim(model, fused=fused, seed=seed, progress=False)
            found["seconds"].append(round(time.perf_counter() - start, 1))
            with mk.attach(model, adapter) as handle:
                ask = partial(fused_prompts, handle, prompts)
                found["seeds"][str(seed)] = {str(k): _row(model, split, k, ask) for k in SHOTS}
            out.write_text(json.dumps(results, indent=1) + "\n")
        if "memory" not in results:
            results["memory"] = measure_memory(model, adapter, prompts)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _row(model: nn.Module, split: str, shots: int, ask: Ask) -> dict[str, float]:
    row = {}
    for task in data.TASKS:
        pool = data.Examples((task,), split, generator=torch.Generator().manual_seed(1))
        row[task] = round(accuracy(model, task, shots, split, pool=pool, ask=ask).value, 4)
    return row | {"prompt_tokens": prompt_tokens(ask, shots)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small to share out
    results = measure(load_model(), arguments.split, tuple(arguments.seeds), arguments.out)
    plot(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
