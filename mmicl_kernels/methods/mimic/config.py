"""Choices of the MimIC method (arXiv 2504.08851)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mmicl_kernels.methods.base import check_non_negative
from mmicl_kernels.methods.sites import NORMALIZERS

ALIGNMENT_SITES = ("mlp", "self_attn", "layer")
ALIGNMENTS = ("relative", "mean_square")


@dataclass(frozen=True)
class MimICConfig:
    """MimIC as the paper and its official code have it.

    Attributes:
        normalizer: what the gate's log-sum-exp runs over. "visible": the keys the query sees (the
            paper). "all_keys": every cached key (the official code; its checkpoints need it).
        align: module whose output is aligned with the teacher's: "mlp" (official code), "self_attn",
            or "layer" (the residual stream after the layer).
        alignment: how far the states are apart. "relative": at each token of each layer the squared
            difference over the sum of both squares, a number from 0 to 2 whatever the states' scale [ours];
            "mean_square": the plain mean of the paper and the official code.
        align_weight, ce_weight: weights of the alignment and of the answer's cross-entropy.
        ffn_shift: whether there is the official code's optional shift of the MLP's output, norm kept.
    """

    OLDER: ClassVar[Mapping[str, Any]] = {"alignment": "mean_square"}  # see ``stored_config``

    normalizer: str = "visible"
    align: str = "mlp"
    alignment: str = "relative"
    align_weight: float = 1.0
    ce_weight: float = 0.5
    ffn_shift: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("normalizer", NORMALIZERS),
            ("align", ALIGNMENT_SITES),
            ("alignment", ALIGNMENTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")
        check_non_negative(self, "align_weight", "ce_weight")
