"""Choices of the M2IV method (arXiv 2504.04633)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mmicl_kernels.methods.base import check_non_negative, check_positive

SYNERGIES = ("channel", "token")


@dataclass(frozen=True)
class M2IVConfig:
    """M2IV's objective; where the paper's text is not public, the values are ours (README).

    Attributes:
        mimicry_weight, synergy_weight, ce_weight: weights of the three losses: KL to the teacher on the
            answer's tokens, correlation of the two branches, the answer's cross-entropy.
        temperature: of both softmaxes in the KL.
        synergy_of: what has unit length in the correlations of the synergy loss. "channel": each channel of a
            branch over the tokens, as in Barlow Twins, and the loss is a mean over channels and layers;
            "token": each token over the channels, and the loss is their sum [re-implementation].
        gamma: weight of the off-diagonal squares in the synergy loss.
        scale_learning_rate: learning rate of every ``attn.scale`` and ``mlp.scale``.
    """

    OLDER: ClassVar[Mapping[str, Any]] = {"synergy_of": "token"}  # see ``stored_config``

    mimicry_weight: float = 1.0
    synergy_weight: float = 1.0
    ce_weight: float = 0.5
    temperature: float = 1.0
    synergy_of: str = "channel"
    gamma: float = 1e-3
    scale_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        check_non_negative(self, "mimicry_weight", "synergy_weight", "ce_weight", "gamma")
        check_positive(self, "temperature", "scale_learning_rate")
        if self.synergy_of not in SYNERGIES:
            raise ValueError(f"synergy_of is {self.synergy_of!r}, expected one of {SYNERGIES}")
