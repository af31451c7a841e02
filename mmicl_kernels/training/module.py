"""A model, its adapter and what is minimised as one module, whose forward makes all passes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmicl_kernels.data.batch import IGNORE
from mmicl_kernels.data.prefix import PrefixedBatch
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.objective import Objective
from mmicl_kernels.patch import AdaptedModel


class TrainedModule(AdaptedModel):
    """``model`` with ``adapter`` attached, called with a batch: what DDP, accelerate and a Trainer train.

    DDP averages gradients of what goes through its own ``forward``. An objective calls the model, so its
    passes and the loss are all in this module's ``forward``. ``objective`` is the method's.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, impl: str = "auto") -> None:
        """Raises as :func:`attach`; TypeError for an adapter whose method has no objective."""
        objective = objective_of(type(adapter))
        super().__init__(model, adapter, impl=impl)
        try:
            self.objective = objective(self.handle)
        except BaseException:
            self.handle.detach()
            raise

    # A Trainer divides the loss by the steps it accumulates, and takes **kwargs for a sign that it need not.
    accepts_loss_kwargs = False

    # That `labels` has this name tells it to report the loss of an evaluation.
    def forward(
        self,
        inputs: dict[str, object],
        labels: Tensor,
        shares: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``"loss"``, which is minimised, and its parts without weights or gradients, all ``[]``.

        ``inputs`` and ``labels`` are a batch's ``arguments()``. Of several batches of one update, accumulated
        or of several processes, ``shares`` says how much of the tokens this one has, as a multiple of an
        equal share: the mean of their losses is then that over all tokens (see :func:`token_shares`).
        Raises as the batch and the objective.
        """
        kind = PrefixedBatch if "prefix" in inputs else self.objective.batch
        losses = self.objective(kind(**inputs, labels=labels))
        total = losses.total
        if shares is not None:
            total = sum(x * shares[self.tokens_of(name)].to(x) for name, x in losses.terms.items())
        return {"loss": total, **losses.parts}

    def tokens_of(self, part: str) -> str:
        """Whose tokens a part is the mean over; what is no mean counts as one over the answers'."""
        return self.objective.means_over.get(part, "answer")


def objective_of(adapter_class: type) -> type[Objective]:
    """What a method minimises. Raises TypeError: it does not say."""
    try:
        return adapter_class.objective_class()
    except NotImplementedError as error:
        raise TypeError(f"adapter is a {adapter_class.__name__}: {error}") from error


def token_counts(arguments: Mapping[str, Any]) -> Tensor:
    """How many tokens a batch's losses are means over, fp32 ``[2]``: the answers', and the queries'."""
    labelled = (arguments["labels"][:, 1:] != IGNORE).sum()
    query = arguments["inputs"].get("student_query")
    return torch.stack([labelled, labelled if query is None else query.sum()]).float()


def token_shares(counts: Tensor, total: Tensor, batches: int) -> dict[str, Tensor]:
    """The ``shares`` of a batch with ``counts`` in an update of ``batches``, which have ``total``."""
    answer, query = counts * batches / total
    return {"answer": answer, "query": query}
