"""Makes the weights, ``python -m benchmarks.experiments.digits.pretrain [--seed 0] [--out DIR]``.

Stage 1 trains the vision tower alone on what can be seen (digit, paper, ink, orientation); without
it the text model learns the words of the tasks but never to look. Stage 2 trains projector and text
model, tower frozen, on episodes with the loss on every answer, so that an episode of 8 shots also
teaches 0 to 7 shots.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import sklearn
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm

from . import data
from .evaluate import table
from .model import WEIGHTS, build_model, load_model, save_weights
from .processor import DigitsPrompts, digits_processor

SEEN = ("digit", "paper", "ink", "orientation")  # the other tasks are functions of the digit
PAIR = ("digit", "next")  # share their words


@dataclass(frozen=True)
class Config:
    """Hyper-parameters, chosen on the validation split."""

    tower_steps: int = 600
    tower_batch: int = 256
    tower_lr: float = 2e-3
    text_steps: int = 1000
    text_batch: int = 32
    text_lr: float = 1.5e-3
    shots: tuple[int, ...] = (8, 16, 4, 1)
    shot_weights: tuple[float, ...] = (0.75, 0.15, 0.05, 0.05)
    # The tasks are drawn equally often, but between these steps the pair that shares its words, which is
    # the last to be learned, this many times as often. From the start it would crowd out the colours.
    pair_steps: tuple[int, int] = (200, 800)
    pair_weight: float = 4.0
    weight_decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0


class Trainer:
    """AdamW with warm-up, cosine decay and clipping for one stage; keeps the loss curve."""

    def __init__(self, name: str, parameters: list[nn.Parameter], lr: float, steps: int, config: Config):
        self.parameters, self.steps, self.clip = parameters, steps, config.clip
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
        warm = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / config.warmup, 1.0, config.warmup)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps - config.warmup)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [warm, cosine], [config.warmup])
        self.progress = tqdm(total=steps, desc=name)
        self.losses: list[float] = []

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.progress.update()
        self.progress.set_postfix(loss=f"{self.losses[-1]:.3f}")

    def curve(self, points: int = 50) -> list[list[float]]:
        """Loss as about ``points`` pairs: step, and mean over the steps since the last pair."""
        self.progress.close()
        width = -(-self.steps // points)
        return [
            [start + width, round(sum(part) / len(part), 4)]
            for start in range(0, self.steps, width)
            if (part := self.losses[start : start + width])
        ]


def pretrain_tower(model, config: Config, generator: torch.Generator) -> list[list[float]]:
    """Stage 1: linear heads on the features that LLaVA passes on; the heads are thrown away.

    Every visual token alone must tell every attribute, so that the text model finds them wherever its
    attention looks.
    """
    tower = model.model.vision_tower
    sizes = [len(data.WORDS[task]) for task in SEEN]
    heads = nn.Linear(model.config.vision_config.hidden_size, sum(sizes))
    parameters = [*tower.parameters(), *heads.parameters()]
    trainer = Trainer("vision tower", parameters, config.tower_lr, config.tower_steps, config)
    processed = digits_processor().image_processor
    for _ in range(config.tower_steps):
        drawn = data.Examples(SEEN, "train", generator=generator, count=config.tower_batch, augment=True)
        images = processed(list(drawn.pixels), return_tensors="pt")["pixel_values"]
        features = tower(images, output_hidden_states=True).hidden_states[-1]  # [N, 4, C]
        losses = []
        for task, logits in zip(SEEN, heads(features).split(sizes, -1), strict=True):
            target = drawn.values[task][:, None].expand(-1, data.IMAGE_TOKENS)
            losses.append(F.cross_entropy(logits.mT, target))
        trainer.step(torch.stack(losses).sum())
    return trainer.curve()


def pretrain_text(model, config: Config, generator: torch.Generator) -> list[list[float]]:
    """Stage 2: projector and text model on episodes of all tasks, the tower frozen."""
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer("text model", parameters, config.text_lr, config.text_steps, config)
    shot_weights = torch.tensor(config.shot_weights)
    favoured = torch.tensor([config.pair_weight if task in PAIR else 1.0 for task in data.TASKS])
    prompts = DigitsPrompts()
    for step in range(config.text_steps):
        shots = config.shots[torch.multinomial(shot_weights, 1, generator=generator).item()]
        tasks = favoured if step in range(*config.pair_steps) else torch.ones(len(data.TASKS))
        task = torch.multinomial(tasks, config.text_batch, replacement=True, generator=generator)
        inputs, labels = prompts.taught(*episodes(task.tolist(), shots, generator))
        trainer.step(model(**inputs, labels=labels).loss)
    return trainer.curve()


def episodes(
    tasks: list[int], shots: int, generator: torch.Generator
) -> tuple[list[data.Example], list[list[data.Example]]]:
    """A query for each of ``tasks``, places in ``data.TASKS``, and demonstrations: all of different scans."""
    count = len(tasks) * (shots + 1)
    drawn = data.Examples(data.TASKS, "train", generator=generator, count=count, augment=True)
    rows = [
        [drawn[(row * (shots + 1) + place) * len(data.TASKS) + task] for place in range(shots + 1)]
        for row, task in enumerate(tasks)
    ]
    return [row[-1] for row in rows], [row[:-1] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder of the weights and the log")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    # These matrices are too small to share out: beside other programs, threads wait for each other.
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    config, start = Config(), time.time()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build_model().train()
    curves = {
        "tower": pretrain_tower(model, config, generator),
        "text": pretrain_text(model, config, generator),
    }
    seconds = time.time() - start
    save_weights(model, args.out / WEIGHTS.name)

    model = load_model(args.out / WEIGHTS.name)  # what is measured is what is shipped: rounded to fp16
    log = {
        "seed": args.seed,
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds, 1),
        "loss": curves,
        "validation": table(model, "validation", (0, 1, 4, 8, 16)),
        "validation_scrambled": table(model, "validation", (1, 8, 16), scrambled=True),
    }
    (args.out / "pretrain_log.json").write_text(json.dumps(log, indent=1) + "\n")
    for shots, row in log["validation"].items():
        print(f"{shots:>2} shots", " ".join(f"{task} {value:.3f}" for task, value in row.items()))


if __name__ == "__main__":
    main()
