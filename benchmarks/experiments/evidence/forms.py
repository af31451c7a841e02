"""Other forms of MimIC's alignment, which were tried for the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.mimic.objective import MimICObjective
from mmicl_kernels.methods.record import record_outputs
from mmicl_kernels.methods.teaching import student_rows, teacher_rows
from mmicl_kernels.patch import Handle
from mmicl_kernels.training import EpisodeBatch, Losses

# Of a layer's states [N, C], the student's and the teacher's: a number of each token. Their mean is the loss.
Form = Callable[[Tensor, Tensor], Tensor]


def mean_square(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(-1)


def of_layer(x: Tensor, y: Tensor) -> Tensor:
    return mean_square(x, y) / y.square().mean()


def of_token(x: Tensor, y: Tensor) -> Tensor:
    return mean_square(x, y) / y.square().mean(-1)


def of_both(x: Tensor, y: Tensor) -> Tensor:
    return mean_square(x, y) / (x.square() + y.square()).mean(-1)


def without_massive(x: Tensor, y: Tensor) -> Tensor:
    """The hundredth of the channels that has most of the teacher's power is left out."""
    power = y.square().sum(0)
    kept = power.argsort()[: len(power) - max(1, len(power) // 100)]
    return of_layer(x[:, kept], y[:, kept])


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(x, y, dim=-1)


ANSWER_ALONE = "at the answer alone"
FORMS: Mapping[str, Form] = {
    "by the layer's power": of_layer,
    "by the token's power": of_token,
    "by the layer's power, no massive channels": without_massive,
    "cosine": cosine,
    ANSWER_ALONE: of_both,
}


class FormObjective(MimICObjective):
    """MimIC's with another form; with ``answer_only`` of the tokens that predict the answer."""

    def __init__(self, handle: Handle, form: Form, *, answer_only: bool = False) -> None:
        super().__init__(handle)
        self.form, self.answer_only = form, answer_only

    def __call__(self, batch: EpisodeBatch) -> Losses:
        if self.answer_only:
            rows = teacher_rows(batch, batch.teacher, batch.teacher_query)
            batch = replace(batch, student_query=student_rows(batch), teacher_query=rows)
        added, ce = self.added(batch)
        config = self.config
        return self._losses({"align": (config.align_weight, added.mean()), "ce": (config.ce_weight, ce)})

    def added(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """What the form gives for each token of each layer, ``[L, N]``; the answers' cross-entropy."""
        targets = self._teach(batch)
        with record_outputs(list(self._sites.values()), batch.student_query) as states:
            ce = answer_loss(self.handle.model, batch.student, batch.labels)
        return torch.stack([self.form(x, y) for x, y in zip(states, targets, strict=True)]), ce
