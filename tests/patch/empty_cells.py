"""Cells of the support matrix that are empty, and why. ``test_support_matrix.py`` shows every one."""

from dataclasses import dataclass

import transformers

VERSION = "5.17" if transformers.__version__.startswith("5.17.") else "5.23"

# GPT-OSS has no sdpa, for its sinks. PaliGemma 2's attention caps its scores, which sdpa cannot: 5.23 raises,
# 5.17 forgets the cap.
NEEDS_EAGER = ("gpt_oss", "paligemma2")

# The method cannot apply, and creating an adapter says so.
REFUSED = {("gemma4", "aim"): "every layer looks up an embedding of its own by the placeholder's id"}


@dataclass(frozen=True)
class Failure:
    """The unpatched model fails at the same call: it raises ``error``, or if that is None is wrong."""

    reason: str
    error: type[Exception] | None = None
    message: str = ""


UNPATCHED_FAILS = {
    "5.17": {
        ("gemma4-moe", "static cache"): Failure("the prefill reads images from left to right"),
        ("idefics", "beams"): Failure(
            "its logits have more columns than its vocabulary size", RuntimeError, "is invalid for input"
        ),
        ("llama4", "static cache"): Failure("its mask has no such argument", TypeError, "block_sequence_ids"),
        ("mllama", "static cache"): Failure("writes beyond the cache", RuntimeError, "must match the size"),
        ("paligemma2", "static cache"): Failure("its mask is a dict", AttributeError, "ndim"),
    },
    "5.23": {
        ("llama4", "beams"): Failure("counts images once for all beams", ValueError, "do not match"),
        ("paligemma2", "static cache"): Failure("its mask is a dict", AttributeError, "ndim"),
    },
}[VERSION]
