"""Accuracy of the tiny LVLM, with or without demonstrations, with or without an adapter attached.

``accuracy(model, task, shots, split, ...)`` takes any model of the class: to measure an adapter,
attach it and ask for ``shots=0``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mmicl_kernels as mk
from mmicl_kernels.evaluation import wilson_interval

from . import data
from .processor import DigitsPrompts

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


# Inputs of queries, each after its own demonstrations.
Ask = Callable[[Sequence[data.Example], Sequence[Sequence[data.Example]]], Mapping[str, Tensor]]


def adapted_prompts(
    handle: mk.Handle, queries: Sequence[data.Example], shots: Sequence[Sequence[data.Example]]
) -> Mapping[str, Tensor]:
    """Plain prompts, after the tokens of an adapter that learned some."""
    inputs = DigitsPrompts().asked(queries, shots)
    return inputs if handle.single.embedding_site is None else handle.splice(inputs)


def questions(
    task: str,
    shots: int,
    split: str,
    *,
    samples: int | None = None,
    seed: int = 0,
    scrambled: bool = False,
    pool: data.Examples | None = None,
    batch: int = BATCH,
) -> Iterator[tuple[list[data.Example], list[list[data.Example]]]]:
    """Queries and the demonstrations of each, in batches.

    Queries come from ``split`` (``samples=None``: each scan once), demonstrations from ``pool``, by default
    one drawing of each training scan. The same ``seed`` gives the same queries for every task, shots and
    control.
    """
    queries = data.Examples((task,), split, generator=_generator(seed), count=samples)
    generator = _generator(seed + 1)
    pool = data.Examples((task,), "train", generator=generator) if pool is None else pool
    for start in range(0, len(queries), batch):
        part = [queries[i] for i in range(start, min(start + batch, len(queries)))]
        rows = [[pool[i] for i in data.other_scans(pool, x, shots, generator)] for x in part]
        if scrambled:
            rows = [[data.scrambled(x, generator) for x in row] for row in rows]
        yield part, rows


def accuracy(
    model, task: str, shots: int, split: str = "test", *, ask: Ask | None = None, **options
) -> Accuracy:
    """How often the most likely next word, over the whole vocabulary, is the true answer.

    ``options`` are those of :func:`questions`. ``scrambled`` gives the demonstrations random answers of the
    same task; the query is still scored on its true answer. The model stays in the mode (train or eval) it
    is in.
    """
    prompts = DigitsPrompts()
    found = [
        score(model, (ask or prompts.asked)(*question), prompts.answers(question[0]))
        for question in questions(task, shots, split, **options)
    ]
    return sum(found, Accuracy(0, 0))


@torch.no_grad()
def score(model, inputs: Mapping[str, Tensor], answers: Tensor) -> Accuracy:
    """Of the ids ``answers [B]``: how many are the first token of a greedy ``generate``."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    said = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
    return Accuracy(int((said == answers).sum()), len(answers))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
