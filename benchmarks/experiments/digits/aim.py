"""AIM on the digits: ``python -m benchmarks.experiments.digits.aim`` writes ``aim.json`` and a plot.

One projection for all seven tasks, and fused tokens of demonstrations it never saw, beside the same
demonstrations in the prompt. Demonstrations come from the split of the queries.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.evaluate import accuracy, plain_prompts
from benchmarks.experiments.digits.model import WEIGHTS, load_model
from benchmarks.experiments.digits.train import fit
from benchmarks.timing import peak_allocated_bytes
from mmicl_kernels.library import FusedTokens
from mmicl_kernels.methods import AIMAdapter
from mmicl_kernels.training import AggregationBatch

RESULTS = Path(__file__).with_name("aim.json")
SEEDS, SHOTS = (0, 1, 2), (1, 4, 8, 16)
MEMORY_SHOTS = (0, 1, 2, 4, 8, 16, 32, 64)
FUSER = mk.AIMConfig(positions="answer")
BANKED = 256  # demonstrations


@dataclass(frozen=True)
class Recipe:
    """How the projection is trained.

    Attributes:
        steps, batch: updates, and queries in each.
        most_shots: of a batch, drawn from one to this.
        fused: which positions of a demonstration become tokens: "label", its answer and its end, or "end".
    """

    steps: int = 200
    batch: int = 32
    most_shots: int = 8
    learning_rate: float = 5e-3
    fused: str = "label"


def train_aim(
    model: nn.Module, *, recipe: Recipe | None = None, seed: int = 0, tasks: tuple[str, ...] = data.TASKS,
    progress: bool = True,
) -> AIMAdapter:  # fmt: skip
    """A projection trained on episodes of ``tasks`` from the train split; the model is left as it was."""
    recipe = recipe or Recipe()
    drawn = batches(tasks, recipe, torch.Generator().manual_seed(seed))
    return fit(model, FUSER, drawn, recipe.steps, seed, recipe.learning_rate, progress, weight_decay=0)


def batches(tasks: tuple[str, ...], recipe: Recipe, generator: torch.Generator) -> Iterator[AggregationBatch]:
    """Endless batches of a task for each query and as many shots for all."""
    indices = torch.tensor([list(data.WORDS).index(task) for task in tasks])
    while True:
        shots = int(torch.randint(1, recipe.most_shots + 1, (), generator=generator))
        task = indices[torch.randint(len(tasks), (recipe.batch,), generator=generator)]
        demonstrations, queries = data.draw_episodes(
            recipe.batch, shots, split="train", generator=generator, augment=True
        )
        alone, positions = demonstration_prompts(demonstrations, task, recipe.fused)
        query = data.episode_inputs(None, queries, task)
        labels = query.labels.clone()
        labels[:, -1] = data.IGNORE  # the answer alone, not the end
        yield AggregationBatch(alone, positions, query.inputs, labels, chosen(recipe.batch, shots))


def demonstration_prompts(
    demonstrations: data.Samples, task: str | Tensor, fused: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Each of ``[B, K]`` demonstrations as a prompt of its own, and the positions that are fused."""
    B, K = demonstrations.shape
    flat = demonstrations.flatten()
    task = task if isinstance(task, str) else task.repeat_interleave(K)
    alone = data.episode_inputs(None, flat, task)
    positions = alone.labels != data.IGNORE
    if fused == "end":
        positions &= alone.inputs["input_ids"] == data.END_ID
    return alone.inputs, positions


def chosen(B: int, K: int) -> list[list[int]]:
    return [list(range(row * K, (row + 1) * K)) for row in range(B)]


def fused_prompts(
    handle: mk.Handle, fused: str, demonstrations: data.Samples, queries: data.Samples, task: str
) -> data.Episode:
    """The demonstrations as fused tokens, before the query."""
    if demonstrations.shape[1] == 0:
        return plain_prompts(demonstrations, queries, task)
    episode = data.episode_inputs(None, queries, task, with_answer=False)
    alone, positions = demonstration_prompts(demonstrations, task, fused)
    return spliced(handle, episode, alone, positions, demonstrations.shape)


def spliced(
    handle: mk.Handle, query: data.Episode, alone: dict[str, Tensor], positions: Tensor, shape: torch.Size
) -> data.Episode:
    """``query`` after the fused tokens of demonstrations ``[B, K]``, which ``alone`` has as prompts."""
    tokens = handle.aggregate(alone, positions)
    offsets = torch.tensor([0, *accumulate(map(len, tokens))])
    fused = FusedTokens(torch.cat(tokens).detach(), offsets, None)
    return replace(query, inputs=handle.splice(query.inputs, chosen(*shape), tokens=fused))


