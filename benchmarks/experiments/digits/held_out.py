"""Does AIM's projection learn tokens or tasks? ``python -m benchmarks.experiments.digits.held_out``.

In the world of ``wide``, whose backbone knows twelve attributes: a projection trained on nine of them answers
for the three others, whose words and questions were in none of its batches, beside the same demonstrations in
a plain prompt and beside the identity, which is not trained at all. Writes ``held_out.json``.
"""

import argparse
import hashlib
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.experiments.digits import aim, wide
from benchmarks.experiments.digits.evaluate import Ask
from benchmarks.experiments.digits.processor import DigitsPrompts
from benchmarks.experiments.digits.train import ARGUMENTS
from mmicl_kernels.methods import AIMAdapter
from mmicl_kernels.training import DrawnEpisodes

RESULTS = Path(__file__).with_name("held_out.json")
SEEDS, SHOTS = (0, 1, 2), 8
GROUPS = {"trained": wide.TRAINED, "held out": wide.HELD_OUT}
QUESTIONS = ("named", "unnamed")  # whether the question says which attribute is asked for


PROMPTS = DigitsPrompts(wide.VOCABULARY, fused="end")
UNNAMED = 0.4  # share of training episodes whose question does not name the attribute
# Chosen on the validation split. Weight decay is towards the identity.
RECIPE = mk.Recipe(steps=300, batch_size=32, accumulate=1, shots=SHOTS, learning_rate=5e-3, weight_decay=3.0)


def train_fuser(model: nn.Module, recipe: mk.Recipe, seed: int) -> AIMAdapter:
    """A projection that saw the attributes ``wide.TRAINED`` alone; their states at a demonstration's end."""
    episodes = training_episodes(recipe, seed)
    return mk.train(
        model, PROMPTS, episodes, aim.FUSER, recipe=recipe, seed=seed, arguments=ARGUMENTS, progress=False
    )


def training_episodes(recipe: mk.Recipe, seed: int) -> DrawnEpisodes:
    """As many as the recipe sees, each of them once."""
    return wide.draw_episodes(
        recipe.steps * recipe.batch_size, recipe.shots, wide.TRAINED, split="train",
        generator=torch.Generator().manual_seed(seed), augment=True, unnamed=UNNAMED,
    )  # fmt: skip


def measure(
    model: nn.Module, split: str, seeds: tuple[int, ...], samples: int, recipe: mk.Recipe, out: Path
) -> dict:
    """Accuracies of plain prompts, of the identity and of trained projections, by group and question."""
    row = partial(_row, model, split, samples)
    results = {
        "split": split,
        "weights": hashlib.sha256(wide.WEIGHTS.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "samples": samples,
        "recipe": recipe.description(),
        "plain": row(PROMPTS.asked),
        "seconds": [],
        "seeds": {},
    }
    with mk.attach(model, mk.create(model, aim.FUSER)) as handle:
        results["identity"] = row(partial(aim.fused_prompts, handle, PROMPTS))
    for seed in tqdm(seeds, desc="projections", unit="seed"):
        start = time.perf_counter()
        adapter = train_fuser(model, recipe, seed)
        results["seconds"].append(round(time.perf_counter() - start, 1))
        with mk.attach(model, adapter) as handle:
            results["seeds"][str(seed)] = row(partial(aim.fused_prompts, handle, PROMPTS))
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _row(model: nn.Module, split: str, samples: int, ask: Ask) -> dict[str, dict[str, float]]:
    """By question, then attribute."""
    row = {}
    for question in QUESTIONS:
        options = {"named": question == "named", "samples": samples, "ask": ask}
        found = {name: wide.accuracy(model, name, SHOTS, split, **options) for name in wide.ATTRIBUTES}
        row[question] = {name: round(x.value, 4) for name, x in found.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--samples", type=int, default=200, help="queries of each attribute")
    parser.add_argument("--weight-decay", type=float, default=RECIPE.weight_decay)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small to share out
    recipe = replace(RECIPE, weight_decay=options.weight_decay)
    measure(wide.load_wide_model(), options.split, tuple(options.seeds), options.samples, recipe, options.out)


if __name__ == "__main__":
    main()
