"""How a model's own prompts write images: the tokens around them, their numbers, where they may stand."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Processors that write by themselves, in place of a bare image token, all that their models have around an
# image. Without a chat template the others' prompts are not known.
BARE = {
    "AyaVisionProcessor": "writes <|START_OF_IMG|>, the tiles' tokens and <|END_OF_IMG|>",
    "ChameleonProcessor": "writes the begin and the end of an image",
    "Cohere2VisionProcessor": "writes the begin and the end of an image",
    "DeepseekVLHybridProcessor": "the model has nothing around an image's tokens",
    "DeepseekVLProcessor": "the model has nothing around an image's tokens",
    "Emu3Processor": "writes the begin, the size and the end of an image",
    "Gemma3Processor": "writes <start_of_image>, <end_of_image> and the empty lines around them",
    "Gemma3nProcessor": "writes <start_of_image>, <end_of_image> and the empty lines around them",
    "Gemma4Processor": "writes the begin and the end of an image",
    "IdeficsProcessor": "writes <fake_token_around_image>",
    "Idefics2Processor": "writes <fake_token_around_image>",
    "Idefics3Processor": "writes <fake_token_around_image> and the tokens of rows and columns",
    "InternVLProcessor": "writes <img> and </img>",
    "JanusProcessor": "writes <begin_of_image> and <end_of_image>",
    "Lfm2VlProcessor": "writes <|image_start|>, <|image_end|> and the tiles' tokens",
    "Llama4Processor": "writes <|image_start|>, <|image_end|> and the tiles' tokens",
    "LlavaNextProcessor": "the model has nothing around an image's tokens",
    "LlavaNextVideoProcessor": "the model has nothing around an image's tokens",
    "LlavaOnevisionProcessor": "the model has nothing around an image's tokens",
    "LlavaProcessor": "the model has nothing around an image's tokens",
    "MllamaProcessor": "the model has nothing around <|image|>, which is one token",
    "Ovis2Processor": "writes <IMG_START>, <IMG_END> and the tiles' tokens",
    "PaliGemmaProcessor": "writes <bos> after the images",
    "Phi4MultimodalProcessor": "the model has nothing around an image's tokens",
    "PixtralProcessor": "writes [IMG_BREAK] and [IMG_END]",
    "SmolVLMProcessor": "writes <fake_token_around_image> and the tokens of rows and columns",
    "VideoLlavaProcessor": "the model has nothing around an image's tokens",
}
IMAGES_FIRST = ("PaliGemmaProcessor",)  # its model saw images before all text, with <bos> between

# What else stands around an image token where a checkpoint's chat template is missing: shown, not assumed.
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = "<|begin_of_image|><|image|><|end_of_image|>"
USUAL = {
    "AriaProcessor": "<fim_prefix><|img|><fim_suffix>",
    "Glm46VProcessor": GLM,
    "Glm4vProcessor": GLM,
    "Qwen2VLProcessor": VISION,
    "Qwen2_5OmniProcessor": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "Qwen2_5_VLProcessor": VISION,
    "Qwen3VLProcessor": VISION,
}

TEXT = re.compile("\ue000(\\d+)\ue001")  # stands for a piece of text where a chat template is rendered


def image_markers(
    processor: ProcessorMixin, token: str, marker: str | None = None
) -> FixedMarkers | TemplateMarkers:
    """``marker`` for each image, if given, else as the chat template has it, else ``token`` if that is all.

    Raises:
        TypeError: ``marker`` is no string. ValueError: it has not ``token`` exactly once; or none is given
            and what the model has around an image is not known.
    """
    name = type(processor).__name__
    if marker is not None:
        if not isinstance(marker, str):
            raise TypeError(f"image_marker is a {type(marker).__name__}, expected a string")
        if marker.count(token) != 1:
            raise ValueError(
                f"image_marker is {marker!r}, expected the image token {token!r} of {name} exactly once in it"
            )
        return FixedMarkers(marker)
    names = [cls.__name__ for cls in type(processor).__mro__]
    try:
        return TemplateMarkers(processor, token)
    except NoMarkers as error:
        if any(name in BARE for name in names):
            return FixedMarkers(token, images_first=any(name in IMAGES_FIRST for name in names))
        usual = next((USUAL[name] for name in names if name in USUAL), f"...{token}...")
        raise ValueError(
            f"what {name} has around its image token {token!r} is not known: {error}. Expected image_marker="
            f"{usual!r}" + (", as the model was trained" if "..." in usual else "")
        ) from error


class NoMarkers(ValueError):
    """Why a processor's chat template does not say how images are written."""


