"""The literal prompts of the official code, as data.

MimIC's are what its testbed's templates write (Kamichanw/MimIC f3b2f6d, ``testbed/models``, with the turns of
``testbed/data``) and how ``src/shift_model.py`` joins them; LIVE's what its prompt manager and data set join
(ForJadeForest/LICV-VQA 63441bd, ``config/prompt``). A demonstration without a text is a caption's.
"""

from __future__ import annotations

from dataclasses import dataclass

VQA = "Provide an answer to the question. Use the image to answer."


@dataclass(frozen=True)
class Preset:
    """Format strings of a demonstration and of the query, which official code does not write alike.

    Attributes:
        shot, query: with ``{image}``, ``{text}`` and, last, ``{answer}``. What follows the query's answer
            stands before the end of text. Without ``query`` it is written like a demonstration, as far as
            its answer.
        instruction: what a prompt begins with. A student without demonstrations is trained without it.
        separated: whether a padding token that is not attended to stands before the query, if anything does,
            and before its answer.
    """

    shot: str
    query: str | None = None
    instruction: str = ""
    separated: bool = False


_LLAVA_IMAGE = "<|im_start|>image\n{image}<|im_end|>\n"
_LLAVA_QUESTION = _LLAVA_IMAGE + "<|im_start|>question\n\n{text}<|im_end|>\n"

PRESETS = {
    "live": Preset(
        "{image}Question:{text} Short answer:{answer}.\n\n",
        "{image}Question:{text} Short answer:{answer}.",
        f"{VQA}\n",
    ),
    "mimic-idefics": Preset(
        "Image:{image} Question: {text} Answer: {answer}\n",
        "Image:{image} Question: {text} Answer:{answer}",
        f"Instruction: {VQA}\n",
        separated=True,
    ),
    "mimic-idefics-caption": Preset(
        "Image:{image} Caption: {answer}\n", "Image:{image} Caption:{answer}", separated=True
    ),
    # The token's name is spelled as there, so it is no token of the model's.
    "mimic-idefics2": Preset(
        "Image:{image}<end_of_outterance>\nQuestion: {text}<end_of_outterance>\n"
        "Answer: {answer}<end_of_outterance>\n",
        "Image:{image}<end_of_outterance>\nQuestion: {text}<end_of_outterance>\nAnswer:{answer}",
        f"Instruction: {VQA}<end_of_outterance>\n",
        separated=True,
    ),
    "mimic-idefics2-caption": Preset(
        "Image:{image}<end_of_outterance>\nCaption: {answer}<end_of_outterance>\n",
        "Image:{image}<end_of_outterance>\nCaption:{answer}",
        separated=True,
    ),
    # LLaVA-interleave's. Demonstrations begin their answers with one more line break than the query.
    "mimic-llava": Preset(
        _LLAVA_QUESTION + "<|im_start|>answer\n\n{answer}<|im_end|>\n",
        _LLAVA_QUESTION + "<|im_start|>answer\n{answer}",
        f"<|im_start|>instruction\n{VQA}<|im_end|>\n",
        separated=True,
    ),
    "mimic-llava-caption": Preset(
        _LLAVA_IMAGE + "<|im_start|>caption\n\n{answer}<|im_end|>\n",
        _LLAVA_IMAGE + "<|im_start|>caption\n{answer}",
        separated=True,
    ),
}
