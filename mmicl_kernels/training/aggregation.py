"""What AIM minimises: the loss of a query's answer after fused tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mmicl_kernels.library import FusedTokens
from mmicl_kernels.methods import AIMAdapter
from mmicl_kernels.training.answers import answer_loss
from mmicl_kernels.training.batch import Batch, check_form, label_checks, prompt_shape, raise_first
from mmicl_kernels.training.objectives import Losses, Objective


@dataclass(frozen=True)
class AggregationBatch(Batch):
    """Demonstrations, each a prompt of its own, and the queries that they come before.

    Attributes:
        demonstrations: inputs of ``model(**inputs)``, N prompts.
        positions: bool ``[N, T]``, the tokens that are fused; None is the text after the last image.
        queries: inputs of R prompts, answers included.
        labels: int64 ``[R, T]`` of the queries' prompts: their ids, -100 where no token is to be predicted.
        chosen: for each query its demonstrations, of 0 to N - 1.

    Raises:
        TypeError, ValueError: ``labels`` or ``positions`` has another dtype or shape, or a label is not the
        queries' id.
    """

    demonstrations: dict[str, Tensor]
    positions: Tensor | None
    queries: dict[str, Tensor]
    labels: Tensor
    chosen: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        shape = prompt_shape("demonstrations", self.demonstrations)
        if self.positions is not None:
            check_form("positions", self.positions, torch.bool, shape)
        raise_first(label_checks(self.labels, "queries", self.queries))


class AIMObjective(Objective):
    """``-mean log p(y_t | C_1 .. C_k, query, y_<t)`` over the labelled tokens: AIM (arXiv 2406.07588).

    The demonstrations run through the frozen model without a graph; gradients reach the projection alone,
    through the frozen model's second pass, which may use gradient checkpointing. Weight decay pulls the
    projection to the identity, where it begins [ours].
    """

    method, batch = AIMAdapter, AggregationBatch
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
