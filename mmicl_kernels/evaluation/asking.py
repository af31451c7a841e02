"""A model that is asked queries after demonstrations, which are written out or fused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.batch import IGNORE
from mmicl_kernels.data.decoding import decode_image
from mmicl_kernels.data.episodes import episode_batch
from mmicl_kernels.data.prompts.builder import PromptBuilder, builder_of
from mmicl_kernels.data.prompts.tokens import special_tokens
from mmicl_kernels.data.shots import RandomShots, demonstration_of, generator_of
from mmicl_kernels.evaluation.generation import Generation, YesNo, generate
from mmicl_kernels.evaluation.metrics.postprocess import ends_answers
from mmicl_kernels.evaluation.systems import trained_prompt
from mmicl_kernels.methods import Adapter
from mmicl_kernels.patch import Handle, attach, load
from mmicl_kernels.store import DemonstrationBank
from mmicl_kernels.store.bank_files import DTYPES


@dataclass(frozen=True)
class Asked:
    """What a batch was answered.

    Attributes:
        texts: without special tokens, as they were generated up to the first one that the prompts have: of
            an image, or of another turn, which after demonstrations begin a next one. A greedy one is no
            longer than up to what the template has after an answer.
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
    """Asks ``model``, as it is attached now by ``handle``.

    Of an adapter that fuses them, demonstrations become tokens; it is attached with a bank, to which what it
    lacks is added.
    """

    def __init__(
        self,
        model: nn.Module,
        builder: PromptBuilder,
        handle: Handle | None = None,
    ) -> None:
        self.model, self.builder, self.handle = model, builder, handle
        adapter = None if handle is None else handle.single
        self._splices = adapter is not None and adapter.embedding_site is not None
        self._fusing = fusing_builder(builder, adapter) if self._splices and adapter.fuses else None
        # What has slots in a prompt learned those of the query, and is to leave demonstrations alone.
        self._marks_queries = adapter is not None and any(x.readout for x in adapter.residual_sites)

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
        with ExitStack() as asking:
            if self._splices:
                asking.callback(self.handle.unsplice)
            inputs = self._inputs(queries, shots)
            if self._marks_queries and any(map(len, shots)):
                asking.enter_context(self.handle.tokens(self._own_tokens(queries, shots, inputs)))
            options = {"end_ids": self.builder.end_ids, "yes_no": yes_no}
            # Not at what a metric cuts at, so that another metric may have the same answers.
            ending = self.builder.ending  # made anew whenever it is asked for
            is_over = partial(self._has, ending) if ends_answers(ending) else None
            made = generate(self.model, inputs, settings, tokenizer, is_over=is_over, **options)
        own = inputs["attention_mask"].bool()
        images = self.builder.image_tokens(inputs["input_ids"]) & own
        special = set(special_tokens(tokenizer)[1])
        answers = []
        for ids, shown, answer in zip(inputs["input_ids"], own, made.tokens.tolist(), strict=True):
            ends = special.intersection(ids[shown].tolist())
            answers.append(list(takewhile(lambda id, ends=ends: id not in ends, answer)))
        return Asked(
            [*map(self._text, answers)],
            own.sum(-1).tolist(),
            images.sum(-1).tolist(),
            made.seconds,
            made.first_seconds,
            None if made.yes is None else made.yes.tolist(),
        )

    def _text(self, ids: list[int]) -> str:
        tokenizer = self.builder.processor.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _has(self, ending: str, ids: list[int]) -> bool:
        """Whether a template's demonstration would be over here."""
        return ending in self._text(ids)

    def _inputs(
        self, queries: Sequence[Demonstration], shots: Sequence[Sequence[Demonstration]]
    ) -> dict[str, Tensor]:
        if self._fusing is None:
            inputs = self.builder.prompt(queries, shots)
            return self.handle.splice(inputs) if self._splices else inputs
        flat = [x for row in shots for x in row]
        collate = self._fusing.demonstrations
        ids = iter(self.handle.add_demonstrations(flat, collate, batch_size=len(queries), progress=False))
        return self.handle.splice(self._fusing.prompt(queries), [[next(ids) for _ in row] for row in shots])

    def _own_tokens(
        self,
        queries: Sequence[Demonstration],
        shots: Sequence[Sequence[Demonstration]],
        inputs: dict[str, Tensor],
    ) -> Tensor:
        """The queries' tokens in prompts with demonstrations, as in training: bool like ``input_ids``."""
        batch = episode_batch(self.builder, queries, shots)
        asked = (batch.labels != IGNORE).cumsum(-1) == 0
        counts = (batch.student_query & asked).sum(-1, keepdim=True)
        own = inputs["attention_mask"].bool()
        return own & (own.flip(-1).cumsum(-1).flip(-1) <= counts)


