"""What each method minimises: what all objectives have, and MimIC's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mmicl_kernels.integration import Handle
from mmicl_kernels.integration.aggregation import evaluating
from mmicl_kernels.integration.recomputation import repeats_reentrant
from mmicl_kernels.methods import Adapter, MimICAdapter
from mmicl_kernels.ops import alignment_loss
from mmicl_kernels.training.answers import answer_logits, answer_loss
from mmicl_kernels.training.batch import Batch
from mmicl_kernels.training.episodes import EpisodeBatch, ManyShotBatch
from mmicl_kernels.training.measures import alignment_shares, gradient_norms
from mmicl_kernels.training.prefix import after_prefix
from mmicl_kernels.training.record import record_outputs


@dataclass(frozen=True)
class Losses:
    """``total`` is minimised; the parts are reported unweighted; ``terms``, if known, are what it sums."""

    total: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """What a method minimises: called with a batch it makes all passes and returns :class:`Losses`.

    Attributes:
        method: the adapter's class. ``batch``: what it is called with.
        means_over: whose tokens a part is the mean over, "answer" or "query"; M2IV's synergy is no mean.
        learning_rates: by the last part of a parameter's name, instead of the common one; for an optimizer.
        decay_to_identity: square matrices that weight decay pulls to the identity; for an optimizer.
        weights: of the parts in the loss, known after the first batch.
        measures: whether the parts say, under keys with a slash, which of them decides: see
            ``training/measures.py``. Costs a backward pass for each part. Under reentrant gradient
            checkpointing, which allows no such pass, their gradients are left out.
    """

    method: type[Adapter]
    batch: type[Batch] = ManyShotBatch
    means_over: Mapping[str, str] = MappingProxyType({"ce": "answer"})
    learning_rates: Mapping[str, float] = MappingProxyType({})
    decay_to_identity: tuple[str, ...] = ()
    measures = False
    weights: Mapping[str, float] = MappingProxyType({})

    def __init__(self, handle: Handle) -> None:
        """``handle`` must hold a single adapter, of the objective's method; raises ValueError otherwise."""
        if not isinstance(handle.single, self.method):
            name = self.method.__name__.removesuffix("Adapter")
            raise ValueError(f"handle holds {sorted(handle.adapters)}, expected a single {name} adapter")
        self.handle, self.config = handle, handle.single.config

    def __call__(self, batch: Batch) -> Losses:
        raise NotImplementedError

    def _losses(
        self,
        terms: dict[str, tuple[float, Tensor]],
        shares: Callable[[], dict[str, Tensor]] = dict,
    ) -> Losses:
        """Of weights and parts on one device; ``shares`` are measured where they are asked for."""
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        weighted = {name: weight * x for name, (weight, x) in terms.items()}
        parts = {name: x.detach() for name, (_, x) in terms.items()}
        if self.measures:
            parts |= shares()
            # Reentrant checkpointing refuses to differentiate anything but the whole loss.
            if not repeats_reentrant(self.handle.anchors[0].layer):
                parts |= gradient_norms(weighted, trainable(self.handle.single).values())
        return Losses(sum(weighted.values()), parts, weighted)


class MimICObjective(Objective):
    """Layer-wise alignment with the demonstrated teacher plus the answer's cross-entropy.

    MimIC (arXiv 2504.08851) section 3.3. The teacher is the same frozen model with its adapters off,
    given the demonstrations. The alignment is the squared difference at the query's tokens, relative to the
    states' own squares or as a plain mean over ``[L, tokens, C]``, as the official code has it.
    Without ``align_weight`` there is no teacher.
    """

    method = MimICAdapter
    means_over = MappingProxyType({"ce": "answer", "align": "query"})

    def __init__(self, handle: Handle) -> None:
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


@contextmanager
def teaching(handle: Handle) -> Iterator[None]:
    """The plain model within a ``with`` block, without dropout: what is taught is no draw."""
    with handle.disabled(), evaluating(handle.model):
        yield


def refuse_checkpointing(model: nn.Module, config: object, name: str, instead: object) -> None:
    """Raise ValueError under gradient checkpointing, unless ``config`` has ``instead`` as ``name``."""
    # A checkpointed layer runs without a graph first, so what a hook inside it sees has no gradient.
    if getattr(config, name) != instead and _is_checkpointing(model):
        raise ValueError(
            f"{name} is {getattr(config, name)!r} and gradient checkpointing is on, "
            f"expected {name}={instead!r}, model.eval() or model.gradient_checkpointing_disable()"
        )


def refuse_recorded_checkpoints(model: nn.Module, layer: nn.Module) -> None:
    """Raise ValueError where gradient checkpointing runs a layer's hooks again: records would be lost.

    Before 5.23, transformers checkpoints the whole call of a layer; since then its forward alone.
    """
    if _is_checkpointing(model) and type(layer).__call__ is not nn.Module.__call__:
        raise ValueError(
            "gradient checkpointing is on, and this version of transformers runs the hooks of layers within "
            "it: expected model.eval(), model.gradient_checkpointing_disable() or transformers 5.23"
        )


def _is_checkpointing(model: nn.Module) -> bool:
    # The model's own property has another name in each version of transformers.
    return model.training and any(getattr(x, "gradient_checkpointing", False) for x in model.modules())


def trainable(adapter: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``adapter`` that ask for gradients, by name."""
    return {name: x for name, x in adapter.named_parameters() if x.requires_grad}
