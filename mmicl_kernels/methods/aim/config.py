"""Choices of the AIM method (arXiv 2406.07588)."""

from dataclasses import dataclass

from mmicl_kernels.data.prompts.positions import check_positions


@dataclass(frozen=True)
class AIMConfig:
    """How a demonstration becomes fused tokens; what the paper's public text leaves open is ours (README).

    Attributes:
        positions: whose hidden states are fused. "text": every text token after the demonstration's last
            image; "answer": of those its answer alone, the AAAI abstract's "textual labels"; "answer_end":
            the answer and the token after it, in a chat the end of the turn, whose state has read all of it.
        layer_norm: whether a LayerNorm follows the projection.
    """

    positions: str = "text"
    layer_norm: bool = False

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if not isinstance(self.layer_norm, bool):
            raise TypeError(f"layer_norm is {self.layer_norm!r}, expected a bool")