class OtherImages:
    """Draws ``shots`` of ``examples`` for queries that may be of the same data under other names.

    None of them shows just what the query does, whatever its file or its text are.
    """

    def __init__(self, examples: Sequence[Any], shots: int, seed: int) -> None:
        self._pool, self._shots, self._seed = [_Shown(x) for x in examples], shots, seed

    def __call__(self, query: Demonstration) -> list[Demonstration]:
        """Raises ValueError: there are too few."""
        shown = _Shown(query)
        drawn = RandomShots()(self._pool, shown, self._shots, generator_of(shown, seed=self._seed))
        return [self._pool[i].demonstration() for i in drawn]


class _Shown:
    """An example with the digest of its images' pixels as id, or of its text if it has none."""

    def __init__(self, example: Any) -> None:
        self._example = example

    def demonstration(self) -> Demonstration:
        return demonstration_of(self._example)

    @property
    def id(self) -> str:
        x = self.demonstration()
        shown = [decode_image(data, f"image of {x.text!r:.40}").tobytes() for data in x.images]
        return hashlib.sha256(b"".join(shown) or x.text.encode()).hexdigest()


def asker_of(
    model: nn.Module,
    processor: ProcessorMixin | PromptBuilder,
    adapter: str | os.PathLike | None,
    bank: Path,
) -> Asker:
    """What asks ``model`` with the adapter of a folder, which stays attached; ``bank`` is a folder for AIM.

    Raises: as :func:`prompt_builder`, ``load``, ``attach`` and :func:`bank_of`.
    """
    if adapter is None:
        return Asker(model, prompt_builder(processor, {}, model))
    loaded = load(adapter, model)
    builder = prompt_builder(processor, {"adapter": loaded}, model)
    if not loaded.fuses:
        return Asker(model, builder, attach(model, loaded))
    opened = bank_of(bank, loaded, builder, model.dtype)
    return Asker(model, builder, attach(model, loaded, bank=opened))


def prompt_builder(
    processor: ProcessorMixin | PromptBuilder, adapters: Mapping[str, Adapter], model: nn.Module
) -> PromptBuilder:
    """Of prompts as a builder writes them; else as those that loaded adapters were trained on; else as
    :func:`builder_of`. For the model's device and dtype.

    Raises ValueError: as :func:`trained_prompt`.
    """
    if not isinstance(processor, PromptBuilder):
        folders = {name: x.source for name, x in adapters.items() if x.source is not None}
        prompt = trained_prompt(folders)
        processor = processor if prompt is None else PromptBuilder(processor, **prompt)
    builder = builder_of(processor, dtype=model.dtype)
    builder.device = model.get_input_embeddings().weight.device
    return builder


def fusing_builder(builder: PromptBuilder, adapter: Adapter) -> PromptBuilder:
    """The same prompts, with those tokens pointed out that ``adapter`` fuses."""
    return builder_of(builder, positions=adapter.embedding_site.positions, dtype=builder.dtype)


def bank_of(folder: Path, adapter: Adapter, builder: PromptBuilder, dtype: torch.dtype) -> DemonstrationBank:
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
