"""Batches of queries asked twice: without demonstrations and after some."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class EpisodeBatch:
    """The same queries asked twice: without demonstrations (student) and after some (teacher).

    Attributes:
        student, teacher: inputs of ``model(**inputs)``.
        student_query, teacher_query: bool ``[B, T]`` of each prompt, the query's own tokens. Per row
            they count the same tokens in the same order, whose states are compared one to one.
        labels: int64 ``[B, T]`` of the student's prompt, -100 where no answer token is predicted.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_query: Tensor
    teacher_query: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_same_tokens(self.student_query, self.teacher_query)


def check_same_tokens(student_query: Tensor, teacher_query: Tensor) -> None:
    """Raise ValueError unless both, ``[B, T]`` of their prompts, mark as many tokens in every row."""
    mine, theirs = student_query.sum(-1), teacher_query.sum(-1)
    if not torch.equal(mine, theirs):
        raise ValueError(
            f"teacher_query marks {theirs.tolist()} tokens per row, expected {mine.tolist()} "
            "as student_query does"
        )
