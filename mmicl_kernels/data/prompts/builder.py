"""Demonstrations and queries as prompts, made by a model's own HuggingFace processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq
from string import ascii_letters
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import torch
from torch import Tensor

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.decoding import decode_image
from mmicl_kernels.data.prompts.image_markers import BARE, image_markers
from mmicl_kernels.data.prompts.positions import check_positions
from mmicl_kernels.data.prompts.presets import PRESETS, Preset
from mmicl_kernels.data.prompts.turns import EXAMPLE, ChatTurns, FormatTurns, Written

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

TEMPLATE = "{image}{text} {answer}"
IGNORE = -100  # a label that is not predicted


@dataclass(frozen=True)
class AnsweredPrompts:
    """Prompts that end with the answers of their queries.

    Attributes:
        inputs: of ``model(**inputs)``, with ``[B, T]`` tokens.
        labels: int64 ``[B, T]``, the answer's tokens and its end; elsewhere -100.
        head: bool ``[B, T]``, what stands before the first turn: the begin of text, a system's turn.
        image: bool ``[B, T]``, the tokens of images.
        texts: as the processor was given them.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    head: Tensor
    image: Tensor
    texts: tuple[str, ...]


class PromptBuilder:
    """Makes prompts of demonstrations: to be aggregated, to be learnt from, to be answered.

    ``template`` says how a demonstration is written, and several of them one after the other:

    - A format string, in which ``{image}`` becomes all images, ``{text}`` and ``{answer}`` the
      demonstration's. The answer is the last of them; what follows it is part of demonstrations alone.
    - ``"chat"``: a turn of the user and one of the assistant, as the processor's chat template has them.
    - The name of one of ``PRESETS``, the official code's prompts to the letter: "live", "mimic-idefics",
      "mimic-idefics2", "mimic-llava", and the same with "-caption".

    If a demonstration's text has ``{image}`` itself, as often as there are images, these stand there instead;
    ``{{image}}`` is the text "{image}". All returned tensors are on ``device``.

    Images are written as in the model's own prompts: as its chat template has them, with what that puts
    around each (``<|vision_start|>``, a number, a line break), or by the bare image token if the processor
    adds all the rest. A prompt that those do not have, for instance images after text where the chat
    template moves them before it, is refused.

    Args:
        processor: with an ``image_token`` and a tokenizer, as ``AutoProcessor`` returns it; or Idefics v1's.
        instruction: what prompts with a query begin with; by default a preset's. In a chat it is the
            system's turn.
        image_marker: what to write for an image instead, with the image token once; ``{number}`` in it
            counts a demonstration's images.
        positions: which tokens ``demonstrations`` points out, as ``AIMConfig`` has it.
        dtype: of the pixels; by default the processor's.

    Raises:
        TypeError: a processor without an image token. ValueError: another template, or one that has images
            elsewhere than the model's own prompts; an ``image_marker`` without the token, or none where the
            model's own is not known; "chat" without a chat template; other ``positions``; "answer_end" where
            nothing follows an answer.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        template: str = TEMPLATE,
        *,
        instruction: str | None = None,
        image_marker: str | None = None,
        positions: str = "text",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        families = [cls.__name__ for cls in type(processor).__mro__]
        # Idefics v1's has no token: it takes texts and images in turn.
        self._interleaves = "IdeficsProcessor" in families
        # Mllama's writes the begin of text after the images that a text begins with.
        self._moves_bos = "MllamaProcessor" in families
        token = "<image>" if self._interleaves else getattr(processor, "image_token", None)
        self._tokenizer = getattr(processor, "tokenizer", None)
        if not isinstance(token, str) or self._tokenizer is None:
            raise TypeError(
                f"processor is a {type(processor).__name__}, expected one with an image_token and a tokenizer"
            )
        if instruction is not None and not isinstance(instruction, str):
            raise TypeError(f"instruction is a {type(instruction).__name__}, expected a string")
        self.processor, self.template = processor, template
        self.instruction, self.image_marker = instruction, image_marker
        self.device, self.dtype = device, dtype
        self._image_token = token
        own = getattr(processor, "image_token_ids", ())  # where the token is replaced by others
        ids = {self._tokenizer.convert_tokens_to_ids(token), *own}
        self._image_ids = sorted(ids - {None, self._tokenizer.unk_token_id})
        self._special, self._special_ids = special_tokens(self._tokenizer)
        self._special.add(token)
        self._merging: dict[int, bool] = {}  # by the number of spaces
        # Official code trains its students without the instruction that it has everywhere else.
        self.instructs_students = template not in PRESETS
        self._separated = False
        self._turns = self._turns_of(template, instruction, image_marker)
        self._point_out(positions)

    def _point_out(self, positions: str) -> None:
        """Change ``positions``. Raises ValueError as the class."""
        check_positions(positions)
        self.positions = positions
        if positions == "answer_end":
            self._fused_span(self._alone(EXAMPLE))

    @property
    def settings(self) -> dict[str, str | None]:
        """The arguments beside the processor that decide a prompt's tokens, to be stored and given again."""
        return {
            "template": self.template,
            "instruction": self.instruction,
            "image_marker": self.image_marker,
        }

    @property
    def description(self) -> str:
        """What decides the tokens of a demonstration's prompt, for ``DemonstrationBank.create``."""
        name, written = type(self.processor).__name__, self._turns.description(self.template)
        return f"{name}, {written}, fused: {self.positions}"

    def demonstrations(self, demonstrations: Sequence[Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs ``[B, T]``, padded on the right, and which of their tokens are fused: a ``Collate``.

        Those, bool ``[B, T]``, are by ``positions`` the text's after the last image and the special tokens
        that close it, the answer's, or these and the first after them.

        Raises:
            TypeError, ValueError: as :meth:`check`, or an image that cannot be decoded.
        """
        self._check_all(demonstrations)
        written = [self._alone(x) for x in demonstrations]
        texts = [x.before + x.answer + x.after for x in written]
        inputs = self._process(self._images(demonstrations), texts, "right")
        if self.positions == "text":
            return inputs, self._text_mask(inputs, demonstrations)
        spans = [self._fused_span(x) for x in written]
        return inputs, self._answer_mask(inputs, texts, spans)

    def queries(self, demonstrations: Sequence[Demonstration]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs ``[B, T]``, padded on the right, that end with the answers, and labels, int64 ``[B, T]``.

        The labels are the answer's tokens and its end, at which ``generate`` stops: that of the turn in a
        chat, else the end of text, if the tokenizer has one. Elsewhere they are -100.

        Raises:
            TypeError, ValueError: as :meth:`check` with ``answered``, or an image that cannot be decoded.
        """
        made = self.answered(demonstrations)
        return made.inputs, made.labels

    def answered(
        self,
        queries: Sequence[Demonstration],
        shots: Sequence[Sequence[Demonstration]] | None = None,
        *,
        padding_side: str = "right",
        instructed: bool = True,
    ) -> AnsweredPrompts:
        """Queries with their answers, each after its own demonstrations ``shots``, by default none.

        ``instructed`` is whether prompts begin with the instruction.

        Raises:
            TypeError, ValueError: as :meth:`check`, with ``answered`` for the queries; not as many rows of
            ``shots`` as queries; an image that cannot be decoded.
        """
        written = self._asked(queries, shots, answered=True, instructed=instructed)
        texts = [self._ended(x) for x in written]
        inputs = self._process(self._images(queries, shots), texts, padding_side)
        return self._answered(written, texts, inputs)

    def answered_after(
        self, queries: Sequence[Demonstration], shots: Sequence[Demonstration]
    ) -> tuple[dict[str, Tensor], AnsweredPrompts]:
        """The prompts of ``answered(queries, [shots] * B)``, cut where the queries begin.

        The first part, inputs ``[1, P]``, is the same in all of them and there once. The second has the
        queries ``[B, T]``, padded on the right. Together their tokens are the whole prompts'.

        Raises:
            TypeError, ValueError: as :meth:`answered`; a tokenizer that makes other tokens of two parts.
        """
        written = self._asked(queries, [shots] * len(queries), answered=True)
        alone = self._asked(queries, [()] * len(queries), answered=True)
        begin = min(len(x.before) - _own_length(x, y) for x, y in zip(written, alone, strict=True))
        place = self._place(written, begin)
        tails = [x._replace(head="", before=x.before[place:]) for x in written]
        texts = [self._ended(x) for x in tails]
        images = [x for row in self._images(shots) for x in row]
        prefix = self._process([images], [written[0].before[:place]], "right")
        inputs = self._process(self._images(queries), texts, "right", begins=False)
        return prefix, self._answered(tails, texts, inputs)

    def _place(self, written: list[Written], begin: int) -> int:
        """Where to cut texts of which the queries begin at ``begin``: there, or before white space.

        Raises ValueError: a tokenizer makes other tokens of the parts than of the whole.
        """
        first = written[0].before[:begin]
        texts = [self._ended(x) for x in written]
        for place in range(begin, len(first.rstrip()) - 1, -1):
            before = self._encoded(first[:place])["input_ids"]
            parts = (before + self._ids(text[place:]) for text in texts)
            whole = (self._encoded(text)["input_ids"] for text in texts)
            # Some processors write one token where an image ends and another begins.
            if all(map(eq, parts, whole)) and not first[:place].endswith(self._image_token):
                return place
        raise ValueError(
            f"after {first[-20:]!r} not all of {[text[begin:][:20] for text in texts]} have the tokens that "
            "they have alone: expected queries that begin with an image or a special token, after text"
        )

    def _answered(
        self, written: list[Written], texts: list[str], inputs: dict[str, Tensor]
    ) -> AnsweredPrompts:
        """Of ``texts``, which are ``written`` with their ends, and what the processor made of them."""
        plain = [x.before + x.answer for x in written]
        ids, own = inputs["input_ids"], inputs["attention_mask"].bool()
        image = self.image_tokens(ids) & own
        head, spans = torch.zeros_like(own), []
        for row, (x, answered, text) in enumerate(zip(written, plain, texts, strict=True)):
            prompt = self._without_the_answers_space(x.before)
            begin, _, length = self._answer_span(prompt, answered[len(prompt) :], text)
            spans.append((begin, length, length))  # what follows the answer is its end
            positions = own[row].nonzero().flatten()
            head[row, positions[: self._head_tokens(ids[row, positions].tolist(), x.head, text)]] = True
        labels = ids.masked_fill(~self._answer_mask(inputs, texts, spans), IGNORE)
        return AnsweredPrompts(inputs, labels, head, image, tuple(texts))

    def image_tokens(self, ids: Tensor) -> Tensor:
        """Which of ``ids``, int64 of any shape, stand for images: bool of that shape."""
        return torch.isin(ids, torch.tensor(self._image_ids, device=ids.device))

    @property
    def end_ids(self) -> list[int]:
        """The id at which an answer ends, where there is one: of a chat's turn, else of the text."""
        written = self._turns.prompt((), EXAMPLE)
        ids = self._ids(written.after)[-1:] if written.closed else [self._tokenizer.eos_token_id]
        return [x for x in ids if x is not None]

    @property
    def ending(self) -> str:
        """What a format string has after the answer of a demonstration; a chat's turns end at ``end_ids``."""
        if self.template == "chat":
            return ""
        return self._turns.alone(EXAMPLE).after

    def splits(self, text: str, place: int) -> bool:
        """Whether no token of ``text`` has characters before and after ``place``."""
        ids, before = (self._encoded(x)["input_ids"] for x in (text, text[:place]))
        if before[-1:] == [self._tokenizer.eos_token_id] != ids[len(before) - 1 : len(before)]:
            before = before[:-1]  # the end of text that some tokenizers write
        return ids[: len(before)] == before

    def prompt(
        self,
        demonstrations: Sequence[Demonstration],
        shots: Sequence[Sequence[Demonstration]] | None = None,
    ) -> dict[str, Tensor]:
        """Inputs ``[B, T]`` of ``generate``, padded on the left, which end where the answer begins.

        Each of ``demonstrations`` is asked after its own ``shots``, by default none. Where a word's token may
        include the space before it, the prompt ends before that space: its tokens are those that precede the
        labels of :meth:`queries`.

        Raises:
            TypeError, ValueError: as :meth:`check`; not as many rows of ``shots`` as demonstrations; an image
            that cannot be decoded.
        """
        written = self._asked(demonstrations, shots)
        texts = [self._without_the_answers_space(x.before) for x in written]
        return self._process(self._images(demonstrations, shots), texts, "left")

    def check(self, demonstration: Demonstration, *, answered: bool = False) -> None:
        """Raise TypeError or ValueError unless prompts can be made of it; the images are not looked at.

        Of the tokenizer's special tokens none may stand in text or answer: it would not be read as text.
        With ``answered``, or other ``positions`` than "text", the answer must have tokens, and with
        "answer_end" one after them. With ``answered`` it must begin with one of its own: after a prompt that
        ends with ":", no model says ":red".
        """
        if not isinstance(demonstration, Demonstration):
            raise TypeError(f"demonstrations has a {type(demonstration).__name__}, expected Demonstration")
        for name in ("text", "answer"):
            value = getattr(demonstration, name)
            found = sorted(token for token in self._special if token in value)
            if found:
                raise ValueError(f"{name} {value!r:.80} has {found[0]!r}, expected no special token")
        if (answered or self.positions != "text") and not self._ids(demonstration.answer.strip()):
            raise ValueError(f"answer is {demonstration.answer!r:.80}, expected one with tokens")
        if self.positions == "answer_end":
            self._fused_span(self._alone(demonstration))
        if not answered:
            self._alone(demonstration)
            return
        x = self._fit(self._turns.prompt((), demonstration, separated=True))
        prompt = self._without_the_answers_space(x.before)
        if not self.splits(x.before + x.answer, len(prompt)):
            raise ValueError(
                f"answer {x.answer!r:.80} begins within a token, after {prompt[-20:]!r}: expected a template "
                "with a space or a line break before {answer}, and no white space where the answer begins"
            )

    def _turns_of(
        self, template: str, instruction: str | None, image_marker: str | None
    ) -> FormatTurns | ChatTurns:
        if template == "chat":
            if image_marker is not None:
                raise ValueError(f"image_marker is {image_marker!r}, expected None with the template 'chat'")
            return ChatTurns(self.processor, self._image_token, self._special, instruction or "")
        preset = PRESETS.get(template)
        bare = any(cls.__name__ in BARE for cls in type(self.processor).__mro__)
        # A preset is literal: not as a chat template has images, where the processor writes what they need.
        marker = self._image_token if preset and bare and image_marker is None else image_marker
        markers = image_markers(self.processor, self._image_token, marker)
        chosen = preset or Preset(template)
        if instruction is not None:
            chosen = replace(chosen, instruction=instruction)
        separator = self._separator(template, chosen) if chosen.separated else ""
        turns = FormatTurns(chosen, markers, self._image_token, separator)
        turns.check(template)
        self._separated = chosen.separated
        return turns

    def _separator(self, template: str, preset: Preset) -> str:
        pad, eos = self._tokenizer.pad_token, self._tokenizer.eos_token
        written = f"{preset.instruction} {preset.shot} {preset.query}"
        if pad is None or pad == eos or pad in written:
            raise ValueError(
                f"template is {template!r}, whose parts a padding token keeps apart, and the tokenizer's is "
                f"{pad!r}, expected one that is neither its end of text nor in the template"
            )
        return pad

    def _asked(
        self,
        queries: Sequence[Demonstration],
        shots: Sequence[Sequence[Demonstration]] | None,
        *,
        answered: bool = False,
        instructed: bool = True,
    ) -> list[Written]:
        """Each query after its demonstrations; separated if ``answered``."""
        self._check_all(queries, answered=answered)
        rows = [()] * len(queries) if shots is None else shots
        if len(rows) != len(queries):
            raise ValueError(f"shots has {len(rows)} rows, expected {len(queries)}, one for each query")
        for x in (x for row in rows for x in row):
            self.check(x)
        options = {"instructed": instructed, "separated": answered}
        written = [self._turns.prompt(row, x, **options) for row, x in zip(rows, queries, strict=True)]
        begin = self._tokenizer.bos_token if self._moves_bos and shots is not None else None
        if begin is not None:
            written = [
                x if x.before.startswith(begin) else x._replace(head=begin + x.head, before=begin + x.before)
                for x in written
            ]
        return [self._fit(x) for x in written]

    def _check_all(self, demonstrations: Sequence[Demonstration], answered: bool = False) -> None:
        if not demonstrations:
            raise ValueError("demonstrations is empty, expected at least one")
        for x in demonstrations:
            self.check(x, answered=answered)

    def _fit(self, x: Written) -> Written:
        """As the processor will read it: Idefics v1's strips texts beside images."""
        if not self._interleaves:
            return x
        before = re.sub(f" *{re.escape(self._image_token)} *", self._image_token, x.before).lstrip(" ")
        beside = before.endswith(self._image_token)
        return x._replace(before=before, answer=x.answer.lstrip(" ") if beside else x.answer)

    def _alone(self, x: Demonstration) -> Written:
        """As a demonstration. Raises ValueError: its images cannot stand where they are."""
        return self._fit(self._turns.alone(x))

    def _images(
        self,
        queries: Sequence[Demonstration],
        shots: Sequence[Sequence[Demonstration]] | None = None,
    ) -> list[list[Image]]:
        """The images of each prompt, those of its demonstrations first."""
        made: list[list[Image]] = []
        for i, query in enumerate(queries):
            row = () if shots is None else shots[i]
            named = [(f"demonstration {j} of query {i}", x) for j, x in enumerate(row)]
            named.append((f"demonstration {i}" if shots is None else f"query {i}", query))
            made.append([])
            for name, x in named:
                made[-1] += [decode_image(data, f"image {j} of {name}") for j, data in enumerate(x.images)]
        return made

    def _process(
        self, images: list[list[Image]], texts: list[str], padding_side: str, *, begins: bool = True
    ) -> dict[str, Tensor]:
        """Without ``begins`` the texts are what follows others: nothing is added before or after them."""
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        options |= self._token_options(texts[0]) if begins else {"add_special_tokens": False}
        if self._interleaves:
            prompts = [self._interleaved(text, row) for text, row in zip(texts, images, strict=True)]
            made = self.processor(text=prompts, **options)
        else:
            made = self.processor(images=images if any(images) else None, text=list(texts), **options)
        made.pop("labels", None)  # PaliGemma's, of another prompt
        inputs = dict(made.to(self.device, self.dtype))
        if self._separated:
            inputs["attention_mask"] *= inputs["input_ids"] != self._tokenizer.pad_token_id
        return inputs

    def _interleaved(self, text: str, images: Sequence[Image]) -> list[str | Image]:
        """Texts and images in turn. Raises ValueError: a text is an address, which would be opened."""
        first, *others = text.split(self._image_token)
        items: list[str | Image] = [first] if first else []
        for image, part in zip(images, others, strict=True):
            items += [image, *([part] if part else [])]
        for item in items:
            if isinstance(item, str) and " " not in item and all(urlparse(item)[:2]):
                raise ValueError(
                    f"text {item!r:.80} is an address, which {type(self.processor).__name__} opens"
                )
        return items

    def _token_options(self, text: str) -> dict[str, bool]:
        """A begin of text that is written, as by chat templates and Idefics v1's, is not added once more."""
        bos = self._tokenizer.bos_token
        written = self._interleaves or (bos is not None and text.startswith(bos))
        return {"add_special_tokens": False} if written else {}

    def _encoded(self, text: str, **options: bool) -> dict[str, list]:
        return self._tokenizer(text, **options, **self._token_options(text))

    def _head_tokens(self, ids: list[int], head: str, text: str) -> int:
        """How many of a prompt's tokens ``ids`` stand before its first turn."""
        if self._tokenizer.is_fast:
            made = self._encoded(text, return_offsets_mapping=True)
            ends = takewhile(lambda span: span[1] <= len(head), made["offset_mapping"])
            expected = made["input_ids"][: sum(1 for _ in ends)]
        else:
            expected = self._encoded(text)["input_ids"]
            expected = expected[: _shared(expected, self._encoded(head)["input_ids"])]
        bos = self._tokenizer.bos_token_id
        written = int(ids[:1] == [bos] != expected[:1])  # by the processor
        return written + _shared(ids[written:], expected)

    def _text_mask(self, inputs: dict[str, Tensor], demonstrations: Sequence[Demonstration]) -> Tensor:
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
            expected = self._encoded(text)["input_ids"][begin:]
            if ids[row, last].tolist() != expected:
                raise ValueError(
                    f"the processor's prompt {row} ends with tokens {ids[row, last].tolist()}, expected "
                    f"{expected} as the tokenizer makes of {text!r:.80}: its answer cannot be found where "
                    f"{type(self.processor).__name__} writes another end"
                )
            mask[row, last[: end - begin]] = True
        return mask

    def _answer_span(self, before: str, answer: str, text: str) -> tuple[int, int, int]:
        """First and one past the last token of ``answer`` among those of ``text``, and how many these are.

        Tokens that it shares with its neighbours are among them. Without a fast tokenizer one that is
        shared with what follows is not.
        """
        if self._tokenizer.is_fast:
            made = self._encoded(text, return_offsets_mapping=True)
            length, first, last = len(made["input_ids"]), len(before), len(before) + len(answer)
            # A special token may take up white space beside it, also that of the answer.
            own = [i not in self._special_ids for i in made["input_ids"]]
            spans = zip(own, made["offset_mapping"], strict=True)
            found = [i for i, (own, (a, b)) in enumerate(spans) if own and a < last and b > first]
            begin, end = (found[0], found[-1] + 1) if found else (length, length)
        else:
            ids = self._encoded(text)["input_ids"]
            length, begin = len(ids), _shared(ids, self._encoded(before)["input_ids"])
            end = _shared(ids, self._encoded(before + answer)["input_ids"])
        return begin, end, length

    def _fused_span(self, x: Written) -> tuple[int, int, int]:
        """As :meth:`_answer_span`; with "answer_end" the next token, too, or ValueError if there is none."""
        begin, end, length = self._answer_span(x.before, x.answer, x.before + x.answer + x.after)
        if self.positions == "answer_end" and begin < end:
            if end == length:
                after = f"expected one with a token of its own after the answer {x.answer!r:.80}"
                raise ValueError(f"positions is 'answer_end' and template is {self.template!r}, {after}")
            return begin, end + 1, length
        return begin, end, length

    def _ended(self, x: Written) -> str:
        """The text and its end, unless the tokenizer has none or writes it by itself."""
        text, eos = x.before + x.answer + x.after, self._tokenizer.eos_token
        if x.closed or eos is None or self._encoded(text)["input_ids"][-1:] == [self._tokenizer.eos_token_id]:
            return text
        return text + eos

    def _without_the_answers_space(self, before: str) -> str:
        """Without the spaces at its end, if a word's token may include one."""
        stripped = before.rstrip(" ")
        if self._interleaves:
            return stripped
        spaces = len(before) - len(stripped)
        if spaces not in self._merging:
            self._merging[spaces] = self._merges("a" + " " * spaces)
        return stripped if self._merging[spaces] else before

    def _merges(self, before: str) -> bool:
        alone = self._ids(before)
        return any(_shared(alone, self._ids(before + letter)) < len(alone) for letter in ascii_letters)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def builder_of(
    processor: ProcessorMixin | PromptBuilder, *, positions: str = "text", dtype: torch.dtype | None = None
) -> PromptBuilder:
    """A builder is copied; a processor gets one of its chat template, or of ``TEMPLATE`` where it has none.

    Raises TypeError and ValueError as :class:`PromptBuilder`.
    """
    if isinstance(processor, PromptBuilder):
        builder = copy(processor)
    else:
        tokenizer = getattr(processor, "tokenizer", None)
        chats = any(getattr(x, "chat_template", None) for x in (processor, tokenizer))
        builder = PromptBuilder(processor, "chat" if chats else TEMPLATE)
    builder._point_out(positions)
    builder.dtype = dtype
    return builder


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[set[str], list[int]]:
    """The tokens that are no text, and their ids: without that of unknown text, which stands for some."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*tokenizer.all_special_tokens, *added}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    unknown = {tokenizer.unk_token} - named
    return tokens, tokenizer.convert_tokens_to_ids(sorted(tokens - unknown))


def _own_length(x: Written, alone: Written) -> int:
    """How many characters of ``x.before`` are the query's, whose text with nothing before is ``alone``."""
    return min(_shared(x.before[::-1], alone.before[::-1]), len(alone.before) - len(alone.head))


def _shared(x: Sequence, y: Sequence) -> int:
    """How many tokens, or characters, both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False)))
