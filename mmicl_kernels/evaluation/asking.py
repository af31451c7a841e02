"""A model that is asked queries after demonstrations, which are written out or fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmicl_kernels.data import Demonstration
from mmicl_kernels.evaluation.generation import Generation, YesNo, generate
from mmicl_kernels.integration import Handle, PromptBuilder
from mmicl_kernels.integration.prompts import builder_of
from mmicl_kernels.library import DemonstrationBank
from mmicl_kernels.library.bank_files import DTYPES
from mmicl_kernels.methods import AIMAdapter


@dataclass(frozen=True)
class Asked:
    """What a batch was answered.

    Attributes:
        texts: without special tokens, as they were generated.
        prompt_tokens, image_tokens: of each prompt without padding, and those among them that are images'.
        seconds: that ``generate`` took. first_seconds: until the first tokens. yes: as of ``Answers``.
    """

    texts: list[str]
    prompt_tokens: list[int]
    image_tokens: list[int]
    seconds: float
    first_seconds: float
    yes: list[float] | None


class Asker:
    """Asks ``model``, as it is attached now.

    Args:
        handle, fuse: with both, demonstrations become fused tokens of the adapter ``fuse``, which is attached
            with a bank. What the bank lacks is added.
    """

    def __init__(
        self,
        model: nn.Module,
        builder: PromptBuilder,
        handle: Handle | None = None,
        fuse: AIMAdapter | None = None,
    ) -> None:
        self.model, self.builder, self.handle = model, builder, handle
        self._fusing = None if fuse is None else fusing_builder(builder, fuse)

    def __call__(
        self,
        queries: Sequence[Demonstration],
        shots: Sequence[Sequence[Demonstration]],
        settings: Generation,
        yes_no: YesNo | None = None,
    ) -> Asked:
        """Each query after its own ``shots``. Its answer is not looked at.

        Raises ValueError, TypeError: as ``PromptBuilder.prompt``, or an image cannot be decoded.
        """
        # The answer is not part of the prompt, and it may be unknown, or nothing that a prompt could have.
        queries = [replace(x, answer="answer") for x in queries]
        tokenizer = self.builder.processor.tokenizer
        try:
            inputs = self._inputs(queries, shots)
            options = {"end_ids": self.builder.end_ids, "yes_no": yes_no}
            made = generate(self.model, inputs, settings, tokenizer, **options)
        finally:
            if self._fusing is not None:
                self.handle.unsplice()
        own = inputs["attention_mask"].bool()
        images = self.builder.image_tokens(inputs["input_ids"]) & own
        as_they_are = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return Asked(
            tokenizer.batch_decode(made.tokens, **as_they_are),
            own.sum(-1).tolist(),
            images.sum(-1).tolist(),
            made.seconds,
            made.first_seconds,
            None if made.yes is None else made.yes.tolist(),
        )

    def _inputs(
        self, queries: Sequence[Demonstration], shots: Sequence[Sequence[Demonstration]]
    ) -> dict[str, Tensor]:
        if self._fusing is None:
            return self.builder.prompt(queries, shots)
        flat = [x for row in shots for x in row]
        collate = self._fusing.demonstrations
        ids = iter(self.handle.add_demonstrations(flat, collate, batch_size=len(queries), progress=False))
        return self.handle.splice(self._fusing.prompt(queries), [[next(ids) for _ in row] for row in shots])


def fusing_builder(builder: PromptBuilder, adapter: AIMAdapter) -> PromptBuilder:
    """The same prompts, with those tokens pointed out that ``adapter`` fuses."""
    return builder_of(builder, answer_only=adapter.config.positions == "answer", dtype=builder.dtype)


def bank_of(
    folder: Path, adapter: AIMAdapter, builder: PromptBuilder, dtype: torch.dtype
) -> DemonstrationBank:
    """The bank in ``folder``, made if there is none, with rows of ``dtype`` where a bank may have it.

    Raises ValueError: its demonstrations became prompts in another way than those of ``builder``.
    """
    prompt = fusing_builder(builder, adapter).description
    try:
        bank = DemonstrationBank(folder)
    except FileNotFoundError:
        dtype = dtype if dtype in DTYPES.values() else torch.float32
        return DemonstrationBank.create(folder, adapter, dtype, prompt)
    if bank.prompt not in ("", prompt):
        raise ValueError(f"prompts are made by {prompt}, expected {bank.prompt} as the bank {folder} has")
    return bank
