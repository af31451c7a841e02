"""What is written around demonstrations and a query: by a format string, or by a chat template."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.image_markers import FixedMarkers, TemplateMarkers
from mmicl_kernels.data.prompts.presets import Preset
from mmicl_kernels.data.records import text_pieces

if TYPE_CHECKING:
    from transformers import ProcessorMixin

EXAMPLE = Demonstration((b"",), "text", "answer")  # shows what a template writes around others


class Written(NamedTuple):
    """The text of a prompt, which is ``before + answer + after``.

    ``head``, with which ``before`` begins, is what stands before the first turn. ``closed`` is whether
    ``after`` has the end at which ``generate`` stops; else that is the end of text.
    """

    head: str
    before: str
    answer: str
    after: str
    closed: bool = False


class FormatTurns:
    """Turns written by format strings, one after the other.

    Args:
        preset: the format strings. token: the image's. separator: what keeps the tokens of parts apart.

    Raises:
        ValueError: as :func:`parse_template`.
    """

    def __init__(
        self, preset: Preset, markers: FixedMarkers | TemplateMarkers, token: str, separator: str = ""
    ) -> None:
        self._shot, self._after_shot = parse_template(preset.shot)
        self._query, self._after_query = self._shot, ""
        if preset.query is not None:
            self._query, self._after_query = parse_template(preset.query)
        self._instruction, self._separator = preset.instruction, separator
        self._markers, self._token = markers, token

    def alone(self, x: Demonstration) -> Written:
        """``x`` as a demonstration, with what follows its answer."""
        return Written("", self._write(self._shot, x), x.answer, self._after_shot)

    def prompt(
        self,
        demonstrations: Sequence[Demonstration],
        x: Demonstration,
        *,
        instructed: bool = True,
        separated: bool = False,
    ) -> Written:
        """The query ``x`` after demonstrations. Raises ValueError: its images cannot stand where they should.

        ``instructed`` is whether the instruction comes first, ``separated`` whether the separator is written.
        """
        head = self._instruction if instructed else ""
        before = head
        for shot in demonstrations:
            before += self._turn(self._shot, shot, before) + shot.answer + self._after_shot
        separator = self._separator if separated else ""
        before += (separator if before else "") + self._turn(self._query, x, before) + separator
        return Written(head, before, x.answer, self._after_query)

    def description(self, template: str) -> str:
        """What decides the tokens of demonstrations: the template, and how two images are written."""
        images = self._markers.write(["", "", ""], text_first=False)
        marked = "" if images == 2 * self._token else f", two images: {images!r}"
        return f"{template!r}{marked}"

    def _turn(self, fields: list[tuple[str, str]], x: Demonstration, before: str) -> str:
        if before and x.images and self._markers.images_first:
            raise ValueError("this model has images before all text, expected a prompt with nothing before")
        return self._write(fields, x)

    def _write(self, fields: list[tuple[str, str]], x: Demonstration) -> str:
        """A turn as far as its answer. Raises ValueError: its images cannot stand where they should."""
        first, *others = text_pieces(x.text)
        if others and (len(others) != len(x.images) or "text" not in [field for _, field in fields]):
            raise ValueError(
                f"text {x.text!r:.80} has {{image}} {len(others)} times, expected never or, in a template "
                f"with {{text}}, once for each of its {len(x.images)} images"
            )
        pieces, text_first = [""], False
        for literal, field in fields:
            pieces[-1] += literal
            if field == "text":
                text_first |= len(pieces) == 1 and first != ""
                pieces[-1] += first
                pieces += others
            elif field == "image" and not others:
                pieces += [""] * len(x.images)
        return self._markers.write(pieces, text_first)

    def check(self, template: str) -> None:
        """Raise ValueError: images stand where they cannot, or beside what their markers already have."""
        for fields in (self._shot, self._query):
            try:
                self._write(fields, Demonstration((b"",), "text", ""))
            except ValueError as error:
                raise ValueError(f"template is {template!r}: {error}") from error
            begins, ends = self._markers.write(["", ""], text_first=False).split(self._token)
            place = [field for _, field in fields].index("image")
            before, after = (literal for literal, _ in fields[place : place + 2])
            for marked, doubled in ((begins, before.endswith(begins)), (ends, after.startswith(ends))):
                if marked.strip() and doubled:
                    expected = f"expected it without the {marked!r} that {{image}} has by itself"
                    raise ValueError(f"template is {template!r}, {expected}")


# Stands for a text where a chat template is rendered. Its tabs show whether the template strips texts.
STAND_IN = re.compile("(\t?)\ue000(\\d+)\ue001(\t?)")
Message = dict[str, Any]


class ChatTurns:
    """Turns as the processor's chat template writes them: the user's and the assistant's.

    The template is rendered with stand-ins for the texts, so that none is mistaken for a part of it and the
    answer's place is known. A template that strips texts is given stripped ones.

    Raises:
        ValueError: there is no chat template, or it does not write images, texts or answers.
    """

    def __init__(
        self, processor: ProcessorMixin, token: str, special: Iterable[str], instruction: str
    ) -> None:
        self._name = type(processor).__name__
        self._writer = processor if getattr(processor, "chat_template", None) else processor.tokenizer
        if not getattr(self._writer, "chat_template", None):
            raise ValueError(f"template is 'chat' and {self._name} has no chat template, expected one")
        self._token, self._instruction = token, instruction
        parts = "|".join(re.escape(x) for x in sorted(special, key=len, reverse=True))
        self._special = re.compile(parts or "(?!)")
        self._events = re.compile(f"{re.escape(token)}|{STAND_IN.pattern}")
        self._heads: dict[tuple[tuple[str, ...], bool], str] = {}
        self.check()

    def alone(self, x: Demonstration) -> Written:
        """As :meth:`FormatTurns.alone`."""
        return self._written([x], True)

    def prompt(
        self,
        demonstrations: Sequence[Demonstration],
        x: Demonstration,
        *,
        instructed: bool = True,
        separated: bool = False,
    ) -> Written:
        """As :meth:`FormatTurns.prompt`; there is no separator. ``after`` ends with the end of the turn."""
        made = self._written([*demonstrations, x], instructed)
        end = self._special.search(made.after)
        closed = end is not None and not made.after[: end.start()].strip()
        return made._replace(after=made.after[: end.end()] if closed else "", closed=closed)

    def check(self) -> None:
        """Raise ValueError: a turn with an image, a text and an answer cannot be written."""
        self._written([EXAMPLE], True)

    def description(self, template: str) -> str:
        """As :meth:`FormatTurns.description`."""
        example = self.alone(Demonstration((b"", b""), "{text}", "{answer}"))
        return f"{template!r}, two images: {example.before + example.answer + example.after!r}"

    def _written(self, turns: Sequence[Demonstration], instructed: bool) -> Written:
        rendered, texts = self._rendered(turns, instructed)
        before, answer, position = "", "", 0
        for text, found in zip(texts, STAND_IN.finditer(rendered), strict=True):
            before += answer + rendered[position : found.start()]
            answer = _as_written(found, text)
            position = found.end()
        return Written(self._head(turns[-1], instructed), before, answer, rendered[position:])

    def _rendered(self, turns: Sequence[Demonstration], instructed: bool) -> tuple[str, list[str]]:
        """The template's text with stand-ins, and the texts that these are for, in order."""
        patterns = [_pattern(x) for x in turns]
        texts: list[str] = []
        for x, pattern in zip(turns, patterns, strict=True):
            pieces = text_pieces(x.text)
            texts += [piece for piece in pieces if piece] if any(pieces) else [""] * ("text" in pattern)
            texts.append(x.answer)
        complaints = []
        for listed in (True, False):  # some templates want an answer as a string
            conversation = _conversation(patterns, self._instruction if instructed else "", listed)
            rendered = self._try(conversation)
            failed = isinstance(rendered, Exception)
            wrong = rendered if failed else self._complaint(rendered, patterns)
            complaints.append(wrong or self._changes(conversation, rendered, texts))
            if complaints[-1] is None:
                return rendered, texts
        raise ValueError(
            f"the chat template of {self._name} cannot write turns of {patterns}: {complaints[0]}"
        ) from (complaints[0] if isinstance(complaints[0], Exception) else None)

    def _try(self, conversation: list[Message]) -> str | Exception:
        try:
            return self._writer.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # templates raise what they like
            return error

    def _changes(self, conversation: list[Message], rendered: str, texts: Sequence[str]) -> str | None:
        """What the template makes of the texts themselves, if that is more than to strip them."""
        own = self._try(_filled(conversation, texts))
        expected = STAND_IN.sub(lambda found: _as_written(found, texts[int(found[2])]), rendered)
        return None if own == expected else f"it writes {str(own)!r:.200} where {expected!r:.200} is expected"

    def _complaint(self, rendered: str, patterns: Sequence[tuple[str, ...]]) -> str | None:
        """What is wrong with the order of images and texts: those of a turn must stay in it."""
        found, number = [], 0
        events = iter(self._events.finditer(rendered))
        for pattern in patterns:
            turn = []
            for event in events:
                turn.append("image" if event[0] == self._token else "text")
                if turn[-1] == "text":
                    if event[2] != str(number):
                        return f"it writes text {event[2]} where text {number} is expected"
                    number += 1
                    if turn.count("text") > pattern.count("text"):
                        break
            found.append(tuple(turn[:-1]))
        found[-1] += tuple("image" if x[0] == self._token else "text" for x in events)
        pairs = list(zip(found, patterns, strict=True))
        if any(sorted(x) != sorted(y) for x, y in pairs):
            return f"it writes {found}"
        if any(x != y and list(y) != sorted(y) for x, y in pairs):  # a template may sort what has no places
            return f"it has images elsewhere than where {{image}} stands in the text: {found}"
        return None

    def _head(self, x: Demonstration, instructed: bool) -> str:
        """What stands before the first turn, if that is of such a query."""
        key = (_pattern(x), instructed)
        if key not in self._heads:
            rendered, _ = self._rendered([x, x], instructed)
            first = self._events.search(rendered)
            answers = list(STAND_IN.finditer(rendered))
            middle, last = answers[len(answers) // 2 - 1].end(), answers[-1].end()
            between = rendered[middle : self._events.search(rendered, middle).start()]
            begin = between.removeprefix(rendered[last:])  # the turn's own, without the end of another
            self._heads[key] = self._without_begin(rendered[: first.start()], begin)
        return self._heads[key]

    def _without_begin(self, prefix: str, begin: str) -> str:
        if begin and prefix.endswith(begin):
            return prefix[: -len(begin)]
        # A system's text may be in the first turn. From a special token on it is as in other turns.
        common = os.path.commonprefix([prefix[::-1], begin[::-1]])[::-1]
        special = self._special.search(common)
        return prefix[: len(prefix) - len(common) + special.start()] if special else prefix


def _as_written(found: re.Match[str], text: str) -> str:
    """``text`` where its stand-in was found: a template that strips texts took a tab away."""
    text = text if found[1] else text.lstrip()
    return text if found[3] else text.rstrip()


def _filled(conversation: list[Message], texts: Sequence[str]) -> list[Message]:
    """A conversation of stand-ins with the texts in their places."""

    def fill(content: str) -> str:
        return STAND_IN.sub(lambda found: texts[int(found[2])], content)

    def part(x: Message) -> Message:
        return {**x, **_text(fill(x["text"]))} if "text" in x else x

    return [
        {**x, "content": fill(x["content"]) if isinstance(x["content"], str) else [*map(part, x["content"])]}
        for x in conversation
    ]


def _pattern(x: Demonstration) -> tuple[str, ...]:
    """The user's turn: images and texts as they come, images first if the text has no places for them.

    Raises ValueError: there are not as many places as images.
    """
    pieces = text_pieces(x.text)
    if len(pieces) == 1:
        return (*["image"] * len(x.images), *["text"] * (x.text != "" or not x.images))
    if len(pieces) != len(x.images) + 1:
        raise ValueError(
            f"text {x.text!r:.80} has {{image}} {len(pieces) - 1} times, expected never or once for each of "
            f"its {len(x.images)} images"
        )
    parts: list[str] = []
    for i, piece in enumerate(pieces):
        parts += [*["image"] * (i > 0), *["text"] * (piece != "")]
    return tuple(parts)


def _conversation(patterns: Sequence[tuple[str, ...]], instruction: str, listed: bool) -> list[Message]:
    """Turns of stand-ins, numbered in order."""
    number = 0

    def text() -> dict[str, str]:
        nonlocal number
        number += 1
        return _text(f"\t\ue000{number - 1}\ue001\t")

    messages: list[Message] = []
    if instruction:
        messages.append({"role": "system", "content": [_text(instruction)] if listed else instruction})
    for pattern in patterns:
        content = [text() if part == "text" else {"type": "image"} for part in pattern]
        messages.append({"role": "user", "content": content})
        answer = text()
        messages.append({"role": "assistant", "content": [answer] if listed else answer["text"]})
    return messages


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text, "content": text}  # Pixtral's reads "content"


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
