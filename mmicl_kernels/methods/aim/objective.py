"""What AIM minimises: the loss of a query's answer after fused tokens."""

from itertools import accumulate

import torch

from mmicl_kernels.data.batch import AggregationBatch
from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.objective import Losses, Objective
from mmicl_kernels.methods.sites import FusedTokens


class AIMObjective(Objective):
    """``-mean log p(y_t | C_1 .. C_k, query, y_<t)`` over the labelled tokens: AIM (arXiv 2406.07588).

    The demonstrations run through the frozen model without a graph; gradients reach the projection alone,
    through the frozen model's second pass, which may use gradient checkpointing. Weight decay pulls the
    projection to the identity, where it begins [ours].
    """

    method, batch = "aim", AggregationBatch
    decay_to_identity = ("fuser.weight",)

    def __call__(self, batch: AggregationBatch) -> Losses:
        """Raises ValueError as ``Handle.aggregate`` and ``Handle.splice``, or if no token is labelled."""
        fused = self.handle.aggregate(batch.demonstrations, batch.positions)
        rows = torch.cat(fused)
        offsets = torch.tensor([0, *accumulate(map(len, fused))], device=rows.device)
        inputs = self.handle.splice(
            {**batch.queries, "labels": batch.labels}, batch.chosen, tokens=FusedTokens(rows, offsets, None)
        )
        labels = inputs.pop("labels")
        try:
            ce = answer_loss(self.handle.model, inputs, labels)
        finally:
            self.handle.unsplice()  # or the graph would live until the next batch
        return self._losses({"ce": (1.0, ce)})
