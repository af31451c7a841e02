"""Batches of queries asked twice: without demonstrations and after some."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.training.batch import Batch, Check, check_form, label_checks, prompt_shape, raise_first

NONE = -1  # an id that no token has


@dataclass(frozen=True)
class EpisodeBatch(Batch):
    """The same queries asked twice: without demonstrations (student) and after some (teacher).

    Attributes:
        student, teacher: inputs of ``model(**inputs)``.
        student_query, teacher_query: bool ``[B, T]`` of each prompt, the query's own tokens. Per row
            they are the same tokens in the same order, whose states are compared one to one.
        labels: int64 ``[B, T]`` of the student's prompt: its ids, -100 where no answer token is predicted.

    Raises:
        TypeError, ValueError: another dtype or shape; a query's mask marks padding, or other tokens than the
        student's (of prompts given as ``inputs_embeds`` alone only their number is compared); a label is not
        the student's id. Reading this synchronises once.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_query: Tensor
    teacher_query: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        raise_first(self._checks())

    def _checks(self) -> list[Check]:
        check_form("student_query", self.student_query, torch.bool, prompt_shape("student", self.student))
        return [
            (~self.student_query.any(), lambda: "student_query marks no token, expected at least one"),
            _marks_padding("student_query", self.student_query, self.student),
            *self._same_query("teacher", self.teacher, "teacher_query", self.teacher_query),
            *label_checks(self.labels, "student", self.student),
        ]

    def _same_query(self, who: str, teacher: dict[str, Tensor], what: str, query: Tensor) -> list[Check]:
        """``query`` marks the tokens of ``teacher`` that ``student_query`` marks of the student."""
        check_form(what, query, torch.bool, prompt_shape(who, teacher))
        mine, theirs = self.student_query, query.to(self.student_query.device)
        if len(theirs) != len(mine):
            raise ValueError(f"{what} has {len(theirs)} rows, expected {len(mine)} like student_query")
        counts = mine.sum(-1), theirs.sum(-1)

        def other_counts() -> str:
            return (
                f"{what} marks {counts[1].tolist()} tokens per row, expected {counts[0].tolist()} "
                "as student_query does"
            )

        checks = [_marks_padding(what, query, teacher), ((counts[0] != counts[1]).any(), other_counts)]
        if "input_ids" in self.student and "input_ids" in teacher:
            checks.append(_other_tokens(what, self.student["input_ids"], mine, teacher["input_ids"], theirs))
        return checks


@dataclass(frozen=True)
class ManyShotBatch(EpisodeBatch):
    """More demonstrations than one prompt holds, split over teacher passes [ours].

    Attributes:
        further: the passes beside ``teacher``: each one's inputs and its ``teacher_query``. The target is
            the mean of all passes' probabilities.
    """

    further: tuple[tuple[dict[str, Tensor], Tensor], ...] = ()

    def _checks(self) -> list[Check]:
        checks = super()._checks()
        for i, (teacher, query) in enumerate(self.further):
            checks += self._same_query(f"further[{i}]", teacher, f"further[{i}]: teacher_query", query)
        return checks


def _marks_padding(what: str, query: Tensor, inputs: Mapping[str, Tensor]) -> Check:
    mask = inputs.get("attention_mask")
    known = isinstance(mask, Tensor) and mask.dim() == 2
    padding = (query & (mask == 0).to(query.device) if known else query & False).sum(-1)
    return (
        padding.any(),
        lambda: f"{what} marks {padding.tolist()} tokens per row that attention_mask hides, expected 0",
    )


def _other_tokens(what: str, ids: Tensor, query: Tensor, other_ids: Tensor, other_query: Tensor) -> Check:
    """Whether the tokens that the masks mark differ; both masks must mark as many for the complaint."""
    mine, theirs = _packed(ids, query), _packed(other_ids.to(ids.device), other_query)
    width = max(mine.shape[1], theirs.shape[1])
    mine, theirs = (F.pad(x, (0, width - x.shape[1]), value=NONE) for x in (mine, theirs))

    def complaint() -> str:
        row, k = (mine != theirs).nonzero()[0].tolist()
        here, there = (int(x[row].nonzero()[k]) for x in (query, other_query))
        return (
            f"{what} marks id {int(theirs[row, k])} as token {k} of row {row}, at position {there}, "
            f"expected id {int(mine[row, k])} as student_query does at position {here}: the same tokens in "
            "the same order (has one merged with the text before it?)"
        )

    return (mine != theirs).any(), complaint


def _packed(ids: Tensor, query: Tensor) -> Tensor:
    """The ids ``[B, T]`` that ``query`` marks, at the beginning of their rows; the host counts nothing."""
    query = query.to(ids.device)
    order = (~query).int().argsort(dim=-1, stable=True)
    return ids.masked_fill(~query, NONE).gather(1, order)
