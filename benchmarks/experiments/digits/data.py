"""Real digit scans, drawn on coloured paper, as episodes of multimodal in-context learning.

Interface
---------
``TASKS``, ``WORDS[task]``, ``VOCABULARY``      the seven tasks, answer words (of "mixed" too), all tokens
``word_id(word)``, ``decode(ids)``              word -> id, ids -> words
``draw_episodes(count, shots, split=..., generator=...) -> (demonstrations [B,K], queries [B])``
``scramble(demonstrations, task, generator)``   the control: random answers of the same task
``episode_inputs(demonstrations, queries, task) -> Episode``
    ``.inputs``       dict for ``model(**inputs)``: input_ids, attention_mask, pixel_values
    ``.labels``       [B,T] int64, -100 where there is no loss; HuggingFace shifts it itself
    ``.query_mask``   [B,T] bool, the query's own tokens (image, question, answer, end)
    ``.targets``      [B] int64, the id of the true answer word

``Samples`` holds images and the answers to every task, with any leading shape (``[B]`` queries,
``[B,K]`` demonstrations), and is indexed like a tensor. ``demonstrations=None`` or ``[B,0]`` gives
the zero-shot prompt.

A prompt of k shots is, without padding because all rows have the same length ``6 + 7 k``::

    <bos>  (image x4  question  answer  <end>) x k   image x4  question  [answer  <end>]

The query's segment has the same ids in the same order for every k, so the tokens of a student
without demonstrations and of a teacher with them match one to one: ``hidden[episode.query_mask]``
of both line up. All tensors are on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORDS: dict[str, tuple[str, ...]] = {
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "next": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "parity": ("even", "odd"),
    "size": ("small", "large"),
    "paper": ("ivory", "mint", "sky", "rose"),
    "ink": ("navy", "maroon", "forest", "black"),
    "orientation": ("upright", "turned"),
    "mixed": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}
TASKS = tuple(WORDS)[:-1]  # the model was never shown "mixed"
SPECIAL = ("<pad>", "<bos>", "<end>", "<image>", "question")
VOCABULARY = SPECIAL + tuple(dict.fromkeys(word for words in WORDS.values() for word in words))
PAD_ID, BOS_ID, END_ID, IMAGE_ID, QUESTION_ID = range(len(SPECIAL))

IMAGE_SIZE, PATCH_SIZE = 16, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SCAN_WIDTH = 12  # pixels the 8x8 scan is drawn over; the rest is a margin of paper
IGNORE = -100

PAPER_RGB = torch.tensor([[1.0, 1.0, 0.88], [0.76, 1.0, 0.82], [0.75, 0.88, 1.0], [1.0, 0.8, 0.86]])
INK_RGB = torch.tensor([[0.05, 0.1, 0.55], [0.55, 0.05, 0.1], [0.05, 0.4, 0.1], [0.05, 0.05, 0.05]])

SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, 1797)}


@dataclass(frozen=True)
class Samples:
    """Images with the answer to every task; any leading shape ``[...]``.

    ``images [...,3,16,16]`` fp32 in [-1, 1]; ``answers [...,8]`` int64 word ids in the order of
    ``WORDS``; ``originals [...]`` int64, which of the 1,797 scans was drawn.
    """

    images: Tensor
    answers: Tensor
    originals: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.originals.shape

    def __len__(self) -> int:
        return len(self.originals)

    def __getitem__(self, index) -> Samples:
        return Samples(self.images[index], self.answers[index], self.originals[index])

    def flatten(self) -> Samples:
        """``[B,K]`` samples as ``[B*K]``."""
        return Samples(self.images.flatten(0, 1), self.answers.flatten(0, 1), self.originals.flatten())


@dataclass(frozen=True)
class Episode:
    """A batch of prompts; the fields are described at the top of the module."""

    inputs: dict[str, Tensor]
    labels: Tensor
    query_mask: Tensor
    targets: Tensor

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


def word_id(word: str) -> int:
    """Id of a word; ``ValueError`` if it is not in ``VOCABULARY``."""
    if word not in VOCABULARY:
        raise ValueError(f"word {word!r} is not in the vocabulary {VOCABULARY}")
    return VOCABULARY.index(word)


def decode(ids: Tensor) -> list[str]:
    """Words of a ``[N]`` tensor of ids."""
    return [VOCABULARY[i] for i in ids.tolist()]


@cache
def word_ids(task: str) -> Tensor:
    """Ids ``[W]`` of a task's answer words, in the order of ``WORDS[task]``."""
    _check_member("task", task, WORDS)
    return torch.tensor([word_id(word) for word in WORDS[task]])


