"""Choices of prompt tuning (arXiv 2104.08691)."""

from dataclasses import dataclass

from mmicl_kernels.methods.base import check_count, check_non_negative


@dataclass(frozen=True)
class PromptTuningConfig:
    """How many tokens are learned, and where they begin.

    Attributes:
        num_tokens: before every prompt.
        std: of the normal distribution that they are drawn from.
    """

    num_tokens: int = 20
    std: float = 0.02

    def __post_init__(self) -> None:
        check_count(self, "num_tokens")
        check_non_negative(self, "std")
