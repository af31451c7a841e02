"""Choices of STAVE ("Two Vectors Replace In-Context Demos")."""

from dataclasses import dataclass

from mmicl_kernels.methods.base import check_count, check_non_negative


@dataclass(frozen=True)
class STAVEConfig:
    """Two vectors for two kinds of a prompt's tokens.

    Attributes:
        readout: how many tokens at a prompt's end get the first vector: the answer's cue. The tokens before
            them get the second.
        ce_weight, demonstrations_weight: of the answer's cross-entropy without demonstrations and after some.
    """

    readout: int = 1
    ce_weight: float = 1.0
    demonstrations_weight: float = 1.0

    def __post_init__(self) -> None:
        check_count(self, "readout")
        check_non_negative(self, "ce_weight", "demonstrations_weight")