@cache
def split_originals(split: str) -> Tensor:
    """Scans ``[N]`` of "train" (1200), "validation" (200) or "test" (397): indices below 1797."""
    _check_member("split", split, SPLITS)
    # RandomState's stream is frozen by NumPy. With a generator that changes between versions,
    # scans that the shipped weights were trained on could turn up in the test split.
    order = np.random.RandomState(0).permutation(1797)
    return torch.from_numpy(order[SPLITS[split]].astype(np.int64))


@cache
def _scans() -> tuple[Tensor, Tensor]:
    """All scans ``[1797,8,8]`` fp32 ink coverage in [0, 1], and their digits ``[1797]``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long()


def _placement(count: int, distort: torch.Generator | None) -> Tensor:
    """Affine maps ``[N,2,3]`` from drawing to scan: centred, or moved, scaled and rotated."""
    scale = torch.full((count,), IMAGE_SIZE / SCAN_WIDTH)
    angle, shift = torch.zeros(count), torch.zeros(count, 2)
    if distort is not None:
        angle = (torch.rand(count, generator=distort) - 0.5) * 0.35  # radians: 10 degrees each way
        scale = scale * (0.9 + 0.2 * torch.rand(count, generator=distort))
        shift = (torch.rand(count, 2, generator=distort) - 0.5) * 0.3  # of half the scan's width
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)]
    return torch.stack(rows, 1)


def render(
    scans: Tensor,
    paper: Tensor,
    ink: Tensor,
    turned: Tensor,
    distort: torch.Generator | None = None,
) -> Tensor:
    """Draws scans with ink on paper.

    ``scans [N,8,8]`` fp32 coverage in [0, 1]; ``paper, ink [N]`` int64 indices of colours;
    ``turned [N]`` bool: a quarter turn counter-clockwise. With ``distort`` (training only) the
    digit is moved, scaled and rotated a little and noise is added. Returns ``[N,3,16,16]`` fp32 in
    [-1, 1] (beyond it by the noise).
    """
    count = len(scans)
    centre = (torch.arange(IMAGE_SIZE) + 0.5) * 2 / IMAGE_SIZE - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    # Not F.affine_grid, which refuses the empty batch of a zero-shot prompt.
    grid = torch.stack([x, y, torch.ones_like(x)], -1) @ _placement(count, distort)[:, None].mT
    coverage = F.grid_sample(scans[:, None], grid, padding_mode="zeros", align_corners=False)
    coverage = torch.where(turned[:, None, None, None], coverage.rot90(1, (2, 3)), coverage)
    image = torch.lerp(PAPER_RGB[paper][:, :, None, None], INK_RGB[ink][:, :, None, None], coverage)
    if distort is not None:
        image = image + 0.03 * torch.randn(image.shape, generator=distort)
    return image * 2 - 1


def draw_samples(originals: Tensor, *, generator: torch.Generator, augment: bool = False) -> Samples:
    """Draws the given scans (``originals [...]`` int64) with random paper, ink and orientation.

    ``augment`` adds the small distortions used in training.
    """
    scans, digits = _scans()
    flat = originals.flatten()
    digit = digits[flat]
    paper, ink, turned = (
        torch.randint(len(WORDS[task]), flat.shape, generator=generator)
        for task in ("paper", "ink", "orientation")
    )
    images = render(scans[flat], paper, ink, turned.bool(), distort=generator if augment else None)
    indices = {
        "digit": digit,
        "next": (digit + 1) % 10,
        "parity": digit % 2,
        "size": (digit >= 5).long(),
        "paper": paper,
        "ink": ink,
        "orientation": turned,
        "mixed": (digit + turned) % 10,  # "digit" if upright, "next" if turned
    }
    answers = torch.stack([word_ids(task)[indices[task]] for task in WORDS], -1)
    return Samples(
        images.view(*originals.shape, *images.shape[1:]),
        answers.view(*originals.shape, len(WORDS)),
        originals,
    )


def draw_queries(count: int, *, split: str, generator: torch.Generator, augment: bool = False) -> Samples:
    """``Samples [count]`` in random order; none is repeated before all of ``split`` were used."""
    pool = split_originals(split)
    laps = [torch.randperm(len(pool), generator=generator) for _ in range(-(-count // len(pool)))]
    order = torch.cat(laps)[:count] if laps else torch.zeros(0, dtype=torch.long)
    return draw_samples(pool[order], generator=generator, augment=augment)


def draw_demonstrations(
    queries: Samples,
    shots: int,
    *,
    generator: torch.Generator,
    split: str = "train",
    augment: bool = False,
) -> Samples:
    """``Samples [B, shots]`` for ``queries [B]``: per row distinct originals, never the query's."""
    pool = split_originals(split)
    if not 0 <= shots < len(pool):
        raise ValueError(f"shots must be in [0, {len(pool)}) for split {split!r}, got {shots}")
    priority = torch.rand(len(queries), len(pool), generator=generator)
    priority[pool == queries.originals[:, None]] = -1
    chosen = pool[priority.topk(shots, dim=1).indices]
    return draw_samples(chosen, generator=generator, augment=augment)


