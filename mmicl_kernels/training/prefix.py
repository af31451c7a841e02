"""Demonstrations that all queries of a batch share: the teacher reads them once, and keeps their keys."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmicl_kernels.integration.prompts import PromptBuilder
from mmicl_kernels.library import Demonstration
from mmicl_kernels.training.alignment import align
from mmicl_kernels.training.answers import answer_logits
from mmicl_kernels.training.batch import Check, prompt_shape
from mmicl_kernels.training.episodes import EpisodeBatch

# By `config.model_type`: those whose prompts are causal, whose positions count tokens, and whose processors
# make of an image what they make of it among others. Each is tested.
FAMILIES = frozenset({"idefics2", "idefics3", "internvl", "llava"})


@dataclass(frozen=True)
class PrefixedBatch(EpisodeBatch):
    """Queries that all come after the same demonstrations.

    Attributes:
        prefix: inputs ``[1, P]``: what stands before the queries, with an ``attention_mask``. ``teacher``,
            padded on the right, is what follows it.

    Raises:
        TypeError, ValueError: as :class:`EpisodeBatch`, or ``prefix`` has other than one row.
    """

    prefix: dict[str, Tensor]

    def _checks(self) -> list[Check]:
        rows, _ = prompt_shape("prefix", self.prefix)
        if rows != 1:
            raise ValueError(f"prefix has {rows} rows, expected 1")
        for name, inputs in (("prefix", self.prefix), ("teacher", self.teacher)):
            if "attention_mask" not in inputs:
                raise ValueError(f"{name} has {sorted(inputs)}, expected an attention_mask")
        return super()._checks()


def prefixed_batch(
    builder: PromptBuilder, queries: Sequence[Demonstration], shots: Sequence[Demonstration]
) -> PrefixedBatch:
    """Each of ``queries`` with its answer, alone and after ``shots``, which are there once.

    Raises:
        TypeError, ValueError: as ``PromptBuilder.answered_after`` and :func:`align`.
    """
    none: list[tuple[Demonstration, ...]] = [()] * len(queries)
    student = builder.answered(queries, none, instructed=builder.instructs_students)
    prefix, teacher = builder.answered_after(queries, shots)
    masks = align(student, teacher, builder)
    return PrefixedBatch(student.inputs, teacher.inputs, *masks, student.labels, prefix=prefix)


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache of the model's keys and values.

    Raises:
        ValueError: the model's family is none of ``FAMILIES``, or it has layers that do not keep all of them.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"shared_shots is True and the model a {kind}, expected one of {', '.join(sorted(FAMILIES))}"
        )
    cache = DynamicCache(config=model.config)
    others = sorted({type(x).__name__ for x in cache.layers} - {DynamicLayer.__name__})
    if others or not cache.layers:
        raise ValueError(
            f"shared_shots is True and the model's cache has {others or 'no layers'}, expected layers of "
            "full attention alone"
        )
    return cache


@torch.no_grad()
def after_prefix(model: nn.Module, batch: EpisodeBatch, inputs: dict[str, Tensor]) -> dict[str, object]:
    """``inputs`` of a teacher's pass; with the keys and values of the batch's prefix, if it has one.

    Raises as :func:`new_cache`.
    """
    if not isinstance(batch, PrefixedBatch):
        return inputs
    cache, mask = new_cache(model), inputs["attention_mask"]
    last = torch.zeros_like(batch.prefix["input_ids"], dtype=torch.bool)
    last[0, -1] = True  # the language head, whose logits nobody reads, gets one row
    answer_logits(model, {**batch.prefix, "past_key_values": cache, "use_cache": True}, last)
    cache.batch_repeat_interleave(len(mask))
    before = batch.prefix["attention_mask"].expand(len(mask), -1)
    return {
        **inputs,
        "attention_mask": torch.cat([before, mask], 1),
        "past_key_values": cache,
        "use_cache": True,
    }