class FixedMarkers:
    """The same marker for each image; ``{number}`` in it counts them from 1."""

    def __init__(self, marker: str, *, images_first: bool = False) -> None:
        self._marker, self.images_first = marker, images_first

    def write(self, pieces: Sequence[str], text_first: bool) -> str:
        """The prompt in which one image stands between each piece and the next.

        Args:
            text_first: whether the first piece has words of the user's turn, rather than only what begins it.

        Raises:
            ValueError: the model's own prompts do not have images in such places.
        """
        if self.images_first and any(pieces[:-1]):
            raise ValueError("this model has images before all text, expected {image} first in the prompt")
        text = pieces[0]
        for number, piece in enumerate(pieces[1:], 1):
            text += self._marker.replace("{number}", str(number)) + piece
        return text


class TemplateMarkers:
    """As the processor's chat template writes a user's turn of images and texts.

    The turn is rendered with stand-ins for the texts, and what is between them is kept. White space at which
    two parts meet is written once: a format string may have the line break that the template has, too.

    Raises:
        NoMarkers: there is no template, or it does not write images by their token.
    """

    images_first = False

    def __init__(self, processor: ProcessorMixin, token: str) -> None:
        self._processor, self._token = processor, token
        self._glues: dict[tuple[bool, ...], list[str]] = {}
        one, two = (self._rendered([False] * n)[0] for n in (1, 2))
        if two.count(token) != 2:
            raise NoMarkers("its chat template has all images after the text")
        between = self._rendered([True])[0]  # of a turn that begins with text, if images may follow text
        if token in between:
            between = self._rendered([])[0]
        self._head = os.path.commonprefix([one, two, between])
        before, gap, _ = two[len(self._head) :].split(token)
        if not _uncounted(gap).endswith(_uncounted(before)):
            raise NoMarkers(f"its chat template begins a turn with {before!r} only if that has images")
        self._example = one[len(self._head) :]

    def write(self, pieces: Sequence[str], text_first: bool) -> str:
        """As :meth:`FixedMarkers.write`."""
        if len(pieces) == 1:
            return pieces[0]
        pattern = (text_first, *(piece != "" for piece in pieces[1:-1]))
        if pattern not in self._glues:
            self._glues[pattern] = self._glue(pattern)
        words = [pieces[0], *(piece for piece in pieces[1:-1] if piece), pieces[-1]]
        text = words[0]
        for glue, word in zip(self._glues[pattern], words[1:], strict=True):
            text = _joined(_joined(text, glue), word)
        return text

    def _glue(self, pattern: Sequence[bool]) -> list[str]:
        """What is written between the texts of a turn, the images among it.

        An item of ``pattern`` is an image, with or without text before it; text also ends the turn.
        """
        head, *between = self._rendered(pattern)
        if not pattern[0]:
            between.insert(0, head[len(self._head) :])
        expected = [1]
        for has_text in pattern[1:]:
            if has_text:
                expected.append(1)
            else:
                expected[-1] += 1
        found = [part.count(self._token) for part in between]
        if found != expected or (not pattern[0] and not head.startswith(self._head)):
            raise ValueError(
                f"the chat template of {type(self._processor).__name__} has its images elsewhere than where "
                f"{{image}} stands in the text; expected it first, or image_marker={self._example!r} to have "
                "images where the model's own prompts have none"
            )
        return between

    def _rendered(self, pattern: Sequence[bool]) -> list[str]:
        """What the template writes before each text of such a turn."""
        content: list[dict[str, str]] = []
        for has_text in (*pattern, None):
            if has_text is None or has_text:
                text = f"\ue000{len(content)}\ue001"
                content.append({"type": "text", "text": text, "content": text})  # Pixtral's reads "content"
            if has_text is not None:
                content.append({"type": "image"})
        texts = [item["text"] for item in content if item["type"] == "text"]
        parts = TEXT.split(self._render(content))
        order = [f"\ue000{number}\ue001" for number in parts[1::2]]
        images = "".join(parts[::2]).count(self._token)
        if order != texts or images != len(pattern):
            raise NoMarkers(
                f"its chat template writes {images} of {len(pattern)} images and {len(order)} of "
                f"{len(texts)} texts of a turn"
            )
        return parts[:-1:2]

    def _render(self, content: list[dict[str, str]]) -> str:
        conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
        processor = self._processor
        writer = processor if getattr(processor, "chat_template", None) else processor.tokenizer
        if not getattr(writer, "chat_template", None):
            raise NoMarkers("it has no chat template")
        try:
            return writer.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise NoMarkers(f"its chat template refuses a turn with images: {error}") from error


def _uncounted(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def _joined(first: str, second: str) -> str:
    """Both, with white space that ends the one and begins the other written once."""
    ends = first[len(first.rstrip()) :]
    begins = second[: len(second) - len(second.lstrip())]
    common = max(n for n in range(len(begins) + 1) if ends.endswith(begins[:n]))
    return first + second[common:]
