"""Where the parts of a prompt are among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from string import ascii_letters
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.turns import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


class PromptTokens:
    """What a processor's tokenizer makes of texts, and which of the processor's tokens those are.

    ``interleaves``: it takes texts and images in turn, as Idefics v1's. ``image_token``: what stands for an
    image in its texts.
    """

    def __init__(self, processor: ProcessorMixin, image_token: str, *, interleaves: bool) -> None:
        self._tokenizer, self._interleaves = processor.tokenizer, interleaves
        self._processor = type(processor).__name__
        own = getattr(processor, "image_token_ids", ())  # where the token is replaced by others
        ids = {self._tokenizer.convert_tokens_to_ids(image_token), *own}
        self._image_ids = sorted(ids - {None, self._tokenizer.unk_token_id})
        self.special, self._special_ids = special_tokens(self._tokenizer)
        self.special.add(image_token)
        self._merging: dict[int, bool] = {}  # by the number of spaces

    def image_tokens(self, ids: Tensor) -> Tensor:
        """Which of ``ids``, int64 of any shape, stand for images: bool of that shape."""
        return torch.isin(ids, torch.tensor(self._image_ids, device=ids.device))

    def splits(self, text: str, place: int) -> bool:
        """Whether no token of ``text`` has characters before and after ``place``."""
        ids, before = (self.encoded(x)["input_ids"] for x in (text, text[:place]))
        if before[-1:] == [self._tokenizer.eos_token_id] != ids[len(before) - 1 : len(before)]:
            before = before[:-1]  # the end of text that some tokenizers write
        return ids[: len(before)] == before

    def options(self, text: str) -> dict[str, bool]:
        """A begin of text that is written, as by chat templates and Idefics v1's, is not added once more."""
        bos = self._tokenizer.bos_token
        written = self._interleaves or (bos is not None and text.startswith(bos))
        return {"add_special_tokens": False} if written else {}

    def encoded(self, text: str, **options: bool) -> dict[str, list]:
        return self._tokenizer(text, **options, **self.options(text))

    def head_tokens(self, ids: list[int], head: str, text: str) -> int:
        """How many of a prompt's tokens ``ids`` stand before its first turn."""
        if self._tokenizer.is_fast:
            made = self.encoded(text, return_offsets_mapping=True)
            ends = takewhile(lambda span: span[1] <= len(head), made["offset_mapping"])
            expected = made["input_ids"][: sum(1 for _ in ends)]
        else:
            expected = self.encoded(text)["input_ids"]
            expected = expected[: shared(expected, self.encoded(head)["input_ids"])]
        bos = self._tokenizer.bos_token_id
        written = int(ids[:1] == [bos] != expected[:1])  # by the processor
        return written + shared(ids[written:], expected)

    def text_mask(self, inputs: dict[str, Tensor], demonstrations: Sequence[Demonstration]) -> Tensor:
        ids = inputs["input_ids"]
        image = self.image_tokens(ids)
        for row, x in enumerate(demonstrations):
            if x.images and not image[row].any():
                expected = f"expected some of {self._image_ids}"
                raise ValueError(f"the processor's prompt {row} has no image tokens, {expected}")
        special = torch.isin(ids, torch.tensor(self._special_ids, device=ids.device)) | image
        after = image.flip(-1).cumsum(-1).flip(-1) == 0
        begun = (after & ~special).cumsum(-1) > 0
        return after & begun & inputs["attention_mask"].bool()

    def answer_mask(
        self, inputs: dict[str, Tensor], texts: list[str], spans: list[tuple[int, int, int]]
    ) -> Tensor:
        """Bool ``[B, T]``: the tokens ``begin`` to ``end`` of ``length``, counted from the last one.

        The processor lengthens a prompt where its images stand, so only its end is what the tokenizer alone
        makes of the text.
        """
        ids, own = inputs["input_ids"], inputs["attention_mask"].bool()
        mask = torch.zeros_like(own)
        for row, (text, (begin, end, length)) in enumerate(zip(texts, spans, strict=True)):
            if begin >= end:
                raise ValueError(f"the answer of demonstration {row} has no tokens, expected at least one")
            last = own[row].nonzero().flatten()[begin - length :]
            expected = self.encoded(text)["input_ids"][begin:]
            if ids[row, last].tolist() != expected:
                raise ValueError(
                    f"the processor's prompt {row} ends with tokens {ids[row, last].tolist()}, expected "
                    f"{expected} as the tokenizer makes of {text!r:.80}: its answer cannot be found where "
                    f"{self._processor} writes another end"
                )
            mask[row, last[: end - begin]] = True
        return mask

    def answer_span(self, before: str, answer: str, text: str) -> tuple[int, int, int]:
        """First and one past the last token of ``answer`` among those of ``text``, and how many these are.

        Tokens that it shares with its neighbours are among them. Without a fast tokenizer one that is
        shared with what follows is not.
        """
        if self._tokenizer.is_fast:
            made = self.encoded(text, return_offsets_mapping=True)
            length, first, last = len(made["input_ids"]), len(before), len(before) + len(answer)
            # A special token may take up white space beside it, also that of the answer.
            own = [i not in self._special_ids for i in made["input_ids"]]
            spans = zip(own, made["offset_mapping"], strict=True)
            found = [i for i, (own, (a, b)) in enumerate(spans) if own and a < last and b > first]
            begin, end = (found[0], found[-1] + 1) if found else (length, length)
        else:
            ids = self.encoded(text)["input_ids"]
            length, begin = len(ids), shared(ids, self.encoded(before)["input_ids"])
            end = shared(ids, self.encoded(before + answer)["input_ids"])
        return begin, end, length

    def without_the_answers_space(self, before: str) -> str:
        """Without the spaces at its end, if a word's token may include one."""
        stripped = before.rstrip(" ")
        if self._interleaves:
            return stripped
        spaces = len(before) - len(stripped)
        if spaces not in self._merging:
            self._merging[spaces] = self._merges("a" + " " * spaces)
        return stripped if self._merging[spaces] else before

    def _merges(self, before: str) -> bool:
        alone = self.ids(before)
        return any(shared(alone, self.ids(before + letter)) < len(alone) for letter in ascii_letters)

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def ended(self, x: Written) -> str:
        """The text and its end, unless the tokenizer has none or writes it by itself."""
        text, eos = x.before + x.answer + x.after, self._tokenizer.eos_token
        if x.closed or eos is None or self.encoded(text)["input_ids"][-1:] == [self._tokenizer.eos_token_id]:
            return text
        return text + eos


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[set[str], list[int]]:
    """The tokens that are no text, and their ids: without that of unknown text, which stands for some."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*tokenizer.all_special_tokens, *added}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    unknown = {tokenizer.unk_token} - named
    return tokens, tokenizer.convert_tokens_to_ids(sorted(tokens - unknown))


def shared(x: Sequence, y: Sequence) -> int:
    """How many tokens, or characters, both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False)))
