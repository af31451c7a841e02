"""What one M2IV vector does beside naming a task: ``python -m benchmarks.experiments.digits.uses``.

An answer style, a refusal and an alignment; and the sum of a task's vector and the style's, without any
demonstration. All are kept in a VLibrary and measured as it gives them back. Writes ``uses.json``.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.evaluate import questions
from benchmarks.experiments.digits.measure import SETTINGS
from benchmarks.experiments.digits.model import load_model
from benchmarks.experiments.digits.processor import DigitsPrompts
from benchmarks.experiments.digits.train import ARGUMENTS, RECIPE, train_adapter, training_examples
from mmicl_kernels.data.episodes import align
from mmicl_kernels.methods import Adapter
from mmicl_kernels.training import EpisodeBatch, EpisodeCollator
from mmicl_kernels.training.run import Training

RESULTS = Path(__file__).with_name("uses.json")
TASK, REFUSED = "digit", "ink"
OTHERS = ("parity", "size", "paper", "ink", "orientation")  # no word of TASK is among theirs
SHOTS, CONTRAST = 8, 0.2
SUPERVISED = mk.M2IVConfig(mimicry_weight=0, synergy_weight=0, ce_weight=1)
UNLABELLED = mk.M2IVConfig(mimicry_weight=1, synergy_weight=0, ce_weight=0)
STYLE = "asks back"


def in_style(x: data.Example) -> data.Example:
    """The answer goes on with a question."""
    return replace(x, answer=f"{x.answer} {data.QUESTION}")


def refused(x: data.Example) -> data.Example:
    """Asked for ``REFUSED``, the answer is a question alone; all else is answered."""
    return replace(x, answer=data.QUESTION) if x.task == REFUSED else x


def faded(x: mk.Demonstration, contrast: float = CONTRAST) -> mk.Demonstration:
    """The image, with ``contrast`` left of what sets its pixels apart."""
    pixels = data.pixels_of(*x.images).astype(np.float32)
    mean = pixels.mean((0, 1))
    faded = np.rint(mean + contrast * (pixels - mean)).astype(np.uint8)
    return replace(x, images=(data.image_file(faded),))


class InContext(EpisodeCollator):
    """The student has the demonstrations, too; its images have ``contrast`` left."""

    def __init__(self, *args: object, contrast: float, **options: object) -> None:
        super().__init__(*args, **options)
        self.contrast = contrast

    def _batch(self, queries: list[mk.Demonstration], shots: list[list[mk.Demonstration]]) -> EpisodeBatch:
        teacher = student = self.builder.answered(queries, shots)
        if self.contrast < 1:
            dim = partial(faded, contrast=self.contrast)
            student = self.builder.answered(list(map(dim, queries)), [list(map(dim, row)) for row in shots])
        marks = align(student, teacher, self.builder)
        # To end behind a question that is asked back is not learned: behind the query's own an answer stands.
        back = (student.labels == data.END_ID) & (student.labels.roll(1, 1) == data.QUESTION_ID)
        labels = student.labels.masked_fill(back, data.IGNORE)
        return EpisodeBatch(student.inputs, teacher.inputs, *marks, labels)


@torch.no_grad()
def answers(
    model: nn.Module, task: str, shots: int, split: str, contrast: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Two generated ids ``[N, 2]`` for every image of ``split``, and the true word's id ``[N]``."""
    prompts = DigitsPrompts()
    queries, rows = next(questions(task, shots, split, batch=len(data.split_scans(split))))
    shown = [[faded(x.demonstration(), contrast) for x in row] for row in (queries, *rows)]
    inputs = prompts.prompt(shown[0], shown[1:])
    ids = model.generate(**inputs, max_new_tokens=2)[:, inputs["input_ids"].shape[1] :]
    return F.pad(ids, (0, 2 - ids.shape[1]), value=data.PAD_ID), prompts.answers(queries)


def measure_style(model: nn.Module, split: str, task: str = TASK, shots: int = SHOTS) -> dict[str, float]:
    ids, truth = answers(model, task, shots, split)
    right, asks = ids[:, 0] == truth, ids[:, 1] == data.QUESTION_ID
    return {f"{task}: right": _share(right), f"{task}: right, then asks back": _share(right & asks)}


