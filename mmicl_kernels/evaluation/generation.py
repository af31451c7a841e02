"""Answers of a batch of prompts: greedy or by beams, never sampled, with what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mmicl_kernels.evaluation.metrics import PRESETS
from mmicl_kernels.models.anchors import unwrap


@dataclass(frozen=True)
class Generation:
    """How answers are generated, and where their texts are cut.

    Attributes:
        max_new_tokens, num_beams, length_penalty, repetition_penalty: of ``generate``. What the model's own
            ``generation_config`` says, special tokens aside, does not count.
        cut: the stop words of :func:`~mmicl_kernels.evaluation.metrics.postprocess`, or a preset of it.

    Raises:
        ValueError: a number is not positive (``length_penalty`` not finite), or ``cut`` is no preset.
    """

    max_new_tokens: int = 16
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    cut: str | tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an int of at least 1")
        if not abs(self.length_penalty) < float("inf"):
            raise ValueError(f"length_penalty is {self.length_penalty!r}, expected a finite number")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty!r}, expected it above 0")
        if isinstance(self.cut, str) and self.cut not in PRESETS:
            raise ValueError(f"cut is {self.cut!r}, expected stop words or one of {', '.join(PRESETS)}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Generation:
        """Of lmms-eval's ``generation_kwargs``: those of ``generate`` that are known, and ``until``."""
        names = ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
        until = given.get("until") or ()
        words = tuple(x for x in ([until] if isinstance(until, str) else until) if x)
        return cls(**{name: given[name] for name in names if given.get(name) is not None}, cut=words)


# By a metric's name, what is asked for by default: greedy. By a paper's, its settings (MimIC and HiFICL as
# their testbed has them, LIVE as its inference script).
GENERATIONS = {
    "vqa": Generation(),
    "okvqa": Generation(),
    "caption": Generation(max_new_tokens=32),
    "exact": Generation(max_new_tokens=32),
    "choice": Generation(cut="none"),
    "yes-no": Generation(max_new_tokens=4, cut="none"),
    "mimic-vqa": Generation(10, num_beams=3, length_penalty=0.0, cut="vqa"),
    "mimic-caption": Generation(20, num_beams=3, length_penalty=0.0, cut="caption"),
    "hificl-vqa": Generation(20, num_beams=3, length_penalty=0.0, cut="hificl-vqa"),
    "live-vqa": Generation(5, num_beams=3, length_penalty=0.0, cut="live-vqa"),
}


@dataclass(frozen=True)
class Answers:
    """What a batch was answered.

    Attributes:
        tokens: int64 ``[B, new]``, without the prompts. seconds: of the batch, all in all.
        first_seconds: from the start until the first tokens were chosen from.
        yes: float32 ``[B]``, the probability of yes where the first token means yes or no; None if it was not
            asked for.
    """

    tokens: Tensor
    seconds: float
    first_seconds: float
    yes: Tensor | None


def generate(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    settings: Generation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: list[int],
    is_over: Callable[[list[int]], bool] | None = None,
    yes_no: YesNo | None = None,
) -> Answers:
    """Answer prompts that are padded on the left. An answer ends at one of ``end_ids``, where the model's
    ``generation_config`` says so or, if it is greedy, where ``is_over`` says so of its tokens so far."""
    first = _FirstTokens()
    ends = {*end_ids, *_ids(model.generation_config.eos_token_id)}
    pads = [tokenizer.pad_token_id, *_ids(model.generation_config.pad_token_id), *sorted(ends), 0]
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        repetition_penalty=settings.repetition_penalty,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(x for x in pads if x is not None),
    )
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"logits_processor": LogitsProcessorList([first])}
    if is_over is not None and settings.num_beams == 1:  # of a beam, another one may be the answer
        options["stopping_criteria"] = StoppingCriteriaList([_Over(length, is_over)])
    with _special_tokens_alone(model):
        start = _now(inputs["input_ids"])
        made = model.generate(**inputs, generation_config=config, **options)
        seconds = _now(made) - start
    yes = None if yes_no is None else yes_no.probability(first.scores[:: settings.num_beams])
    return Answers(made[:, length:], seconds, first.moment - start, yes)


@contextmanager
def _special_tokens_alone(model: nn.Module) -> Iterator[None]:
    """Of its ``generation_config``, which ``generate`` asks for all that it is not given."""
    inner = unwrap(model)
    own = inner.generation_config
    names = ("bos_token_id", "decoder_start_token_id")
    inner.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        inner.generation_config = own


@dataclass(frozen=True)
class YesNo:
    """The ids of first tokens that mean yes, and no."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> YesNo:
        """The first tokens of "yes" and "no" in lower, upper and title case, after a space and without one.

        Raises ValueError: the tokenizer begins both with the same tokens.
        """
        firsts = {
            word: {
                tokenizer(space + written, add_special_tokens=False)["input_ids"][0]
                for space in ("", " ") for written in (word, word.title(), word.upper())
            }
            for word in ("yes", "no")
        }  # fmt: skip
        yes, no = (tuple(sorted(firsts[x] - firsts[y])) for x, y in (("yes", "no"), ("no", "yes")))
        if not yes or not no:
            raise ValueError("the tokenizer begins yes and no with the same tokens, expected others")
        return cls(yes, no)

    def probability(self, scores: Tensor) -> Tensor:
        """``p(yes) / (p(yes) + p(no))``, float32 ``[B]``, of logits or log-probabilities ``[B, V]``."""
        yes, no = (scores[:, list(ids)].float().logsumexp(-1) for ids in (self.yes, self.no))
        return torch.sigmoid(yes - no)


@dataclass
class _Over(StoppingCriteria):
    """Which rows, of prompts of ``length`` tokens, have an answer that is over."""

    length: int
    is_over: Callable[[list[int]], bool]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        answers = input_ids[:, self.length :].tolist()
        return torch.tensor([self.is_over(x) for x in answers], device=input_ids.device)


@dataclass
class _FirstTokens(LogitsProcessor):
    """Notes the scores ``[B * beams, V]`` of the first new tokens, and when they were there."""

    scores: Tensor | None = None
    moment: float = field(default=0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is None:
            self.scores, self.moment = scores, _now(scores)
        return scores


def _now(x: Tensor) -> float:
    """Seconds, when the device of ``x`` has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]
