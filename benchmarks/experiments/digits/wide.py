"""A wider world and its backbone, to ask whether AIM's projection learns tokens or tasks.

    python -m benchmarks.experiments.digits.wide [--seed 0] [--out DIR]

makes ``wide_weights.safetensors`` and ``wide_log.json``. A scan is drawn as in ``data``, inside a frame of
four coloured sides and four coloured corners: twelve ``ATTRIBUTES`` of 2, 4 or 10 values. The question names
the attribute. Every value has eight words of its own; which of them is the answer is drawn anew for each
value and episode, so that only the demonstrations can tell: zero-shot is right one time in eight. The model
learns all words. A projection that is to be tested on ``HELD_OUT`` must be trained on ``TRAINED`` only; its
training then never saw a word or a question of the others.

Examples and prompts are those of ``data`` and ``processor``; ``draw_episodes`` makes queries together with
their demonstrations, as the words of an episode belong together. In every fourth batch of the pretraining,
each demonstration's ``<end>`` is followed by its answer once more ("echo"): the last state keeps the word.

A word belongs to one value, so that the answers alone suffice: with the demonstrations' images exchanged for
those of other episodes the model stays right. This world asks whether new *words* pass through the
projection; that images do is asked by "digit" and "next" of ``data``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from mmicl_kernels.training import Draw, DrawnEpisodes

from . import data
from .evaluate import Accuracy, Ask, score
from .model import build_model, save_weights
from .pretrain import Trainer
from .processor import DigitsPrompts, digits_processor

ATTRIBUTES: dict[str, int] = {"digit": 10, "orientation": 2, "paper": 4, "ink": 4} | dict.fromkeys(
    ("top", "bottom", "left", "right", "top_left", "top_right", "bottom_left", "bottom_right"), 4
)
HELD_OUT = ("paper", "right", "top_right")
TRAINED = tuple(name for name in ATTRIBUTES if name not in HELD_OUT)
SYNONYMS = 8
WORDS = {
    name: tuple(f"{name}-{value}-{synonym}" for value in range(size) for synonym in range(SYNONYMS))
    for name, size in ATTRIBUTES.items()
}
QUESTIONS = tuple(f"{name}?" for name in ATTRIBUTES)
VOCABULARY = data.SPECIAL + QUESTIONS + sum(WORDS.values(), ())
WAYS = 4  # at most so many values of the attribute are met in an episode

SIZES = torch.tensor(list(ATTRIBUTES.values()))
MARK_RGB = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.1], [0.1, 0.2, 0.95], [0.95, 0.8, 0.1]])
EDGE, INNER = slice(0, 1), slice(2, -2)
MARKS = {  # attribute -> rows, columns
    "top": (EDGE, INNER),
    "bottom": (slice(-1, None), INNER),
    "left": (INNER, EDGE),
    "right": (INNER, slice(-1, None)),
    "top_left": (slice(0, 2), slice(0, 2)),
    "top_right": (slice(0, 2), slice(-2, None)),
    "bottom_left": (slice(-2, None), slice(0, 2)),
    "bottom_right": (slice(-2, None), slice(-2, None)),
}
WEIGHTS = Path(__file__).with_name("wide_weights.safetensors")


@dataclass(frozen=True)
class Config:
    """Hyper-parameters; ``synonyms_from``: until this step every value has one word only."""

    tower_steps: int = 600
    tower_batch: int = 256
    tower_lr: float = 2e-3
    text_steps: int = 1600
    text_batch: int = 32
    text_lr: float = 2e-3
    shots: int = 8
    synonyms_from: int = 300
    unnamed: float = 0.4  # from then on, share of batches whose question does not name the attribute
    echo_every: int = 4  # 0: never
    embedding_std: float = 0.2
    weight_decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0


def column(attribute: str) -> int:
    """Index of an attribute in ``ATTRIBUTES``."""
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute must be one of {tuple(ATTRIBUTES)}, got {attribute!r}")
    return list(ATTRIBUTES).index(attribute)


def draw_values(*shape: int, generator: torch.Generator) -> Tensor:
    """Values ``[*shape, 12]`` of all attributes, independent and uniform."""
    return (torch.rand(*shape, len(SIZES), generator=generator) * SIZES).long()


@cache
def _by_digit(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """A split's scans ordered by digit, and each digit's first index and count."""
    scans = data.split_scans(split)
    digits = data.all_scans()[1][scans]
    count = digits.bincount(minlength=10)
    return scans[digits.argsort(stable=True)], count.cumsum(0) - count, count


def draw_scans(digits: Tensor, *, split: str, generator: torch.Generator) -> Tensor:
    """Scans ``[B,S]`` of the digits ``[B,S]``; the last one of a row is never another's of that row."""
    ordered, first, count = _by_digit(split)
    uniform = torch.rand(digits.shape, generator=generator)
    last = (uniform[:, -1:] * count[digits[:, -1:]]).long()
    start = torch.where(digits == digits[:, -1:], last + 1, 0)
    rank = (start + (uniform * (count[digits] - 1)).long()) % count[digits]
    return ordered[first[digits] + torch.cat([rank[:, :-1], last], 1)]


