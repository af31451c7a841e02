"""Queries asked twice by a builder of prompts: which tokens of both prompts are the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmicl_kernels.integration.prompts import AnsweredPrompts, PromptBuilder
from mmicl_kernels.library import Demonstration
from mmicl_kernels.training.batch import IGNORE
from mmicl_kernels.training.episodes import EpisodeBatch, ManyShotBatch
from mmicl_kernels.training.sampling import split_shots

SHOWN = 40  # tokens of each prompt in a message


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
