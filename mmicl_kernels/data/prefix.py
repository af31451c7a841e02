"""Demonstrations that all queries of a batch share: the teacher reads them once, and keeps their keys."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmicl_kernels.data.batch import Check, prompt_shape
from mmicl_kernels.data.episodes import EpisodeBatch, align
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.data.records import Demonstration


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