def render(values: Tensor, scans: Tensor, distort: torch.Generator | None = None) -> np.ndarray:
    """Pixels ``[..., 16, 16, 3]`` of values ``[..., 12]``, scans ``[...]``; ``distort`` as in ``data``."""
    flat = values.flatten(0, -2)
    named = dict(zip(ATTRIBUTES, flat.unbind(-1), strict=True))
    coverage = data.all_scans()[0][scans.flatten()]
    images = data.render(coverage, named["paper"], named["ink"], named["orientation"].bool(), distort)
    for name, (rows, columns) in MARKS.items():
        images[:, :, rows, columns] = MARK_RGB[named[name]][:, :, None, None]
    if distort is not None:
        images = images + 0.03 * torch.randn(images.shape, generator=distort)
    return data.as_pixels(images.view(*scans.shape, *images.shape[1:]))


def draw_episodes(
    count: int,
    shots: int,
    attributes: Sequence[str] = tuple(ATTRIBUTES),
    *,
    split: str,
    generator: torch.Generator,
    augment: bool = False,
    unnamed: float = 0.0,
    ways: int = WAYS,
    synonyms: int = SYNONYMS,
) -> DrawnEpisodes:
    """``count`` queries, each with its ``shots`` demonstrations, all of them from ``split``.

    The demonstrations show up to ``ways`` values of an attribute equally often; the query's is one of them.
    ``unnamed`` is the share of episodes whose question does not name the attribute.
    """
    columns = torch.tensor([column(name) for name in attributes])
    attribute = columns[torch.randint(len(columns), (count,), generator=generator)]
    sizes = SIZES[attribute, None]
    order = torch.rand(count, 10, generator=generator).masked_fill(torch.arange(10) >= sizes, 2).argsort(1)
    slots = torch.rand(count, shots, generator=generator).argsort(1) % sizes.clamp(max=ways)
    drawn = torch.randint(max(shots, 1), (count, 1), generator=generator)
    query = slots.gather(1, drawn) if shots else torch.zeros_like(drawn)
    asked = order.gather(1, torch.cat([slots, query], 1))  # [B, K+1] values of the attribute

    values = draw_values(count, shots + 1, generator=generator)
    values.scatter_(2, attribute[:, None, None].expand(-1, shots + 1, 1), asked[..., None])
    scans = draw_scans(values[..., 0], split=split, generator=generator)
    pixels = render(values, scans, generator if augment else None)
    synonym = torch.randint(synonyms, (count, 10), generator=generator).gather(1, asked)
    named = (torch.rand(count, generator=generator) >= unnamed).tolist()
    names = [list(ATTRIBUTES)[i] for i in attribute]
    words = (SYNONYMS * asked + synonym).tolist()
    pool = [
        data.Example(
            id=f"{split} {row} {place}",
            image=data.image_file(pixels[row, place]),
            text=f"{name}?" if named[row] else data.QUESTION,
            answer=WORDS[name][words[row][place]],
            task=name,
            scan=int(scans[row, place]),
        )
        for row, name in enumerate(names)
        for place in range(shots + 1)
    ]
    firsts = range(0, len(pool), shots + 1)
    return DrawnEpisodes(pool, [Draw(i + shots, tuple(range(i, i + shots))) for i in firsts])


def build_wide_model() -> LlavaForConditionalGeneration:
    """``build_model``'s with this vocabulary, input and output embeddings tied; random weights, fp32."""
    config = build_model().config
    config.name_or_path = "mmicl/wide-llava"
    config.text_config.vocab_size = len(VOCABULARY)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return LlavaForConditionalGeneration(config)


def load_wide_model(weights: Path = WEIGHTS) -> LlavaForConditionalGeneration:
    """The pretrained model in fp32, frozen, in eval mode; ``FileNotFoundError`` if missing."""
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}: python -m benchmarks.experiments.digits.wide")
    with torch.random.fork_rng(devices=[]):
        model = build_wide_model()
    model.load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    return model.eval().requires_grad_(False)


