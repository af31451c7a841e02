"""What each method minimises."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_kernels.integration import Handle
from mmicl_kernels.methods import Adapter, MimICAdapter
from mmicl_kernels.training.answers import answer_logits, answer_loss, wide
from mmicl_kernels.training.episodes import EpisodeBatch
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
        self.handle, self.config = handle, single_adapter(handle, MimICAdapter).config
        sites = [getattr(anchor, self.config.align) for anchor in handle.anchors]
        self._sites = [site for site in sites if site is not None]  # a layer may have no softmax attention

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError under gradient checkpointing, which hides what happens inside a layer."""
        refuse_checkpointing(self.handle.model, self.config, "align", "layer")
        refuse_recorded_checkpoints(self.handle.model, self.handle.anchors[0].layer)
        targets = self._teach(batch)
        with record_outputs(self._sites, batch.student_query) as states:
            ce = answer_loss(self.handle.model, batch.student, batch.labels)
        align = alignment(states, targets).to(ce.device)
        total = self.config.align_weight * align + self.config.ce_weight * ce
        return Losses(total, {"align": align.detach(), "ce": ce.detach()})

    @torch.no_grad()
    def _teach(self, batch: EpisodeBatch) -> list[Tensor]:
        """The states to reach. The language head, whose logits nobody reads, gets one row."""
        one = torch.zeros_like(batch.teacher_query)
        one[0, 0] = True
        with self.handle.disabled(), record_outputs(self._sites, batch.teacher_query) as states:
            # Not `base_model`, which a sharded model cannot be asked for alone.
            answer_logits(self.handle.model, batch.teacher, one)
        return states


def single_adapter(handle: Handle, method: type[Adapter]) -> Adapter:
    """The adapter of all rows. Raises ValueError unless it is one of ``method``, attached by itself."""
    if not isinstance(handle.single, method):
        name = method.__name__.removesuffix("Adapter")
        raise ValueError(f"handle holds {sorted(handle.adapters)}, expected a single {name} adapter")
    return handle.single


def refuse_checkpointing(model: nn.Module, config: object, name: str, instead: object) -> None:
    """Raise ValueError under gradient checkpointing, unless ``config`` has ``instead`` as ``name``."""
    # A checkpointed layer runs without a graph first, so what a hook inside it sees has no gradient.
    if getattr(config, name) != instead and model.training and model.is_gradient_checkpointing:
        raise ValueError(
            f"{name} is {getattr(config, name)!r} and gradient checkpointing is on, "
            f"expected {name}={instead!r}, model.eval() or model.gradient_checkpointing_disable()"
        )


def refuse_recorded_checkpoints(model: nn.Module, layer: nn.Module) -> None:
    """Raise ValueError where gradient checkpointing runs a layer's hooks again: records would be lost.

    Before 5.23, transformers checkpoints the whole call of a layer; since then its forward alone.
    """
    checkpointing = model.training and model.is_gradient_checkpointing
    if checkpointing and type(layer).__call__ is not nn.Module.__call__:
        raise ValueError(
            "gradient checkpointing is on, and this version of transformers runs the hooks of layers within "
            "it: expected model.eval(), model.gradient_checkpointing_disable() or transformers 5.23"
        )


def alignment(states: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean squared difference over layers, tokens and channels, layer by layer: nothing is stacked."""
    losses = [F.mse_loss(wide(x), wide(y)) for x, y in zip(states, targets, strict=True)]
    device = losses[0].device
    return sum(loss.to(device) for loss in losses) / len(losses)


def trainable(adapter: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``adapter`` that ask for gradients, by name."""
    return {name: x for name, x in adapter.named_parameters() if x.requires_grad}
