"""Choices of the AIM method (arXiv 2406.07588)."""

from dataclasses import dataclass

POSITIONS = ("text", "answer")


@dataclass(frozen=True)
class AIMConfig:
    """How a demonstration becomes fused tokens; what the paper's public text leaves open is ours (README).

    Attributes:
        positions: whose hidden states are fused. "text": every text token after the demonstration's last
            image; "answer": of those its answer alone, the AAAI abstract's "textual labels".
        layer_norm: whether a LayerNorm follows the projection.
    """

    positions: str = "text"
    layer_norm: bool = False

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}, expected one of {POSITIONS}")
        if not isinstance(self.layer_norm, bool):
            raise TypeError(f"layer_norm is {self.layer_norm!r}, expected a bool")