def pretrain_tower(model: nn.Module, config: Config, generator: torch.Generator) -> list[list[float]]:
    """Stage 1, as in ``pretrain``: every visual token alone must tell every attribute."""
    tower, sizes, processed = model.model.vision_tower, SIZES.tolist(), digits_processor().image_processor
    heads = nn.Linear(model.config.vision_config.hidden_size, sum(sizes))
    parameters = [*tower.parameters(), *heads.parameters()]
    trainer = Trainer("vision tower", parameters, config.tower_lr, config.tower_steps, config)
    for _ in range(config.tower_steps):
        values = draw_values(config.tower_batch, generator=generator)
        scans = draw_scans(values[:, None, 0], split="train", generator=generator)[:, 0]
        images = processed(list(render(values, scans, generator)), return_tensors="pt")["pixel_values"]
        logits = heads(tower(images, output_hidden_states=True).hidden_states[-1])  # [N, 4, 52]
        losses = [
            F.cross_entropy(part.mT, target[:, None].expand(-1, data.IMAGE_TOKENS))
            for part, target in zip(logits.split(sizes, -1), values.unbind(-1), strict=True)
        ]
        trainer.step(torch.stack(losses).sum())
    return trainer.curve()


def pretrain_text(model: nn.Module, config: Config, generator: torch.Generator) -> list[list[float]]:
    """Stage 2: projector and text model on episodes of all attributes, the tower frozen."""
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer("text model", parameters, config.text_lr, config.text_steps, config)
    prompts = DigitsPrompts(VOCABULARY)
    for step in range(config.text_steps):
        late = step >= config.synonyms_from
        hard, named = torch.rand(2, generator=generator) > torch.tensor([0.3, config.unnamed * late])
        episodes = draw_episodes(
            config.text_batch,
            config.shots,
            split="train",
            generator=generator,
            augment=True,
            unnamed=float(not named),
            ways=WAYS if hard else 2,
            synonyms=SYNONYMS if late else 1,
        )
        inputs, labels = prompts.taught(*zip(*episodes, strict=True))
        if config.echo_every and step % config.echo_every == 0:
            labels = echoed(inputs["input_ids"], labels)
        trainer.step(model(**inputs, labels=labels).loss)
    return trainer.curve()


def echoed(ids: Tensor, labels: Tensor) -> Tensor:
    """``labels`` with, behind every ``<end>`` of ``ids [B, T]``, the word before it once more."""
    # Nothing is behind the last one: it comes to a prompt's first place, which has no loss.
    return torch.where((ids == data.END_ID).roll(1, 1), ids.roll(2, 1), labels)


def accuracy(
    model: nn.Module,
    attribute: str,
    shots: int,
    split: str = "test",
    *,
    named: bool = True,
    samples: int = 400,
    seed: int = 0,
    ask: Ask | None = None,
) -> Accuracy:
    """How often the most likely next word is the true one; all images are from ``split``."""
    prompts, generator = DigitsPrompts(VOCABULARY), torch.Generator().manual_seed(seed)
    found = Accuracy(0, 0)
    for count in [len(part) for part in torch.arange(samples).split(50)]:
        episodes = draw_episodes(
            count, shots, (attribute,), split=split, generator=generator, unnamed=float(not named)
        )
        queries, rows = zip(*episodes, strict=True)
        found += score(model, (ask or prompts.asked)(queries, rows), prompts.answers(queries))
    return found


def table(
    model: nn.Module, split: str, *, named: bool = True, samples: int = 400
) -> dict[str, dict[str, float]]:
    """``{shots: {attribute: accuracy, ..., "mean": mean}}`` at 0 to 16 shots, rounded to 4 places."""
    rows = {}
    for shots in (0, 1, 4, 8, 16):
        row = {
            name: accuracy(model, name, shots, split, named=named, samples=samples).value
            for name in ATTRIBUTES
        }
        row["mean"] = sum(row.values()) / len(row)
        rows[str(shots)] = {name: round(value, 4) for name, value in row.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder of the weights and the log")
    parser.add_argument("--echo-every", type=int, default=Config.echo_every)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    config, start = Config(echo_every=args.echo_every), time.time()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build_wide_model().train()
    nn.init.normal_(model.get_input_embeddings().weight, std=config.embedding_std)
    curves = {
        "tower": pretrain_tower(model, config, generator),
        "text": pretrain_text(model, config, generator),
    }
    seconds = time.time() - start
    save_weights(model, args.out / WEIGHTS.name)

    model = load_wide_model(args.out / WEIGHTS.name)
    log = {
        "seed": args.seed,
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__},
        "training_seconds": round(seconds, 1),
        "loss": curves,
        "validation": table(model, "validation", samples=100),
        "validation_unnamed": table(model, "validation", named=False, samples=100),
    }
    (args.out / "wide_log.json").write_text(json.dumps(log, indent=1) + "\n")
    for shots, row in log["validation"].items():
        print(f"{shots:>2} shots", " ".join(f"{name} {value:.3f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
