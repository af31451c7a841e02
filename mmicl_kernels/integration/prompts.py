"""Demonstrations as prompts, made by a model's own HuggingFace processor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from string import Formatter, ascii_letters
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmicl_kernels.integration.images import decode_image
from mmicl_kernels.library import Demonstration

if TYPE_CHECKING:
    from transformers import ProcessorMixin

TEMPLATE = "{image}{text} {answer}"
IGNORE = -100  # a label that is not predicted


class PromptBuilder:
    """Makes prompts of demonstrations: to be aggregated, to be learnt from, to be answered.

    ``template`` is a format string in which ``{image}`` becomes the processor's image token, once for each
    image, ``{text}`` and ``{answer}`` the demonstration's. The answer is the last of them; what follows it
    is part of demonstrations alone. All returned tensors are on ``device``.

    Args:
        processor: with an ``image_token`` and a tokenizer, as ``AutoProcessor`` returns it.
        answer_only: whether ``demonstrations`` points out the answers' tokens, which an adapter with
            positions "answer" needs.
        dtype: of the pixels; by default the processor's.

    Raises:
        TypeError: a processor without an image token, such as Idefics v1's. ValueError: another template.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        template: str = TEMPLATE,
        *,
        answer_only: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._image_token = getattr(processor, "image_token", None)
        if not isinstance(self._image_token, str) or getattr(processor, "tokenizer", None) is None:
            raise TypeError(
                f"processor is a {type(processor).__name__}, expected one with an image_token and a tokenizer"
            )
        self.processor, self.template, self.answer_only = processor, template, answer_only
        self.device, self.dtype = device, dtype
        self._tokenizer = processor.tokenizer
        self._before, self._after = parse_template(template)
        self._special = {self._image_token, *self._tokenizer.all_special_tokens}
        self._space_is_the_answers = self._merges_the_space()

    @property
    def description(self) -> str:
        """What decides the tokens of a demonstration's prompt, for ``DemonstrationBank.create``."""
        fused = "answer" if self.answer_only else "text"
        return f"{type(self.processor).__name__}, {self.template!r}, fused: {fused}"

    def demonstrations(self, demonstrations: Sequence[Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs ``[B, T]``, padded on the right, and which of their tokens are fused: a ``Collate``.

        Those, bool ``[B, T]``, are with ``answer_only`` the answer's, else the text's after the last image
        and the special tokens that close it.

        Raises:
            TypeError, ValueError: as :meth:`check`, or an image that cannot be decoded.
        """
        befores = self._befores(demonstrations)
        answers = [x.answer for x in demonstrations]
        texts = [before + answer + self._after for before, answer in zip(befores, answers, strict=True)]
        inputs = self._process(demonstrations, texts, "right")
        if not self.answer_only:
            return inputs, self._text_mask(inputs)
        spans = [self._answer_span(*parts) for parts in zip(befores, answers, texts, strict=True)]
        return inputs, self._answer_mask(inputs, texts, spans)

    def queries(self, demonstrations: Sequence[Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs ``[B, T]``, padded on the right, that end with the answers, and labels, int64 ``[B, T]``.

        The labels are the answer's tokens and the end of text, if the tokenizer has one; elsewhere -100.

        Raises:
            TypeError, ValueError: as :meth:`check` with ``answered``, or an image that cannot be decoded.
        """
        befores = self._befores(demonstrations, answered=True)
        plain = [before + x.answer for before, x in zip(befores, demonstrations, strict=True)]
        texts = [self._ended(text) for text in plain]
        inputs = self._process(demonstrations, texts, "right")
        spans = []
        for before, answered, text in zip(befores, plain, texts, strict=True):
            prompt = self._without_the_answers_space(before)
            begin, _, length = self._answer_span(prompt, answered[len(prompt) :], text)
            spans.append((begin, length, length))  # what follows the answer is the end of text
        mask = self._answer_mask(inputs, texts, spans)
        return inputs, inputs["input_ids"].masked_fill(~mask, IGNORE)

    def prompt(self, demonstrations: Sequence[Demonstration]) -> dict[str, Tensor]:
        """Inputs ``[B, T]`` of ``generate``, padded on the left, which end where the answer begins.

        Where a word's token may include the space before it, the prompt ends before that space: its tokens
        are those that precede the labels of :meth:`queries`.

        Raises:
            TypeError, ValueError: as :meth:`check`, or an image that cannot be decoded.
        """
        befores = self._befores(demonstrations)
        return self._process(demonstrations, [self._without_the_answers_space(x) for x in befores], "left")

    def check(self, demonstration: Demonstration, *, answered: bool = False) -> None:
        """Raise TypeError or ValueError unless prompts can be made of it; the images are not looked at.

        Of the tokenizer's special tokens none may stand in text or answer: it would not be read as text.
        With ``answered``, or ``answer_only``, the answer must have tokens.
        """
        if not isinstance(demonstration, Demonstration):
            raise TypeError(f"demonstrations has a {type(demonstration).__name__}, expected Demonstration")
        for name in ("text", "answer"):
            value = getattr(demonstration, name)
            found = sorted(token for token in self._special if token in value)
            if found:
                raise ValueError(f"{name} {value!r:.80} has {found[0]!r}, expected no special token")
        if (answered or self.answer_only) and not self._ids(demonstration.answer.strip()):
            raise ValueError(f"answer is {demonstration.answer!r:.80}, expected one with tokens")

    def _befores(self, demonstrations: Sequence[Demonstration], answered: bool = False) -> list[str]:
        """The prompts as far as their answers."""
        if not demonstrations:
            raise ValueError("demonstrations is empty, expected at least one")
        for x in demonstrations:
            self.check(x, answered=answered)
        token = self._image_token
        return [self._before.format(image=token * len(x.images), text=x.text) for x in demonstrations]

    def _process(
        self, demonstrations: Sequence[Demonstration], texts: list[str], padding_side: str
    ) -> dict[str, Tensor]:
        images = [
            [decode_image(data, f"image {j} of demonstration {i}") for j, data in enumerate(x.images)]
            for i, x in enumerate(demonstrations)
        ]
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        made = self.processor(images=images if any(images) else None, text=list(texts), **options)
        made.pop("labels", None)  # PaliGemma's, of another prompt
        return dict(made.to(self.device, self.dtype))

    def _text_mask(self, inputs: dict[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        image = ids == self._tokenizer.convert_tokens_to_ids(self._image_token)
        special = torch.isin(ids, torch.tensor(self._tokenizer.all_special_ids, device=ids.device)) | image
        after = image.flip(-1).cumsum(-1).flip(-1) == 0
        begun = (after & ~special).cumsum(-1) > 0
        return after & begun & inputs["attention_mask"].bool()

    def _answer_mask(
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
            expected = self._tokenizer(text)["input_ids"][begin:]
            if ids[row, last].tolist() != expected:
                raise ValueError(
                    f"the processor's prompt {row} ends with tokens {ids[row, last].tolist()}, expected "
                    f"{expected} as the tokenizer makes of {text!r:.80}: its answer cannot be found"
                )
            mask[row, last[: end - begin]] = True
        return mask

    def _answer_span(self, before: str, answer: str, text: str) -> tuple[int, int, int]:
        """First and one past the last token of ``answer`` among those of ``text``, and how many these are.

        Tokens that it shares with its neighbours are among them. Without a fast tokenizer one that is
        shared with what follows is not.
        """
        if self._tokenizer.is_fast:
            made = self._tokenizer(text, return_offsets_mapping=True)
            length, first, last = len(made["input_ids"]), len(before), len(before) + len(answer)
            found = [i for i, (a, b) in enumerate(made["offset_mapping"]) if a < last and b > first]
            begin, end = (found[0], found[-1] + 1) if found else (length, length)
        else:
            ids = self._tokenizer(text)["input_ids"]
            length, begin = len(ids), _shared(ids, self._tokenizer(before)["input_ids"])
            end = _shared(ids, self._tokenizer(before + answer)["input_ids"])
        return begin, end, length

    def _ended(self, text: str) -> str:
        """``text`` and the end of text, unless the tokenizer has none or writes it by itself."""
        eos = self._tokenizer.eos_token
        if eos is None or self._tokenizer(text)["input_ids"][-1:] == [self._tokenizer.eos_token_id]:
            return text
        return text + eos

    def _without_the_answers_space(self, before: str) -> str:
        return before.rstrip(" ") if self._space_is_the_answers else before

    def _merges_the_space(self) -> bool:
        """Whether a word's token may include the space that the template has before the answer."""
        before = self._before.format(image="", text="a")
        alone = self._ids(before)
        return any(_shared(alone, self._ids(before + letter)) < len(alone) for letter in ascii_letters)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def parse_template(template: str) -> tuple[str, str]:
    """What is before a template's answer, a format string, and the text that follows it.

    Raises:
        ValueError: a template without ``{image}`` or ``{answer}``, where the answer is not the last field,
        with a field twice, or with any other.
    """
    expected = "expected {image}, {text} and, last, {answer}, each once; {text} may be missing"
    try:
        parsed = list(Formatter().parse(template))
    except (ValueError, TypeError) as error:
        raise ValueError(f"template is {template!r}, {expected}: {error}") from error
    fields = [field for _, field, _, _ in parsed if field is not None]
    plain = all(not spec and conversion is None for _, _, spec, conversion in parsed)
    known = sorted(fields) in (["answer", "image"], ["answer", "image", "text"])
    if not known or not plain or fields[-1] != "answer":
        raise ValueError(f"template is {template!r}, {expected}")
    index = next(i for i, (_, field, _, _) in enumerate(parsed) if field == "answer")
    before = ""
    for literal, field, _, _ in parsed[: index + 1]:
        before += literal.replace("{", "{{").replace("}", "}}")
        before += f"{{{field}}}" if field in ("image", "text") else ""
    return before, "".join(literal for literal, _, _, _ in parsed[index + 1 :])


def _shared(x: list[int], y: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False)))
