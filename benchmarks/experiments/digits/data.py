"""Real digit scans, drawn on coloured paper, as examples with an image, a text and an answer.

Interface
---------
``TASKS``, ``WORDS[task]``, ``VOCABULARY``      the seven tasks, answer words (of "mixed" too), all tokens
``Examples(tasks, split, generator=...)``       a ``Sequence[Example]``: queries, and pools of demonstrations
``other_scans``                                 the ``draw`` of collators: demonstrations of the query's task
``scrambled(example, generator)``               the control: a random answer of the same task
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import mmicl_kernels as mk

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
QUESTION = "question"  # the same for all tasks
SPECIAL = ("<pad>", "<bos>", "<end>", "<image>", QUESTION)
VOCABULARY = SPECIAL + tuple(dict.fromkeys(word for words in WORDS.values() for word in words))
PAD_ID, BOS_ID, END_ID, IMAGE_ID, QUESTION_ID = range(len(SPECIAL))

IGNORE = -100  # a label that is not predicted

IMAGE_SIZE, PATCH_SIZE = 16, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SCAN_WIDTH = 12  # pixels the 8x8 scan is drawn over; the rest is a margin of paper
PPM = f"P6 {IMAGE_SIZE} {IMAGE_SIZE} 255\n".encode()  # an image file is this and its pixels

PAPER_RGB = torch.tensor([[1.0, 1.0, 0.88], [0.76, 1.0, 0.82], [0.75, 0.88, 1.0], [1.0, 0.8, 0.86]])
INK_RGB = torch.tensor([[0.05, 0.1, 0.55], [0.55, 0.05, 0.1], [0.05, 0.4, 0.1], [0.05, 0.05, 0.05]])

SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, 1797)}


@dataclass(frozen=True)
class Example:
    """A drawing and what is asked of it.

    Attributes:
        id: no other example of its sequence has it.
        image: a file's bytes.
        scan: which of the 1,797 was drawn.
    """

    id: str
    image: bytes = field(repr=False)
    text: str
    answer: str
    task: str
    scan: int

    def demonstration(self) -> mk.Demonstration:
        return mk.Demonstration((self.image,), self.text, self.answer)


class Examples(Sequence[Example]):
    """``count`` drawings of a split's scans in random order, each with every one of ``tasks``.

    No scan is drawn again, on other paper, before all were; by default each is drawn once. The drawings do
    not depend on the tasks. ``augment`` adds the small distortions used in training.

    Attributes:
        scans: of each drawing. different: how many of them there are.
        pixels: uint8 ``[count, 16, 16, 3]``.
        values: int64 ``[count]`` by task (and "mixed"): the answer's place in ``WORDS``.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        split: str,
        *,
        generator: torch.Generator,
        count: int | None = None,
        augment: bool = False,
    ) -> None:
        """Raises ValueError: no such task or split, or ``count`` is not positive."""
        for task in tasks:
            _check_member("task", task, WORDS)
        pool = split_scans(split)
        count = len(pool) if count is None else count
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        laps = [torch.randperm(len(pool), generator=generator) for _ in range(-(-count // len(pool)))]
        scans = pool[torch.cat(laps)[:count]]
        self.tasks, self.split, self.scans = tuple(tasks), split, scans.tolist()
        self.different = min(count, len(pool))
        self.pixels, self.values = draw_scans(scans, generator=generator, augment=augment)

    def __len__(self) -> int:
        return len(self.scans) * len(self.tasks)

    def __getitem__(self, index: int) -> Example:
        drawing, column = divmod(range(len(self))[index], len(self.tasks))
        task = self.tasks[column]
        return Example(
            f"{self.split} {drawing} {task}",
            image_file(self.pixels[drawing]),
            QUESTION,
            WORDS[task][self.values[task][drawing]],
            task,
            self.scans[drawing],
        )


def other_scans(pool: Examples, query: Example, shots: int, generator: torch.Generator) -> list[int]:
    """Indices of examples of the query's task: of different scans, and none of the query's own."""
    if not 0 <= shots < pool.different:
        raise ValueError(f"shots must be in [0, {pool.different}), the pool's scans, got {shots}")
    column, met, drawn = pool.tasks.index(query.task), {query.scan}, []
    while len(drawn) < shots:
        drawing = int(torch.randint(len(pool.scans), (), generator=generator))
        if pool.scans[drawing] not in met:
            met.add(pool.scans[drawing])
            drawn.append(drawing * len(pool.tasks) + column)
    return drawn


def scrambled(example: Example, generator: torch.Generator) -> Example:
    """The control: its answer becomes a random word of its task."""
    words = WORDS[example.task]
    return replace(example, answer=words[int(torch.randint(len(words), (), generator=generator))])


@cache
def split_scans(split: str) -> Tensor:
    """Scans ``[N]`` of "train" (1200), "validation" (200) or "test" (397): indices below 1797."""
    _check_member("split", split, SPLITS)
    # RandomState's stream is frozen by NumPy. With a generator that changes between versions,
    # scans that the shipped weights were trained on could turn up in the test split.
    order = np.random.RandomState(0).permutation(1797)
    return torch.from_numpy(order[SPLITS[split]].astype(np.int64))


@cache
def all_scans() -> tuple[Tensor, Tensor]:
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
    [0, 1] (beyond it by the noise).
    """
    size = (len(scans), 1, IMAGE_SIZE, IMAGE_SIZE)
    grid = F.affine_grid(_placement(len(scans), distort), size, align_corners=False)
    coverage = F.grid_sample(scans[:, None], grid, padding_mode="zeros", align_corners=False)
    coverage = torch.where(turned[:, None, None, None], coverage.rot90(1, (2, 3)), coverage)
    image = torch.lerp(PAPER_RGB[paper][:, :, None, None], INK_RGB[ink][:, :, None, None], coverage)
    if distort is not None:
        image = image + 0.03 * torch.randn(image.shape, generator=distort)
    return image


def draw_scans(
    scans: Tensor, *, generator: torch.Generator, augment: bool = False
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Pixels and values, as :class:`Examples` has them, of ``scans [N]`` on random paper."""
    coverage, digits = all_scans()
    digit = digits[scans]
    paper, ink, turned = (
        torch.randint(len(WORDS[task]), scans.shape, generator=generator)
        for task in ("paper", "ink", "orientation")
    )
    images = render(coverage[scans], paper, ink, turned.bool(), distort=generator if augment else None)
    values = {
        "digit": digit,
        "next": (digit + 1) % 10,
        "parity": digit % 2,
        "size": (digit >= 5).long(),
        "paper": paper,
        "ink": ink,
        "orientation": turned,
        "mixed": (digit + turned) % 10,  # "digit" if upright, "next" if turned
    }
    return as_pixels(images), values


def as_pixels(images: Tensor) -> np.ndarray:
    """Images ``[...,3,16,16]`` of [0, 1] as uint8 ``[...,16,16,3]``."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()


def image_file(pixels: np.ndarray) -> bytes:
    """The file of an image's pixels, uint8 ``[16, 16, 3]``: a PPM, which costs nothing to write."""
    return PPM + pixels.tobytes()


def pixels_of(file: bytes) -> np.ndarray:
    """What :func:`image_file` wrote."""
    return np.frombuffer(file, np.uint8, offset=len(PPM)).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)


def _check_member(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
