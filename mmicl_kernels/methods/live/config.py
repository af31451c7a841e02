"""Choices of the LIVE method (arXiv 2406.13185)."""

from dataclasses import dataclass

from mmicl_kernels.methods.base import check_non_negative, check_positive

SITES = ("mlp", "layer")


@dataclass(frozen=True)
class LIVEConfig:
    """LIVE as its authors' code and MimIC's repository have it.

    Attributes:
        site: module whose output is shifted: "mlp", or "layer" (the residual stream after the layer).
        kl_weight, ce_weight: weights of the KL to the teacher on the answer's tokens and of the answer's
            cross-entropy.
        temperature: of both softmaxes in the KL, which is multiplied by its square.
        scale_learning_rate: learning rate of ``scale``.
    """

    site: str = "mlp"
    kl_weight: float = 1.0
    ce_weight: float = 0.5
    temperature: float = 1.0
    scale_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"site is {self.site!r}, expected one of {SITES}")
        check_non_negative(self, "kl_weight", "ce_weight")
        check_positive(self, "temperature", "scale_learning_rate")
