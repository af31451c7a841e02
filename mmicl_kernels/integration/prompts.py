"""Demonstrations as prompts, made by a model's own HuggingFace processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from string import Formatter, ascii_letters
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmicl_kernels.integration.image_markers import image_markers
from mmicl_kernels.integration.images import decode_image
from mmicl_kernels.library import Demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

TEMPLATE = "{image}{text} {answer}"
IGNORE = -100  # a label that is not predicted


class PromptBuilder:
    """Makes prompts of demonstrations: to be aggregated, to be learnt from, to be answered.

    ``template`` is a format string in which ``{image}`` becomes all images, ``{text}`` and ``{answer}`` the
    demonstration's. The answer is the last of them; what follows it is part of demonstrations alone. If a
    demonstration's text has ``{image}`` itself, as often as there are images, these stand there instead;
    ``{{image}}`` is the text "{image}". All returned tensors are on ``device``.

    Images are written as in the model's own prompts: as its chat template has them, with what that puts
    around each (``<|vision_start|>``, a number, a line break), or by the bare image token if the processor
    adds all the rest. A prompt that those do not have, for instance images after text where the chat
    template moves them before it, is refused.

    Args:
        processor: with an ``image_token`` and a tokenizer, as ``AutoProcessor`` returns it.
        image_marker: what to write for an image instead, with the image token once; ``{number}`` in it
            counts a prompt's images.
        answer_only: whether ``demonstrations`` points out the answers' tokens, which an adapter with
            positions "answer" needs.
        dtype: of the pixels; by default the processor's.

    Raises:
        TypeError: a processor without an image token, such as Idefics v1's. ValueError: another template, or
            one that has images elsewhere than the model's own prompts; an ``image_marker`` without the token,
            or none where the model's own is not known.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        template: str = TEMPLATE,
        *,
        image_marker: str | None = None,
        answer_only: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        token = getattr(processor, "image_token", None)
        self._tokenizer = getattr(processor, "tokenizer", None)
        if not isinstance(token, str) or self._tokenizer is None:
            raise TypeError(
                f"processor is a {type(processor).__name__}, expected one with an image_token and a tokenizer"
            )
        self.processor, self.template, self.answer_only = processor, template, answer_only
        self.device, self.dtype = device, dtype
        self._before, self._after = parse_template(template)
        self._image_token, self._markers = token, image_markers(processor, token, image_marker)
        own = getattr(processor, "image_token_ids", ())  # where the token is replaced by others
        ids = {self._tokenizer.convert_tokens_to_ids(token), *own}
        self._image_ids = sorted(ids - {None, self._tokenizer.unk_token_id})
        self._special, self._special_ids = special_tokens(self._tokenizer)
        self._special.add(token)
        self._merging: dict[int, bool] = {}  # by the number of spaces
        self._check_template()

    @property
    def description(self) -> str:
        """What decides the tokens of a demonstration's prompt, for ``DemonstrationBank.create``."""
        fused = "answer" if self.answer_only else "text"
        images = self._markers.write(["", "", ""], text_first=False)
        marked = "" if images == 2 * self._image_token else f", two images: {images!r}"
        return f"{type(self.processor).__name__}, {self.template!r}{marked}, fused: {fused}"

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
            return inputs, self._text_mask(inputs, demonstrations)
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
        self._write(demonstration)

    def _check_template(self) -> None:
        """Raise ValueError: it has images where they cannot stand, or what their markers already have."""
        try:
            self._write(Demonstration((b"",), "text", ""))
        except ValueError as error:
            raise ValueError(f"template is {self.template!r}: {error}") from error
        begins, ends = self._markers.write(["", ""], text_first=False).split(self._image_token)
        place = [field for _, field in self._before].index("image")
        before, after = (literal for literal, _ in self._before[place : place + 2])
        for marked, doubled in ((begins, before.endswith(begins)), (ends, after.startswith(ends))):
            if marked.strip() and doubled:
                expected = f"expected it without the {marked!r} that {{image}} has by itself"
                raise ValueError(f"template is {self.template!r}, {expected}")

    def _befores(self, demonstrations: Sequence[Demonstration], answered: bool = False) -> list[str]:
        """The prompts as far as their answers."""
        if not demonstrations:
            raise ValueError("demonstrations is empty, expected at least one")
        for x in demonstrations:
            self.check(x, answered=answered)
        return [self._write(x) for x in demonstrations]

    def _write(self, x: Demonstration) -> str:
        """The prompt as far as its answer. Raises ValueError: its images cannot stand where they should."""
        first, *others = text_pieces(x.text)
        if others and (len(others) != len(x.images) or "text" not in [field for _, field in self._before]):
            raise ValueError(
                f"text {x.text!r:.80} has {{image}} {len(others)} times, expected never or, in a template "
                f"with {{text}}, once for each of its {len(x.images)} images"
            )
        pieces, text_first = [""], False
        for literal, field in self._before:
            pieces[-1] += literal
            if field == "text":
                text_first |= len(pieces) == 1 and first != ""
                pieces[-1] += first
                pieces += others
            elif field == "image" and not others:
                pieces += [""] * len(x.images)
        return self._markers.write(pieces, text_first)

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

    def _text_mask(self, inputs: dict[str, Tensor], demonstrations: Sequence[Demonstration]) -> Tensor:
        ids = inputs["input_ids"]
        image = torch.isin(ids, torch.tensor(self._image_ids, device=ids.device))
        for row, x in enumerate(demonstrations):
            if x.images and not image[row].any():
                expected = f"expected some of {self._image_ids}"
                raise ValueError(f"the processor's prompt {row} has no image tokens, {expected}")
        special = torch.isin(ids, torch.tensor(self._special_ids, device=ids.device)) | image
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
            # A special token may take up white space beside it, also that of the answer.
            own = [i not in self._special_ids for i in made["input_ids"]]
            spans = zip(own, made["offset_mapping"], strict=True)
            found = [i for i, (own, (a, b)) in enumerate(spans) if own and a < last and b > first]
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
        """Without the spaces at its end, if a word's token may include one."""
        stripped = before.rstrip(" ")
        spaces = len(before) - len(stripped)
        if spaces not in self._merging:
            self._merging[spaces] = self._merges("a" + " " * spaces)
        return stripped if self._merging[spaces] else before

    def _merges(self, before: str) -> bool:
        alone = self._ids(before)
        return any(_shared(alone, self._ids(before + letter)) < len(alone) for letter in ascii_letters)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def parse_template(template: str) -> tuple[list[tuple[str, str]], str]:
    """A template's fields up to ``{answer}``, each after a piece of text, and the text that follows them.

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
    before = [(literal, field) for literal, field, _, _ in parsed[: index + 1]]
    return before, "".join(literal for literal, _, _, _ in parsed[index + 1 :])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[set[str], list[int]]:
    """The tokens that are no text, and their ids: without that of unknown text, which stands for some."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*tokenizer.all_special_tokens, *added}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    unknown = {tokenizer.unk_token} - named
    return tokens, tokenizer.convert_tokens_to_ids(sorted(tokens - unknown))


def text_pieces(text: str) -> list[str]:
    """What is before, between and after the ``{image}`` of a text, with ``{image}`` for ``{{image}}``."""
    pieces = [""]
    for part in re.split(r"(\{\{image\}\}|\{image\})", text):
        if part == "{image}":
            pieces.append("")
        else:
            pieces[-1] += "{image}" if part == "{{image}}" else part
    return pieces


def _shared(x: list[int], y: list[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False)))