def measure_refusal(model: nn.Module, split: str) -> dict[str, float]:
    found = {task: answers(model, task, SHOTS, split) for task in data.TASKS}
    asked, _ = found.pop(REFUSED)
    right = [_share(ids[:, 0] == truth) for ids, truth in found.values()]
    return {
        f"{REFUSED}: refused": _share(asked[:, 0] == data.QUESTION_ID),
        "six other tasks: right": round(sum(right) / len(right), 4),
        "the worst of them: right": min(right),
    }


def measure_alignment(model: nn.Module, split: str) -> dict[str, float]:
    shares = {}
    for name, contrast in (("faded", CONTRAST), ("clear", 1.0)):
        found = [answers(model, task, SHOTS, split, contrast) for task in data.TASKS]
        right = torch.stack([ids[:, 0] == truth for ids, truth in found])
        shares[f"all tasks, {name} images: right"] = _share(right)
    return shares


def _share(which: Tensor) -> float:
    return round(which.float().mean().item(), 4)


@dataclass(frozen=True)
class Use:
    """What a vector is for: what is learned, on which tasks, and what is measured on the test images.

    Attributes:
        wanted: an example with the answer that is learned. contrast: of the student's images.
    """

    config: mk.M2IVConfig
    tasks: tuple[str, ...]
    measure: Callable[[nn.Module, str], dict[str, float]]
    wanted: Callable[[data.Example], data.Example] = lambda x: x
    contrast: float = 1.0
    steps: int = 300


USES = {
    STYLE: Use(SUPERVISED, OTHERS, measure_style, in_style),
    f"refuses {REFUSED}": Use(SUPERVISED, OTHERS, measure_refusal, refused),
    "sees faded images": Use(UNLABELLED, data.TASKS, measure_alignment, contrast=CONTRAST, steps=600),
}


def learn(model: nn.Module, name: str, steps: int | None = None, progress: bool = True) -> Adapter:
    """The vector of ``USES[name]``; ``steps`` instead of its own number."""
    use, prompts = USES[name], DigitsPrompts()
    recipe = replace(RECIPE, steps=steps or use.steps)
    examples = training_examples(use.tasks, recipe, seed=0)
    training = Training.of(model, prompts, [use.wanted(x) for x in examples], use.config, recipe=recipe)
    collator = InContext(prompts, examples, (1, SHOTS), draw=data.other_scans, contrast=use.contrast)
    return replace(training, collator=collator).run(arguments=ARGUMENTS, progress=progress)


def fill(library: mk.VLibrary, model: nn.Module, steps: int | None = None) -> None:
    """Learn the vectors that ``library`` lacks."""
    for name in USES:
        if name not in library:
            library.put(name, learn(model, name, steps), tags=["use"])
    if TASK not in library:
        setting = SETTINGS["m2iv"]
        recipe = replace(setting.recipe, steps=steps or setting.recipe.steps)
        library.put(TASK, train_adapter(model, TASK, config=setting.config, recipe=recipe), task=TASK)


def measure(library: mk.VLibrary, model: nn.Module, split: str) -> dict:
    """Every use without and with its vector, then the ways to answer ``TASK`` without demonstrations."""
    results: dict = {"split": split, "uses": {}, "combination": {}}
    for name, use in USES.items():
        plain = use.measure(model, split)
        with mk.attach(model, library.get(name)):
            results["uses"][name] = {"plain": plain, "with": use.measure(model, split)}
    ways = {
        "no vector": None,
        TASK: library.get(TASK),
        f"{TASK} + {STYLE}": library.combine({TASK: 1.0, STYLE: 1.0}),
    }
    for name, adapter in ways.items():
        with nullcontext() if adapter is None else mk.attach(model, adapter):
            results["combination"][name] = measure_style(model, split, shots=0)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--library", type=Path, help="folder of the VLibrary, kept; default: a temporary one")
    parser.add_argument("--steps", type=int, help="updates of every vector, instead of its own number")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small to share out
    model = load_model()
    with tempfile.TemporaryDirectory() as folder:
        library = mk.VLibrary(arguments.library or folder)
        fill(library, model, arguments.steps)
        results = measure(library, model, arguments.split)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
