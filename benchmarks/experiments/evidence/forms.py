"""Other forms of MimIC's alignment, which were tried for the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.integration import Handle
from mmicl_kernels.training import EpisodeBatch, Losses, MimICObjective
from mmicl_kernels.training.answers import answer_loss
from mmicl_kernels.training.distillation import student_rows, teacher_rows
from mmicl_kernels.training.record import record_outputs

# Of one layer's states [N, C], the student's and the teacher's.
Form = Callable[[Tensor, Tensor], Tensor]


def _of_layer(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum() / y.square().sum()


def _of_token(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y).square().sum(-1) / y.square().sum(-1)).mean()


def _without_massive(x: Tensor, y: Tensor) -> Tensor:
    """The hundredth of the channels that has most of the teacher's power is left out."""
    power = y.square().sum(0)
    kept = power.argsort()[: len(power) - max(1, len(power) // 100)]
    return _of_layer(x[:, kept], y[:, kept])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(x, y, dim=-1).mean()


def _both(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y).square().sum(-1) / (x.square().sum(-1) + y.square().sum(-1))).mean()


FORMS: Mapping[str, Form] = {
    "by the layer's power": _of_layer,
    "by the token's power": _of_token,
    "by the layer's power, no massive channels": _without_massive,
    "cosine": _cosine,
    "at the answer alone": _both,
}


class FormObjective(MimICObjective):
    """MimIC's with another form, the mean over layers."""

    def __init__(self, handle: Handle, form: Form) -> None:
        super().__init__(handle)
        self.form = form

    def __call__(self, batch: EpisodeBatch) -> Losses:
        if self.form is FORMS["at the answer alone"]:
            rows = teacher_rows(batch, batch.teacher, batch.teacher_query)
            batch = replace(batch, student_query=student_rows(batch), teacher_query=rows)
        targets = self._teach(batch)
        with record_outputs(list(self._sites.values()), batch.student_query) as states:
            ce = answer_loss(self.handle.model, batch.student, batch.labels)
        align = torch.stack([self.form(x, y) for x, y in zip(states, targets, strict=True)]).mean()
        return self._losses({"align": (self.config.align_weight, align), "ce": (self.config.ce_weight, ce)})
