"""Does AIM's projection learn tokens or tasks? ``python -m benchmarks.experiments.digits.held_out``.

In the world of ``wide``, whose backbone knows twelve attributes: a projection trained on nine of them answers
for the three others, whose words and questions were in none of its batches, beside the same demonstrations in
a plain prompt and beside the identity, which is not trained at all. Writes ``held_out.json``.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.experiments.digits import aim, data, wide
from benchmarks.experiments.digits.train import fit
from mmicl_kernels.methods import AIMAdapter
from mmicl_kernels.training import AggregationBatch

RESULTS = Path(__file__).with_name("held_out.json")
SEEDS, SHOTS = (0, 1, 2), 8
GROUPS = {"trained": wide.TRAINED, "held out": wide.HELD_OUT}
QUESTIONS = ("named", "unnamed")  # whether the question says which attribute is asked for


@dataclass(frozen=True)
class Recipe:
    """How the projection is trained, chosen on the validation split.

    Attributes:
        steps, batch: updates, and queries in each. shots: of every query.
        weight_decay: towards the identity.
        unnamed: share of batches whose question does not name the attribute.
    """

    steps: int = 300
    batch: int = 32
    shots: int = SHOTS
    learning_rate: float = 5e-3
    weight_decay: float = 3.0
    unnamed: float = 0.4


def train_fuser(model: nn.Module, recipe: Recipe, seed: int) -> AIMAdapter:
    """A projection that saw the attributes ``wide.TRAINED`` alone; their states at a demonstration's end."""
    drawn, rate = batches(recipe, torch.Generator().manual_seed(seed)), recipe.learning_rate
    return fit(model, aim.FUSER, drawn, recipe.steps, seed, rate, False, recipe.weight_decay)


def batches(recipe: Recipe, generator: torch.Generator) -> Iterator[AggregationBatch]:
    """Endless batches of trained attributes."""
    while True:
        named = torch.rand((), generator=generator) >= recipe.unnamed
        demonstrations, queries, attribute = wide.draw_episodes(
            recipe.batch, recipe.shots, wide.TRAINED, split="train", generator=generator, augment=True
        )
        attribute = attribute if named else None
        query = wide.episode_inputs(None, queries, attribute)
        labels = query.labels.clone()
        labels[:, -1] = data.IGNORE  # the answer alone, not the end
        alone, ends = demonstration_prompts(demonstrations, attribute)
        yield AggregationBatch(alone, ends, query.inputs, labels, aim.chosen(*demonstrations.shape))


def demonstration_prompts(
    demonstrations: data.Samples, attribute: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each of ``[B, K]`` demonstrations as a prompt of its own, and where it ends."""
    K = demonstrations.shape[1]
    flat = demonstrations.flatten()
    repeated = None if attribute is None else attribute.repeat_interleave(K)
    inputs = wide.episode_inputs(None, flat, repeated).inputs
    return inputs, inputs["input_ids"] == data.END_ID


def fused_prompts(
    handle: mk.Handle, demonstrations: data.Samples, queries: data.Samples, attribute: torch.Tensor | None
) -> data.Episode:
    """One fused token for each demonstration, before the query."""
    episode = wide.episode_inputs(None, queries, attribute, with_answer=False)
    alone, ends = demonstration_prompts(demonstrations, attribute)
    return aim.spliced(handle, episode, alone, ends, demonstrations.shape)


def measure(
    model: nn.Module, split: str, seeds: tuple[int, ...], samples: int, recipe: Recipe, out: Path
) -> dict:
    """Accuracies of plain prompts, of the identity and of trained projections, by group and question."""
    row = partial(_row, model, split, samples)
    results = {
        "split": split,
        "weights": hashlib.sha256(wide.WEIGHTS.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "samples": samples,
        "recipe": vars(recipe),
        "plain": row(wide.plain_prompts),
        "seconds": [],
        "seeds": {},
    }
    with mk.attach(model, mk.create(model, aim.FUSER)) as handle:
        results["identity"] = row(partial(fused_prompts, handle))
    for seed in tqdm(seeds, desc="projections", unit="seed"):
        start = time.perf_counter()
        adapter = train_fuser(model, recipe, seed)
        results["seconds"].append(round(time.perf_counter() - start, 1))
        with mk.attach(model, adapter) as handle:
            results["seeds"][str(seed)] = row(partial(fused_prompts, handle))
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _row(model: nn.Module, split: str, samples: int, ask: Callable) -> dict[str, dict[str, float]]:
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
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small to share out
    recipe = Recipe(weight_decay=options.weight_decay)
    measure(wide.load_wide_model(), options.split, tuple(options.seeds), options.samples, recipe, options.out)


if __name__ == "__main__":
    main()
