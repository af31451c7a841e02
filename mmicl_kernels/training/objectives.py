"""What each method minimises."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_kernels.integration import Handle
from mmicl_kernels.methods import MimICAdapter
from mmicl_kernels.training.episodes import IGNORE, EpisodeBatch
from mmicl_kernels.training.record import record_outputs


@dataclass(frozen=True)
class Losses:
    """``total`` is minimised; the parts are reported unweighted."""

    total: Tensor
    parts: dict[str, Tensor]


class MimICObjective:
    """Layer-wise alignment with the demonstrated teacher plus the answer's cross-entropy.

    MimIC (arXiv 2504.08851) section 3.3. The teacher is the same frozen model with its adapters off,
    given the demonstrations; the mean over ``[L, tokens, C]`` of the squared difference at the query's
    tokens, as the official code normalises it.
    """

    def __init__(self, handle: Handle) -> None:
        """``handle`` must hold a single MimIC adapter; raises ValueError otherwise."""
        if not isinstance(handle.single, MimICAdapter):
            raise ValueError(f"handle holds {sorted(handle.adapters)}, expected a single MimIC adapter")
        self.handle = handle
        self.config = handle.single.config
        self._sites = [getattr(anchor, self.config.align) for anchor in handle.anchors]

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError under gradient checkpointing, which hides what happens inside a layer."""
        self._check_checkpointing()
        targets = self._teach(batch)
        with record_outputs(self._sites, batch.student_query) as states:
            logits = self.handle.model(**batch.student).logits
        align = alignment(states, targets)
        ce = cross_entropy(logits, batch.labels)
        total = self.config.align_weight * align + self.config.ce_weight * ce
        return Losses(total, {"align": align.detach(), "ce": ce.detach()})

    def _check_checkpointing(self) -> None:
        model = self.handle.model
        # A checkpointed layer runs without a graph first, so what a hook inside it sees has no gradient.
        if model.training and model.is_gradient_checkpointing and self.config.align != "layer":
            raise ValueError(
                f"align is {self.config.align!r} and gradient checkpointing is on, expected align='layer', "
                "model.eval() or model.gradient_checkpointing_disable()"
            )

    @torch.no_grad()
    def _teach(self, batch: EpisodeBatch) -> list[Tensor]:
        """The states to reach. ``base_model`` skips the language head, whose logits nobody reads."""
        with self.handle.disabled(), record_outputs(self._sites, batch.teacher_query) as states:
            self.handle.model.base_model(**batch.teacher)
        return states


def alignment(states: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean squared difference over layers, tokens and channels, layer by layer: nothing is stacked."""
    losses = [F.mse_loss(_wide(x), _wide(y)) for x, y in zip(states, targets, strict=True)]
    device = losses[0].device
    return sum(loss.to(device) for loss in losses) / len(losses)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy of ``logits [B, T, V]`` at the labelled positions alone.

    Written out because Idefics v1 fails when given ``labels`` (its loss forgets the added vocabulary).
    """
    labels = labels[:, 1:].to(logits.device)
    kept = labels != IGNORE
    return F.cross_entropy(_wide(logits[:, :-1][kept]), labels[kept])


def trainable(adapter: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``adapter`` that ask for gradients, by name."""
    return {name: x for name, x in adapter.named_parameters() if x.requires_grad}


def _wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
