"""What each method minimises."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from mmicl_kernels.data.batch import Batch
from mmicl_kernels.data.episodes import ManyShotBatch
from mmicl_kernels.methods.checkpointing import repeats_reentrant
from mmicl_kernels.methods.measures import gradient_norms


class Attached(Protocol):
    """What an objective asks of the handle of an attached adapter."""

    model: nn.Module
    impl: str
    anchors: Sequence[Any]
    adapters: Mapping[str, nn.Module]
    single: Any

    def disabled(self) -> AbstractContextManager[None]: ...

    def tokens(self, tokens: Tensor) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Losses:
    """``total`` is minimised; the parts are reported unweighted; ``terms``, if known, are what it sums."""

    total: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """What a method minimises: called with a batch it makes all passes and returns :class:`Losses`.

    Attributes:
        method: the adapter's. ``batch``: what it is called with.
        means_over: whose tokens a part is the mean over, "answer" or "query"; M2IV's synergy is no mean.
        learning_rates: by the last part of a parameter's name, instead of the common one; for an optimizer.
        decay_to_identity: square matrices that weight decay pulls to the identity; for an optimizer.
        weights: of the parts in the loss, known after the first batch.
        measures: whether the parts say, under keys with a slash, which of them decides: see
            ``methods/measures.py``. Costs a backward pass for each part. Under reentrant gradient
            checkpointing, which allows no such pass, their gradients are left out.
    """

    method: str
    batch: type[Batch] = ManyShotBatch
    means_over: Mapping[str, str] = MappingProxyType({"ce": "answer"})
    learning_rates: Mapping[str, float] = MappingProxyType({})
    decay_to_identity: tuple[str, ...] = ()
    measures = False
    weights: Mapping[str, float] = MappingProxyType({})

    def __init__(self, handle: Attached) -> None:
        """``handle`` must hold a single adapter, of the objective's method; raises ValueError otherwise."""
        if handle.single is None or not isinstance(self, handle.single.objective_class()):
            expected = f"expected a single adapter of method {self.method!r}"
            raise ValueError(f"handle holds {sorted(handle.adapters)}, {expected}")
        self.handle, self.config = handle, handle.single.config

    def __call__(self, batch: Batch) -> Losses:
        raise NotImplementedError

    def _losses(
        self,
        terms: dict[str, tuple[float, Tensor]],
        shares: Callable[[], dict[str, Tensor]] = dict,
    ) -> Losses:
        """Of weights and parts on one device; ``shares`` are measured where they are asked for.

        Raises ValueError: all weights are 0.
        """
        if not any(weight for weight, _ in terms.values()):
            raise ValueError(f"all weights of {self.config} are 0, expected one above 0")
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        weighted = {name: weight * x for name, (weight, x) in terms.items()}
        parts = {name: x.detach() for name, (_, x) in terms.items()}
        if self.measures:
            parts |= shares()
            # Reentrant checkpointing refuses to differentiate anything but the whole loss.
            if not repeats_reentrant(self.handle.anchors[0].layer):
                parts |= gradient_norms(weighted, trainable(self.handle.single).values())
        return Losses(sum(weighted.values()), parts, weighted)


def trainable(adapter: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``adapter`` that ask for gradients, by name."""
    return {name: x for name, x in adapter.named_parameters() if x.requires_grad}
