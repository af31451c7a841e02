"""MimIC on the tiny LVLM: one adapter per task, trained against the same model with demonstrations.

``python -m benchmarks.experiments.digits.mimic`` measures every task with three seeds on the test split
and writes ``results.json``; ``--split validation`` is what the recipe below was chosen on.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.evaluate import Accuracy, accuracy
from benchmarks.experiments.digits.model import load_model
from mmicl_kernels.training import EpisodeBatch, MimICObjective, TrainingConfig, train, trainable

RESULTS = Path(__file__).with_name("results.json")
SEEDS = (0, 1, 2)
SHOTS = (0, 1, 4, 8, 16)


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: ``steps`` updates on ``batch`` queries, the teacher with ``shots``."""

    steps: int = 300
    batch: int = 16
    shots: int = 8
    learning_rate: float = 5e-3


def train_mimic(
    model: nn.Module,
    task: str,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    config: mk.MimICConfig | None = None,
    progress: bool = True,
) -> mk.MimICAdapter:
    """An adapter for ``task``, trained on the train split alone; the model is left as it was."""
    recipe = recipe or Recipe()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = mk.create(model, config or mk.MimICConfig())
    with mk.attach(model, adapter) as handle:
        train(
            MimICObjective(handle),
            trainable(adapter),
            _batches(task, recipe, torch.Generator().manual_seed(seed)),
            recipe.steps,
            model=model,
            config=TrainingConfig(learning_rate=recipe.learning_rate),
            progress=progress,
        )
    return adapter.requires_grad_(False)


def _batches(task: str, recipe: Recipe, generator: torch.Generator) -> Iterator[EpisodeBatch]:
    """Endless batches; queries and demonstrations are drawn anew for each."""
    while True:
        demonstrations, queries = data.draw_episodes(
            recipe.batch, recipe.shots, split="train", generator=generator, augment=True
        )
        student = data.episode_inputs(None, queries, task)
        teacher = data.episode_inputs(demonstrations, queries, task)
        yield EpisodeBatch(
            student.inputs, teacher.inputs, student.query_mask, teacher.query_mask, student.labels
        )


def measure(model: nn.Module, split: str, seeds: tuple[int, ...], recipe: Recipe) -> dict:
    """Accuracies of plain prompts (by shots) and of MimIC without demonstrations (by seed), per task."""
    plain = {
        str(shots): {task: _rate(accuracy(model, task, shots, split)) for task in data.TASKS}
        for shots in SHOTS
    }
    mimic: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    for seed in seeds:
        mimic[str(seed)] = {}
        for task in data.TASKS:
            adapter = train_mimic(model, task, seed=seed, recipe=recipe)
            with mk.attach(model, adapter):
                mimic[str(seed)][task] = _rate(accuracy(model, task, 0, split))
    per_adapter = (time.perf_counter() - start) / (len(seeds) * len(data.TASKS))
    means = {shots: _mean(row) for shots, row in plain.items()}
    mimic_means = {seed: _mean(row) for seed, row in mimic.items()}
    return {
        "split": split,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "seconds_per_adapter": round(per_adapter, 1),
        "plain": plain,
        "plain_mean": means,
        "mimic": mimic,
        "mimic_mean": mimic_means,
        "mimic_over_8_shot": {seed: round(mean / means["8"], 4) for seed, mean in mimic_means.items()},
    }


def _rate(measured: Accuracy) -> float:
    return round(measured.value, 4)


def _mean(row: dict[str, float]) -> float:
    return round(sum(row.values()) / len(row), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    recipe = replace(Recipe(), steps=arguments.steps, learning_rate=arguments.learning_rate)
    torch.set_num_threads(1)  # the model is too small to share out
    results = measure(load_model(), arguments.split, tuple(arguments.seeds), recipe)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("plain_mean", "mimic_mean", "mimic_over_8_shot")}))


if __name__ == "__main__":
    main()
