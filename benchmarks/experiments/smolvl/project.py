"""Trains the projector: ``python -m benchmarks.experiments.smolvl.project`` writes its weights and a log.

The tower and SmolLM2 stay as they are, and what the tower sees is computed once. Stage 1 has no language
model: what a picture becomes, the mean over its positions, shall be the embedding of its name. Stage 2 is
learnt through the frozen language model, from three kinds of prompts at once, because a projector for one
of them is a bad one for the others: a picture's name after an instruction in a chat; names in episodes of
one to eight demonstrations; and kinds in such episodes, by one of several words each, so that only the
demonstrations tell which. Only things and shapes of the train split are used, none of the words that
``tasks.KINDS`` asks for, and none of easy-vqa's questions: "red circle" is the caption of one of its images.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import language, tasks
from .model import IMAGE_SIZE, PROJECTOR, load_model, load_processor
from .pictures import all_pictures

LOG = Path(__file__).with_name("projector_log.json")
QUESTIONS = ("What is in this picture?", "What is this?", "Name what you see.", "What does the image show?")
ANSWER = "\nAnswer:"  # between the picture and its answer, as in ``tasks.TEMPLATE``
CHAT, KIND, SHAPE = 0.2, 0.4, 0.3  # shares of the episodes, and of what is left: the others are of names
KIND_WORDS = {
    "animal": ("creature", "beast", "wildlife"),
    "food": ("meal", "dish", "snack"),
    "clothes": ("clothing", "garment", "outfit"),
    "vehicle": ("transport", "transportation", "traffic"),
    "plant": ("plant", "flora", "vegetation"),
    "drink": ("drink", "beverage", "liquid"),
    "building": ("building", "house", "architecture"),
    "music": ("music", "instrument", "sound"),
    "sport": ("sport", "athletics", "exercise"),
    "tool": ("tool", "device", "utensil"),
    "weather": ("weather", "sky", "climate"),
    "furniture": ("furniture", "household", "home"),
    "phone": ("phone", "electronics", "technology"),
    "game": ("game", "toy", "play"),
    "face": ("face", "emotion", "smile"),
}
IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """``renderings`` of each picture; ``tokens`` of a batch of stage 2."""

    seed: int = 0
    renderings: int = 5
    name_steps: int = 300
    name_batch: int = 128
    name_rate: float = 1e-3
    steps: int = 240
    tokens: int = 1200
    rate: float = 1e-3
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class Seen:
    """What the tower makes of renderings ``[R, positions, 1280]`` of a thing, or of a shape, without kind."""

    features: Tensor
    name: str
    kind: str | None

    def draw(self, generator: random.Random) -> Tensor:
        return self.features[generator.randrange(len(self.features))].float()


# A piece of a prompt: what stands there, and whether it is learnt.
Piece = tuple[str | Tensor, bool]


class Episodes:
    """Random prompts of what was seen, as pieces."""

    def __init__(self, seen: Sequence[Seen], generator: random.Random) -> None:
        self.generator = generator
        self.drawings = [x for x in seen if x.kind is not None]
        self.shapes = [x for x in seen if x.kind is None]
        self.kinds = {kind: [x for x in self.drawings if x.kind == kind] for kind in KIND_WORDS}

    def draw(self, shots: int) -> list[Piece]:
        if self.generator.random() < CHAT:
            return self._chat(self._thing())
        if self.generator.random() < KIND:
            kinds = self.generator.sample(sorted(self.kinds), self.generator.choice((2, 3, 4)))
            words = {kind: self.generator.choice(KIND_WORDS[kind]) for kind in kinds}
            asked = [self.generator.choice(kinds) for _ in range(shots)]
            return self._answered([(self.generator.choice(self.kinds[kind]), words[kind]) for kind in asked])
        of = self.shapes if self.generator.random() < SHAPE else self.drawings
        things = [self.generator.choice(of) for _ in range(shots)]
        return self._answered([(x, x.name) for x in things])

    def _thing(self) -> Seen:
        return self.generator.choice(self.shapes if self.generator.random() < SHAPE else self.drawings)

    def _chat(self, x: Seen) -> list[Piece]:
        question = self.generator.choice(QUESTIONS)
        before, after = "<|im_start|>user\n", f"{question}<|im_end|>\n<|im_start|>assistant\n"
        return [
            (before, False),
            (x.draw(self.generator), False),
            (after, False),
            (f"{x.name}<|im_end|>", True),
        ]

    def _answered(self, pairs: Sequence[tuple[Seen, str]]) -> list[Piece]:
        pieces: list[Piece] = [(tasks.BEGIN, False)]
        for x, answer in pairs:
            pieces += [(x.draw(self.generator), False), (ANSWER, False), (f" {answer}\n\n", True)]
        return pieces


def see(model: nn.Module, renderings: int, generator: random.Random) -> list[Seen]:
    """The train split's drawings and captioned shapes."""
    images = load_processor().image_processor

    def features(drawn: list[Image.Image]) -> Tensor:
        pixels = images(drawn, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return model.model.vision_tower(pixels).last_hidden_state.half()

    seen = []
    for x in tqdm([x for x in all_pictures() if x.split == "train"], desc="drawings", unit="picture"):
        drawn = [x.image(IMAGE_SIZE), *(x.varied(IMAGE_SIZE, generator) for _ in range(renderings - 1))]
        seen.append(Seen(features(drawn), x.name, x.kind))
    for file, caption in tqdm(tasks.captions(), desc="shapes", unit="image"):
        seen.append(Seen(features([Image.open(BytesIO(file)).convert("RGB")]), caption, None))
    return seen


class Trainer:
    """The projector between features and the frozen language model."""

    def __init__(self, model: nn.Module) -> None:
        self.projector = model.model.multi_modal_projector.requires_grad_(True)
        self.text, self.embeddings = (
            model.model.language_model,
            model.model.language_model.embed_tokens.weight,
        )
        self.tokenizer = language.load_tokenizer()

    def ids(self, text: str) -> Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]

    def name_embedding(self, name: str) -> Tensor:
        return self.embeddings[self.ids(f" {name}")].mean(0)

    def loss(self, episodes: Sequence[list[Piece]]) -> Tensor:
        """Mean cross-entropy of what is learnt."""
        rows, labels = [], []
        for pieces in episodes:
            row, label = [], []
            for piece, learnt in pieces:
                if isinstance(piece, Tensor):
                    row.append(self.projector(piece))
                    label.append(torch.full((len(piece),), IGNORE))
                else:
                    ids = self.ids(piece)
                    row.append(self.embeddings[ids])
                    label.append(ids if learnt else torch.full_like(ids, IGNORE))
            rows.append(torch.cat(row))
            labels.append(torch.cat(label))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(x), dtype=torch.long) for x in labels], True)
        embedded = nn.utils.rnn.pad_sequence(rows, True)
        targets = nn.utils.rnn.pad_sequence(labels, True, IGNORE)[:, 1:]
        states = self.text(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        learnt = targets != IGNORE
        return F.cross_entropy(states[:, :-1][learnt] @ self.embeddings.T, targets[learnt])


def learn_names(
    trainer: Trainer, seen: Sequence[Seen], recipe: Recipe, generator: random.Random
) -> list[float]:
    """Stage 1: the mean over positions is near the name's embedding, and nearer than to other names'."""
    names = sorted({x.name for x in seen})
    own = torch.stack([trainer.name_embedding(name) for name in names])
    centre = own.mean(0)
    directions, places = F.normalize(own - centre, dim=-1), {name: i for i, name in enumerate(names)}
    optimizer, schedule = _optimizer(trainer, recipe.name_rate, recipe.weight_decay, recipe.name_steps)
    losses = []
    for _ in tqdm(range(recipe.name_steps), desc="names", unit="step"):
        chosen = generator.choices(seen, k=recipe.name_batch)
        targets = torch.tensor([places[x.name] for x in chosen])
        made = trainer.projector(torch.stack([x.draw(generator) for x in chosen])).mean(1)
        similar = F.normalize(made - centre, dim=-1) @ directions.T
        loss = F.cross_entropy(20 * similar, targets) + F.mse_loss(made, own[targets]) / own.var()
        losses.append(_step(loss, trainer, optimizer, schedule))
    return losses


def learn_answers(trainer: Trainer, episodes: Episodes, recipe: Recipe) -> list[float]:
    """Stage 2: through the language model."""
    optimizer, schedule = _optimizer(trainer, recipe.rate, recipe.weight_decay, recipe.steps)
    positions = episodes.drawings[0].features.shape[1]
    losses = []
    for _ in tqdm(range(recipe.steps), desc="answers", unit="step"):
        shots = episodes.generator.choice((1, 4, 8, 8))
        batch = max(1, recipe.tokens // (shots * (positions + 8)))
        loss = trainer.loss([episodes.draw(shots) for _ in range(batch)])
        losses.append(_step(loss, trainer, optimizer, schedule))
    return losses


def _optimizer(trainer: Trainer, rate: float, weight_decay: float, steps: int):
    optimizer = torch.optim.AdamW(trainer.projector.parameters(), rate, weight_decay=weight_decay)
    rise = 20

    def share(step: int) -> float:
        return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _step(loss: Tensor, trainer: Trainer, optimizer, schedule) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trainer.projector.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return round(loss.item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PROJECTOR)
    parser.add_argument("--log", type=Path, default=LOG)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    out, log = options.pop("out"), options.pop("log")
    recipe, start = Recipe(**options), time.perf_counter()
    torch.manual_seed(recipe.seed)
    generator = random.Random(recipe.seed)
    model = load_model(projector=None)
    seen = see(model, recipe.renderings, generator)
    trainer = Trainer(model)
    losses = {"names": learn_names(trainer, seen, recipe, generator)}
    losses["answers"] = learn_answers(trainer, Episodes(seen, generator), recipe)
    save_file({name: x.detach().half() for name, x in trainer.projector.state_dict().items()}, out)
    described = {
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "losses": losses,
    }
    log.write_text(json.dumps(described) + "\n")


if __name__ == "__main__":
    main()