def draw_episodes(
    count: int, shots: int, *, split: str, generator: torch.Generator, augment: bool = False
) -> tuple[Samples, Samples]:
    """Demonstrations ``[count, shots]`` from "train" and queries ``[count]`` from ``split``."""
    queries = draw_queries(count, split=split, generator=generator, augment=augment)
    return draw_demonstrations(queries, shots, generator=generator, augment=augment), queries


def scramble(demonstrations: Samples, task: str, generator: torch.Generator) -> Samples:
    """The control: each demonstration's answer to ``task`` becomes a random word of that task."""
    words = word_ids(task)
    answers = demonstrations.answers.clone()
    drawn = torch.randint(len(words), demonstrations.shape, generator=generator)
    answers[..., _column(task)] = words[drawn]
    return Samples(demonstrations.images, answers, demonstrations.originals)


def episode_inputs(
    demonstrations: Samples | None,
    queries: Samples,
    task: str | Tensor,
    *,
    with_answer: bool = True,
    label_demonstrations: bool = False,
) -> Episode:
    """Builds prompts of equal length for ``queries [B]`` after ``demonstrations [B,K]``.

    ``task`` is one name, or int64 ``[B]`` indices into ``WORDS``. ``with_answer=False`` leaves out
    the query's answer and end: the prompt to generate from.
    ``label_demonstrations`` puts the loss on every answer of the episode, not only on the query's.
    """
    count = len(queries)
    if demonstrations is not None and demonstrations.shape[:-1] != queries.shape:
        raise ValueError(
            f"demonstrations must have shape [{count}, shots] like queries [{count}], "
            f"got {list(demonstrations.shape)}"
        )
    if isinstance(task, str):
        task = torch.full((count,), _column(task))
    samples = _join(demonstrations, queries)
    segments = samples.shape[1]
    answers = samples.answers.take_along_dim(task[:, None, None], -1)  # [B, K+1, 1]

    question = torch.tensor([IMAGE_ID] * IMAGE_TOKENS + [QUESTION_ID]).expand(count, segments, -1)
    end = torch.full_like(answers, END_ID)
    tokens = torch.cat([question, answers, end], -1)  # [B, K+1, 7]
    labels = torch.cat([torch.full_like(question, IGNORE), answers, end], -1)
    if not label_demonstrations:
        labels[:, :-1] = IGNORE
    own = torch.zeros_like(tokens, dtype=torch.bool)
    own[:, -1] = True

    stop = None if with_answer else -2
    input_ids, labels, query_mask = (
        F.pad(part.flatten(1), (1, 0), value=first)[:, :stop]
        for part, first in ((tokens, BOS_ID), (labels, IGNORE), (own, False))
    )
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": samples.images.flatten(0, 1),
    }
    return Episode(inputs, labels, query_mask, targets=answers[:, -1, 0])


def _join(demonstrations: Samples | None, queries: Samples) -> Samples:
    """Samples ``[B, K+1]``, the query last."""
    last = queries[:, None]
    if demonstrations is None:
        return last
    return Samples(
        *(
            torch.cat([getattr(demonstrations, name), getattr(last, name)], 1)
            for name in ("images", "answers", "originals")
        )
    )


def _column(task: str) -> int:
    _check_member("task", task, WORDS)
    return list(WORDS).index(task)


def _check_member(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
