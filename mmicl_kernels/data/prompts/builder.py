"""Demonstrations and queries as prompts, made by a model's own HuggingFace processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from operator import eq
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.batch import IGNORE
from mmicl_kernels.data.prompts.image_markers import BARE, image_markers
from mmicl_kernels.data.prompts.images import images_of, interleaved
from mmicl_kernels.data.prompts.positions import check_positions
from mmicl_kernels.data.prompts.presets import PRESETS, Preset
from mmicl_kernels.data.prompts.tokens import PromptTokens, shared
from mmicl_kernels.data.prompts.turns import EXAMPLE, ChatTurns, FormatTurns, Written

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

TEMPLATE = "{image}{text} {answer}"


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
        positions: which tokens ``demonstrations`` points out, see ``POSITIONS``.
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
        self._tokens = PromptTokens(processor, token, interleaves=self._interleaves)
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
        inputs = self._process(images_of(demonstrations), texts, "right")
        if self.positions == "text":
            return inputs, self._tokens.text_mask(inputs, demonstrations)
        spans = [self._fused_span(x) for x in written]
        return inputs, self._tokens.answer_mask(inputs, texts, spans)

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
        texts = [self._tokens.ended(x) for x in written]
        inputs = self._process(images_of(queries, shots), texts, padding_side)
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
        texts = [self._tokens.ended(x) for x in tails]
        images = [x for row in images_of(shots) for x in row]
        prefix = self._process([images], [written[0].before[:place]], "right")
        inputs = self._process(images_of(queries), texts, "right", begins=False)
        return prefix, self._answered(tails, texts, inputs)

    def _place(self, written: list[Written], begin: int) -> int:
        """Where to cut texts of which the queries begin at ``begin``: there, or before white space.

        Raises ValueError: a tokenizer makes other tokens of the parts than of the whole.
        """
        first = written[0].before[:begin]
        texts = [self._tokens.ended(x) for x in written]
        for place in range(begin, len(first.rstrip()) - 1, -1):
            before = self._tokens.encoded(first[:place])["input_ids"]
            parts = (before + self._tokens.ids(text[place:]) for text in texts)
            whole = (self._tokens.encoded(text)["input_ids"] for text in texts)
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
            prompt = self._tokens.without_the_answers_space(x.before)
            begin, _, length = self._tokens.answer_span(prompt, answered[len(prompt) :], text)
            spans.append((begin, length, length))  # what follows the answer is its end
            positions = own[row].nonzero().flatten()
            head[row, positions[: self._tokens.head_tokens(ids[row, positions].tolist(), x.head, text)]] = (
                True
            )
        labels = ids.masked_fill(~self._tokens.answer_mask(inputs, texts, spans), IGNORE)
        return AnsweredPrompts(inputs, labels, head, image, tuple(texts))

    def image_tokens(self, ids: Tensor) -> Tensor:
        """Which of ``ids``, int64 of any shape, stand for images: bool of that shape."""
        return self._tokens.image_tokens(ids)

    @property
    def end_ids(self) -> list[int]:
        """The id at which an answer ends, where there is one: of a chat's turn, else of the text."""
        written = self._turns.prompt((), EXAMPLE)
        ids = self._tokens.ids(written.after)[-1:] if written.closed else [self._tokenizer.eos_token_id]
        return [x for x in ids if x is not None]

    @property
    def ending(self) -> str:
        """What a format string has after the answer of a demonstration; a chat's turns end at ``end_ids``."""
        if self.template == "chat":
            return ""
        return self._turns.alone(EXAMPLE).after

    def splits(self, text: str, place: int) -> bool:
        """Whether no token of ``text`` has characters before and after ``place``."""
        return self._tokens.splits(text, place)

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
        texts = [self._tokens.without_the_answers_space(x.before) for x in written]
        return self._process(images_of(demonstrations, shots), texts, "left")

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
            found = sorted(token for token in self._tokens.special if token in value)
            if found:
                raise ValueError(f"{name} {value!r:.80} has {found[0]!r}, expected no special token")
        if (answered or self.positions != "text") and not self._tokens.ids(demonstration.answer.strip()):
            raise ValueError(f"answer is {demonstration.answer!r:.80}, expected one with tokens")
        if self.positions == "answer_end":
            self._fused_span(self._alone(demonstration))
        if not answered:
            self._alone(demonstration)
            return
        x = self._fit(self._turns.prompt((), demonstration, separated=True))
        prompt = self._tokens.without_the_answers_space(x.before)
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
            return ChatTurns(self.processor, self._image_token, self._tokens.special, instruction or "")
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

    def _process(
        self, images: list[list[Image]], texts: list[str], padding_side: str, *, begins: bool = True
    ) -> dict[str, Tensor]:
        """Without ``begins`` the texts are what follows others: nothing is added before or after them."""
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        options |= self._tokens.options(texts[0]) if begins else {"add_special_tokens": False}
        if self._interleaves:
            prompts = [
                interleaved(text, row, self._image_token) for text, row in zip(texts, images, strict=True)
            ]
            made = self.processor(text=prompts, **options)
        else:
            made = self.processor(images=images if any(images) else None, text=list(texts), **options)
        made.pop("labels", None)  # PaliGemma's, of another prompt
        inputs = dict(made.to(self.device, self.dtype))
        if self._separated:
            inputs["attention_mask"] *= inputs["input_ids"] != self._tokenizer.pad_token_id
        return inputs

    def _fused_span(self, x: Written) -> tuple[int, int, int]:
        """As :meth:`_answer_span`; with "answer_end" the next token, too, or ValueError if there is none."""
        begin, end, length = self._tokens.answer_span(x.before, x.answer, x.before + x.answer + x.after)
        if self.positions == "answer_end" and begin < end:
            if end == length:
                after = f"expected one with a token of its own after the answer {x.answer!r:.80}"
                raise ValueError(f"positions is 'answer_end' and template is {self.template!r}, {after}")
            return begin, end + 1, length
        return begin, end, length


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


def _own_length(x: Written, alone: Written) -> int:
    """How many characters of ``x.before`` are the query's, whose text with nothing before is ``alone``."""
    return min(shared(x.before[::-1], alone.before[::-1]), len(alone.before) - len(alone.head))
