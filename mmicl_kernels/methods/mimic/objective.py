"""What MimIC minimises: the distance of states to those after demonstrations, and the answer's loss."""

from types import MappingProxyType

import torch
from torch import Tensor

from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.methods.answers import answer_logits, answer_loss
from mmicl_kernels.methods.checkpointing import refuse_checkpointing, refuse_recorded_checkpoints
from mmicl_kernels.methods.measures import alignment_shares
from mmicl_kernels.methods.objective import Attached, Losses, Objective
from mmicl_kernels.methods.record import record_outputs
from mmicl_kernels.methods.teaching import after_prefix, teaching
from mmicl_kernels.ops import alignment_loss


class MimICObjective(Objective):
    """Layer-wise alignment with the demonstrated teacher plus the answer's cross-entropy.

    MimIC (arXiv 2504.08851) section 3.3. The teacher is the same frozen model with its adapters off,
    given the demonstrations. The alignment is the squared difference at the query's tokens, relative to the
    states' own squares or as a plain mean over ``[L, tokens, C]``, as the official code has it.
    Without ``align_weight`` there is no teacher.
    """

    method = "mimic"
    means_over = MappingProxyType({"ce": "answer", "align": "query"})

    def __init__(self, handle: Attached) -> None:
        super().__init__(handle)
        sites = {anchor.index: getattr(anchor, self.config.align) for anchor in handle.anchors}
        # A layer may have no softmax attention.
        self._sites = {index: site for index, site in sites.items() if site is not None}

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError under gradient checkpointing, which hides what happens inside a layer, if no
        token is labelled, or if there are teacher passes beside the first, whose states have no mean."""
        if getattr(batch, "further", ()):
            raise ValueError(f"further has {len(batch.further)} teacher passes, expected none for MimIC")
        if self.config.align_weight == 0:
            ce = answer_loss(self.handle.model, batch.student, batch.labels)
            return self._losses({"ce": (self.config.ce_weight, ce)})
        refuse_checkpointing(self.handle.model, self.config, "align", "layer")
        refuse_recorded_checkpoints(self.handle.model, self.handle.anchors[0].layer)
        targets = self._teach(batch)
        query, form = batch.student_query, self.config.alignment
        with record_outputs(list(self._sites.values()), query, whole=True) as states:
            ce = answer_loss(self.handle.model, batch.student, batch.labels)
        align = alignment_loss(states, targets, query, form=form, impl=self.handle.impl).to(ce.device)
        return self._losses(
            {"align": (self.config.align_weight, align), "ce": (self.config.ce_weight, ce)},
            lambda: alignment_shares(states, targets, query, list(self._sites), form),
        )

    @torch.no_grad()
    def _teach(self, batch: EpisodeBatch) -> list[Tensor]:
        """The states to reach. The language head, whose logits nobody reads, gets one row."""
        one = torch.zeros_like(batch.teacher_query)
        one[0, 0] = True
        sites = list(self._sites.values())
        with teaching(self.handle):
            inputs = after_prefix(self.handle.model, batch, batch.teacher)
            with record_outputs(sites, batch.teacher_query) as states:
                # Not `base_model`, which a sharded model cannot be asked for alone.
                answer_logits(self.handle.model, inputs, one)
        return states
