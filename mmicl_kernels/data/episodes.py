"""Queries asked twice, without demonstrations and after some, and which tokens of both are the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.data.batch import IGNORE, Batch, Check, check_form, label_checks, prompt_shape, raise_first
from mmicl_kernels.data.prompts.builder import AnsweredPrompts, PromptBuilder
from mmicl_kernels.data.records import Demonstration
from mmicl_kernels.data.sampling import split_shots

NONE = -1  # an id that no token has
SHOWN = 40  # tokens of each prompt in a message


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


def episode_batch(
    builder: PromptBuilder,
    queries: Sequence[Demonstration],
    shots: Sequence[Sequence[Demonstration]],
    *,
    shots_per_pass: int | None = None,
    padding_side: str = "right",
) -> EpisodeBatch:
    """Each of ``queries`` with its answer, alone and after its demonstrations ``shots``.

    With ``shots_per_pass`` it is a ``ManyShotBatch``: no prompt of the teacher has more demonstrations, and
    all of them see the query. A preset of official code instructs the teacher alone, as that does.

    Raises:
        TypeError, ValueError: as ``PromptBuilder.answered`` and :func:`align`; ``shots_per_pass`` is not
        positive; with it, rows of ``shots`` that differ in length.
    """
    options = {"padding_side": padding_side}
    none: list[tuple[Demonstration, ...]] = [()] * len(queries)
    student = builder.answered(queries, none, instructed=builder.instructs_students, **options)
    passes = [list(shots)] if shots_per_pass is None else _passes(shots, shots_per_pass)
    teachers = [builder.answered(queries, rows, **options) for rows in passes]
    aligned = [align(student, teacher, builder) for teacher in teachers]
    first = (student.inputs, teachers[0].inputs, *aligned[0], student.labels)
    if shots_per_pass is None:
        return EpisodeBatch(*first)
    further = [(made.inputs, query) for made, (_, query) in zip(teachers[1:], aligned[1:], strict=True)]
    return ManyShotBatch(*first, further=tuple(further))


def align(
    student: AnsweredPrompts, teacher: AnsweredPrompts, builder: PromptBuilder
) -> tuple[Tensor, Tensor]:
    """The query's tokens in both prompts, bool ``[B, T]`` of each.

    They are the end that the ids of both have in common, without padding, as far as the student's head,
    which is never among them: it has other attention there, that of a prompt's first tokens. The query's
    first tokens may be missing, where a tokenizer begins a text with others ("▁Question" or "Question").

    Raises:
        ValueError: the common end has not all images of the query and its answer, or it is shorter than the
            query since a token has characters of the query and of what stands before it. The text has both
            ends.
    """
    masks = torch.zeros_like(student.head), torch.zeros_like(teacher.head)
    for row in range(len(student.head)):
        mine, theirs = (x.inputs["attention_mask"][row].nonzero().flatten() for x in (student, teacher))
        ids = [
            x.inputs["input_ids"][row, places].tolist()
            for x, places in zip((student, teacher), (mine, theirs), strict=True)
        ]
        whole, common = len(mine) - int(student.head[row].sum()), _common_end(*ids)
        count = min(whole, common)
        masks[0][row, mine[len(mine) - count :]] = True
        masks[1][row, theirs[len(theirs) - count :]] = True
        needed = student.image[row] | (student.labels[row] != IGNORE)
        short = count < whole and not _begins_apart(student, teacher, row, builder)
        if short or (needed & ~masks[0][row]).any():
            raise ValueError(_complaint(row, ids, whole, common, builder.processor.tokenizer.decode))
    return masks


def _begins_apart(
    student: AnsweredPrompts, teacher: AnsweredPrompts, row: int, builder: PromptBuilder
) -> bool:
    """Whether in both prompts a token begins where the texts begin to be the same."""
    mine, theirs = student.texts[row], teacher.texts[row]
    same = _common_end(mine, theirs)
    return all(builder.splits(text, len(text) - same) for text in (mine, theirs))


def _passes(shots: Sequence[Sequence[Demonstration]], limit: int) -> list[list[Sequence[Demonstration]]]:
    """For each pass of the teacher the demonstrations of every row."""
    if limit < 1:
        raise ValueError(f"shots_per_pass is {limit!r}, expected at least 1")
    lengths = sorted({len(row) for row in shots})
    if len(lengths) > 1:
        raise ValueError(f"shots has rows of {lengths} demonstrations, expected as many in each")
    count = max(1, -(-lengths[0] // limit))
    if count == 1:
        return [list(shots)]
    return [list(rows) for rows in zip(*(split_shots(row, count) for row in shots), strict=True)]


def _common_end(x: Sequence[int] | str, y: Sequence[int] | str) -> int:
    count = 0
    while count < min(len(x), len(y)) and x[-1 - count] == y[-1 - count]:
        count += 1
    return count


def _complaint(
    row: int, ids: list[list[int]], wanted: int, common: int, decode: Callable[[list[int]], str]
) -> str:
    # From where the query begins, or as much before the place where they part as fits.
    begin = min(wanted, common + SHOWN // 2) + 2
    tails = [x[-begin:][:SHOWN] for x in ids]
    shown = [f"{decode(tail)!r}, ids {tail}" for tail in tails]
    return (
        f"prompts of query {row}: only the last {common} tokens are the same, of {wanted} that it has, "
        f"expected its images and its answer. The student has {shown[0]} where the teacher has {shown[1]}. "
        "Has the tokenizer merged the query's beginning with what stands before it (begin the template with "
        "an image or a special token), or the processor made other tokens of an image among several?"
    )
