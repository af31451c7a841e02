"""Choices of HiFICL (arXiv 2603.12760)."""

from dataclasses import dataclass

from mmicl_kernels.methods.base import check_count
from mmicl_kernels.methods.sites import NORMALIZERS


@dataclass(frozen=True)
class HiFICLConfig:
    """HiFICL as its paper and its official code have it.

    Attributes:
        num_keys: virtual keys and values of each head. rank: of the factors they are products of.
        prefix: whether the keys stand in one softmax with the prompt's, which lose what they take. False is
            the paper's ablation "alpha = 1".
        normalizer: what the gate's log-sum-exp runs over. "visible": the keys the query sees (the paper).
            "all_keys": every cached key (the official code; its checkpoints need it).
    """

    num_keys: int = 8
    rank: int = 8
    prefix: bool = True
    normalizer: str = "visible"

    def __post_init__(self) -> None:
        check_count(self, "num_keys", "rank")
        if not isinstance(self.prefix, bool):
            raise TypeError(f"prefix is {self.prefix!r}, expected True or False")
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer is {self.normalizer!r}, expected one of {NORMALIZERS}")