def as_demonstrations(samples: data.Samples, task: str) -> list[mk.Demonstration]:
    """``[N]`` samples as a bank stores them."""
    answers = samples.answers[:, list(data.WORDS).index(task)]
    images = [(image.numpy().tobytes(),) for image in samples.images]
    return list(map(mk.Demonstration, images, ["question"] * len(samples), data.decode(answers)))


def collate(demonstrations: Sequence[mk.Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts of banked demonstrations; their answers and ends are fused."""
    pixels = [np.frombuffer(*x.images, np.float32).reshape(3, data.IMAGE_SIZE, -1) for x in demonstrations]
    words = [[data.QUESTION_ID, data.word_id(x.answer), data.END_ID] for x in demonstrations]
    before = torch.tensor([data.BOS_ID] + [data.IMAGE_ID] * data.IMAGE_TOKENS).expand(len(words), -1)
    ids = torch.cat([before, torch.tensor(words)], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(np.stack(pixels)),
    }
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, -2:] = True
    return inputs, positions


def fill_bank(
    folder: Path, model: nn.Module, adapter: AIMAdapter, task: str, seed: int
) -> mk.DemonstrationBank:
    """A bank in a new ``folder`` of demonstrations of ``task`` from the train split."""
    bank = mk.DemonstrationBank.create(folder, adapter, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    samples = data.draw_queries(BANKED, split="train", generator=generator)
    with mk.attach(model, adapter, bank=bank) as handle:
        handle.add_demonstrations(as_demonstrations(samples, task), collate, batch_size=64, progress=False)
    return bank


def banked(demonstrations: data.Samples) -> list[list[int]]:
    """For ``[B, K]`` drawn demonstrations, whichever the bank has in their stead."""
    return (demonstrations.originals % BANKED).tolist()


def prompt_tokens(ask: Callable, task: str, shots: int) -> int:
    generator = torch.Generator().manual_seed(0)
    demonstrations, queries = data.draw_episodes(1, shots, split="validation", generator=generator)
    return ask(demonstrations, queries, task).inputs["input_ids"].shape[1]


def measure_memory(model: nn.Module, adapter: AIMAdapter, fused: str) -> dict[str, dict[str, list[int]]]:
    """Peak bytes that one forward pass allocates, and its tokens, by shots: plain prompts and fused ones."""
    found = {}
    with mk.attach(model, adapter) as handle:
        for name, ask in (("plain", plain_prompts), ("fused", partial(fused_prompts, handle, fused))):
            rows = found[name] = {"shots": list(MEMORY_SHOTS), "tokens": [], "bytes": []}
            for shots in MEMORY_SHOTS:
                generator = torch.Generator().manual_seed(0)
                episode = ask(*data.draw_episodes(1, shots, split="validation", generator=generator), "digit")
                rows["tokens"].append(episode.inputs["input_ids"].shape[1])
                with torch.no_grad():
                    rows["bytes"].append(peak_allocated_bytes(partial(model, **episode.inputs)))
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
        "recipe": vars(Recipe()),
        "plain": {str(shots): _row(model, split, shots, plain_prompts) for shots in SHOTS},
        "fused": {},
    }
    for fused in ("label", "end"):
        found = results["fused"][fused] = {"seconds": [], "seeds": {}}
        for seed in tqdm(seeds if fused == "label" else seeds[:1], desc=f"fused: {fused}", unit="seed"):
            start = time.perf_counter()
            adapter = train_aim(model, recipe=Recipe(fused=fused), seed=seed, progress=False)
            found["seconds"].append(round(time.perf_counter() - start, 1))
            with mk.attach(model, adapter) as handle:
                ask = partial(fused_prompts, handle, fused)
                found["seeds"][str(seed)] = {str(k): _row(model, split, k, ask) for k in SHOTS}
            out.write_text(json.dumps(results, indent=1) + "\n")
        if "memory" not in results:
            results["memory"] = measure_memory(model, adapter, fused)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _row(model: nn.Module, split: str, shots: int, ask: Callable) -> dict[str, float]:
    row = {
        task: round(accuracy(model, task, shots, split, demonstrations_from=split, ask=ask).value, 4)
        for task in data.TASKS
    }
    return row | {"prompt_tokens": prompt_tokens(ask, data.TASKS[0], shots)}


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
