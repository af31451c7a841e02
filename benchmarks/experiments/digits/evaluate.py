"""Accuracy of the tiny LVLM, with or without demonstrations, with or without an adapter attached.

``accuracy(model, task, shots, split, ...)`` takes any model of the class: to measure an adapter,
attach it and ask for ``shots=0``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mmicl_kernels.evaluation import wilson_interval

from . import data

BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` answers; ``a + b`` pools two of them."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval."""
        return wilson_interval(self.correct, self.total)

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.correct + other.correct, self.total + other.total)


def plain_prompts(demonstrations: data.Samples, queries: data.Samples, task: str) -> data.Episode:
    """The demonstrations as they are, before the query."""
    return data.episode_inputs(demonstrations, queries, task, with_answer=False)


# Makes prompts of demonstrations [B, K] and queries [B].
Ask = Callable[[data.Samples, data.Samples, str], data.Episode]


def evaluation_episodes(
    task: str,
    shots: int,
    split: str,
    *,
    samples: int | None = None,
    seed: int = 0,
    scrambled: bool = False,
    demonstrations_from: str = "train",
    ask: Ask = plain_prompts,
    batch: int = BATCH,
) -> Iterator[data.Episode]:
    """Prompts without the query's answer, in batches, as ``ask`` makes them.

    Queries come from ``split`` (``samples=None``: each original once). The same ``seed`` gives the same
    queries for every task, shots and control.
    """
    count = len(data.split_originals(split)) if samples is None else samples
    if count < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    # Two generators: the queries must not depend on how much the demonstrations drew.
    queries = data.draw_queries(count, split=split, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for start in range(0, count, batch):
        query = queries[start : start + batch]
        demonstrations = data.draw_demonstrations(
            query, shots, generator=generator, split=demonstrations_from
        )
        if scrambled:
            demonstrations = data.scramble(demonstrations, task, generator)
        yield ask(demonstrations, query, task)


@torch.no_grad()
def accuracy(
    model,
    task: str,
    shots: int,
    split: str = "test",
    *,
    samples: int | None = None,
    seed: int = 0,
    scrambled: bool = False,
    demonstrations_from: str = "train",
    ask: Ask = plain_prompts,
) -> Accuracy:
    """How often the most likely next word, over the whole vocabulary, is the true answer.

    That is the first token of a greedy ``generate``. ``scrambled`` gives the demonstrations random
    answers of the same task; the query is still scored on its true answer. The model stays in
    the mode (train or eval) it is in.
    """
    correct = total = 0
    for episode in evaluation_episodes(
        task, shots, split, samples=samples, seed=seed, scrambled=scrambled,
        demonstrations_from=demonstrations_from, ask=ask,
    ):  # fmt: skip
        inputs = {name: value.to(model.device) for name, value in episode.inputs.items()}
        answer = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
        correct += int((answer == episode.targets).sum())
        total += len(answer)
    return Accuracy(correct, total)


def table(
    model,
    split: str,
    shots: tuple[int, ...],
    *,
    samples: int | None = None,
    seed: int = 0,
    scrambled: bool = False,
) -> dict[str, dict[str, float]]:
    """``{shots: {task: accuracy, ..., "mean": mean}}``, rounded to 4 places, ready for JSON."""
    rows = {}
    for count in shots:
        row = {
            task: accuracy(model, task, count, split, samples=samples, seed=seed, scrambled=scrambled).value
            for task in data.TASKS
        }
        row["mean"] = sum(row.values()) / len(row)
        rows[str(count)] = {task: round(value, 4) for task, value in row.items()}
    return rows


def main() -> None:
    from .model import load_model

    model = load_model()
    for label, shots, scrambled in (("", (0, 1, 4, 8, 16), False), ("scrambled", (1, 8, 16), True)):
        for count, row in table(model, "test", shots, scrambled=scrambled).items():
            cells = "  ".join(f"{task} {value:.3f}" for task, value in row.items())
            print(f"{count:>2} shots {label:9}  {cells}")


if __name__ == "__main__":
    main()
