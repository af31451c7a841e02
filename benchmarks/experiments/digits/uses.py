"""What one M2IV vector does beside naming a task: ``python -m benchmarks.experiments.digits.uses``.

An answer style, a refusal and an alignment; and the sum of a task's vector and the style's, without any
demonstration. All are kept in a VLibrary and measured as it gives them back. Writes ``uses.json``.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.measure import SETTINGS
from benchmarks.experiments.digits.model import load_model
from benchmarks.experiments.digits.train import fit, train_adapter
from mmicl_kernels.methods import Adapter
from mmicl_kernels.training import EpisodeBatch

RESULTS = Path(__file__).with_name("uses.json")
TASK, REFUSED = "digit", "ink"
OTHERS = ("parity", "size", "paper", "ink", "orientation")  # no word of TASK is among theirs
SHOTS, BATCH, CONTRAST = 8, 16, 0.2
SUPERVISED = mk.M2IVConfig(mimicry_weight=0, synergy_weight=0, ce_weight=1)
UNLABELLED = mk.M2IVConfig(mimicry_weight=1, synergy_weight=0, ce_weight=0)
STYLE = "asks back"


def style_batch(demonstrations: data.Samples, queries: data.Samples, task: str) -> EpisodeBatch:
    """The answer goes on with a question where it would end."""
    episode = data.episode_inputs(demonstrations, queries, task)
    episode.inputs["input_ids"][:, -1] = episode.labels[:, -1] = data.QUESTION_ID
    return _same_prompts(episode)


def refusal_batch(demonstrations: data.Samples, queries: data.Samples, task: str) -> EpisodeBatch:
    """Asked for ``REFUSED``, the answer ends before its first word; all else is answered."""
    episode = data.episode_inputs(demonstrations, queries, task)
    if task == REFUSED:
        episode.inputs["input_ids"][:, -2] = episode.labels[:, -2] = data.END_ID
        episode.labels[:, -1] = data.IGNORE
    return _same_prompts(episode)


def alignment_batch(demonstrations: data.Samples, queries: data.Samples, task: str) -> EpisodeBatch:
    """The teacher sees clear images, the student the same ones faded."""
    student = data.episode_inputs(faded(demonstrations), faded(queries), task)
    teacher = data.episode_inputs(demonstrations, queries, task)
    return EpisodeBatch(
        student.inputs, teacher.inputs, student.query_mask, teacher.query_mask, student.labels
    )


def faded(samples: data.Samples, contrast: float = CONTRAST) -> data.Samples:
    """The images, with ``contrast`` left of what sets their pixels apart."""
    mean = samples.images.mean((-2, -1), keepdim=True)
    return replace(samples, images=mean + contrast * (samples.images - mean))


def _same_prompts(episode: data.Episode) -> EpisodeBatch:
    inputs, query = episode.inputs, episode.query_mask
    return EpisodeBatch(inputs, inputs, query, query, episode.labels)


@torch.no_grad()
def answers(
    model: nn.Module, task: str, shots: int, split: str, contrast: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Two generated ids ``[N, 2]`` for every image of ``split``, and the true word's id ``[N]``."""
    drawn = data.draw_episodes(
        len(data.split_originals(split)), shots, split=split, generator=torch.Generator().manual_seed(0)
    )
    demonstrations, queries = (faded(samples, contrast) for samples in drawn)
    episode = data.episode_inputs(demonstrations, queries, task, with_answer=False)
    ids = model.generate(**episode.inputs, max_new_tokens=2)[:, episode.prompt_tokens :]
    return F.pad(ids, (0, 2 - ids.shape[1]), value=data.PAD_ID), episode.targets


def measure_style(model: nn.Module, split: str, task: str = TASK, shots: int = SHOTS) -> dict[str, float]:
    ids, truth = answers(model, task, shots, split)
    right, asks = ids[:, 0] == truth, ids[:, 1] == data.QUESTION_ID
    return {f"{task}: right": _share(right), f"{task}: right, then asks back": _share(right & asks)}


def measure_refusal(model: nn.Module, split: str) -> dict[str, float]:
    found = {task: answers(model, task, SHOTS, split) for task in data.TASKS}
    asked, _ = found.pop(REFUSED)
    right = [_share(ids[:, 0] == truth) for ids, truth in found.values()]
    return {
        f"{REFUSED}: refused": _share(asked[:, 0] == data.END_ID),
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
    """What a vector is for: how it is learned, on which tasks, and what is measured on the test images."""

    config: mk.M2IVConfig
    batch: Callable[[data.Samples, data.Samples, str], EpisodeBatch]
    tasks: tuple[str, ...]
    measure: Callable[[nn.Module, str], dict[str, float]]
    steps: int = 300

    def batches(self, generator: torch.Generator) -> Iterator[EpisodeBatch]:
        """Endless batches of one task each, after one to ``SHOTS`` demonstrations."""
        while True:
            task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
            shots = int(torch.randint(1, SHOTS + 1, (), generator=generator))
            drawn = data.draw_episodes(BATCH, shots, split="train", generator=generator, augment=True)
            yield self.batch(*drawn, task)


USES = {
    STYLE: Use(SUPERVISED, style_batch, OTHERS, measure_style),
    f"refuses {REFUSED}": Use(SUPERVISED, refusal_batch, OTHERS, measure_refusal),
    "sees faded images": Use(UNLABELLED, alignment_batch, data.TASKS, measure_alignment, steps=600),
}


def learn(model: nn.Module, name: str, steps: int | None = None) -> Adapter:
    """The vector of ``USES[name]``; ``steps`` instead of its own number."""
    use = USES[name]
    return fit(model, use.config, use.batches(torch.Generator().manual_seed(0)), steps or use.steps, seed=0)


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
