"""What a user has beside a model: its processor, and prompts as it was pretrained with.

A prompt of k demonstrations, ``6 + 7 k`` tokens and a word and ``<end>`` where the query is answered::

    <bos>  (image x4  question  answer  <end>) x k   image x4  question  [answer  <end>]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import mmicl_kernels as mk

from . import data

TEMPLATE = "{image}{text} {answer}<end>"
UNKNOWN = "<unk>"  # its id is one that the model has no embedding of: another word is an error


def digits_processor(vocabulary: Sequence[str] = data.VOCABULARY) -> LlavaProcessor:
    """A token for every word of ``vocabulary``, four for every image; pixels in [-1, 1]."""
    words = {word: i for i, word in enumerate((*vocabulary, UNKNOWN))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", data.BOS_ID)])
    special = {
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<end>",
        "unk_token": UNKNOWN,
        "additional_special_tokens": ["<image>"],
    }
    return LlavaProcessor(
        SiglipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        patch_size=data.PATCH_SIZE,
        vision_feature_select_strategy="full",
    )


class DigitsPrompts(mk.PromptBuilder):
    """The prompts of a vocabulary; AIM fuses the answer and the end of a demonstration, or the end alone.

    Args:
        fused: which positions of a demonstration become tokens: "label", its answer and its end, or "end";
            None for methods that do not aggregate.
    """

    def __init__(self, vocabulary: Sequence[str] = data.VOCABULARY, fused: str | None = None) -> None:
        positions = "text" if fused is None else "answer_end"
        super().__init__(digits_processor(vocabulary), TEMPLATE, positions=positions)
        self.fused = fused

    def demonstrations(self, demonstrations: Sequence[mk.Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
        inputs, fused = super().demonstrations(demonstrations)
        return inputs, fused & (inputs["input_ids"] == data.END_ID) if self.fused == "end" else fused

    def queries(self, demonstrations: Sequence[mk.Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
        """AIM's projection learns the answers alone, not the ends that follow them."""
        inputs, labels = super().queries(demonstrations)
        return inputs, labels.masked_fill(labels == data.END_ID, data.IGNORE)

    def asked(
        self, queries: Sequence[data.Example], shots: Sequence[Sequence[data.Example]] | None = None
    ) -> dict[str, Tensor]:
        """Inputs of ``generate``: each query after its own demonstrations, by default none."""
        return self.prompt(*_demonstrations(queries, shots or [()] * len(queries)))

    def taught(
        self, queries: Sequence[data.Example], shots: Sequence[Sequence[data.Example]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, and labels ``[B, T]``: every answer and its end, the demonstrations' too."""
        inputs = self.answered(*_demonstrations(queries, shots)).inputs
        ids = inputs["input_ids"]
        ends = ids == data.END_ID
        return inputs, ids.masked_fill(~(ends | ends.roll(-1, 1)), data.IGNORE)

    def answers(self, examples: Sequence[data.Example]) -> Tensor:
        """The ids ``[N]`` of their answers, which are one word each."""
        return torch.tensor(self.processor.tokenizer.convert_tokens_to_ids([x.answer for x in examples]))


def _demonstrations(
    queries: Sequence[data.Example], shots: Sequence[Sequence[data.Example]]
) -> tuple[list[mk.Demonstration], list[list[mk.Demonstration]]]:
    return [x.demonstration() for x in queries], [[x.demonstration() for x in row] for row in shots]
