"""Where and how a method acts: in a layer's attention, in the residual stream, among the input embeddings."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mmicl_kernels.data.prompts.positions import check_positions

MODULES = ("input", "after_attention", "mlp", "layer")
NORMALIZERS = ("visible", "all_keys")


@dataclass(frozen=True)
class AttentionSite:
    """Every softmax attention, whose heads a method shifts: ``ops.shifted_attention``.

    ``normalizer``: what the gate's log-sum-exp runs over; adapters of one model must agree on it. ``prefix``:
    whether the virtual keys stand in one softmax with the others.
    """

    normalizer: str = "visible"
    prefix: bool = False

    def __post_init__(self) -> None:
        _check("normalizer", self.normalizer, NORMALIZERS)


@dataclass(frozen=True)
class ResidualSite:
    """Where a method adds a vector to the residual stream, and how.

    ``module`` is what the vector is added to: in every decoder layer the output of "after_attention" (the
    last module before the attention branch joins the stream), "mlp", or "layer"; or the "input" of the first.
    ``preserve_norm``: see ``ops.residual_shift``. ``readout``, at the input alone: there are two vectors, one
    for so many tokens at a prompt's end and one for those before them, each by the square root of how many.
    """

    module: str
    preserve_norm: bool
    readout: int = 0

    def __post_init__(self) -> None:
        _check("module", self.module, MODULES)
        if (self.module == "input") != (self.readout > 0):
            raise ValueError(f"readout is {self.readout} at {self.module!r}, expected some at 'input' alone")


@dataclass(frozen=True)
class EmbeddingSite:
    """Among a prompt's input embeddings, where a method's tokens stand before it: ``ops.prefix_splice``.

    ``positions``: which tokens of a demonstration are fused into them, see ``PromptBuilder``; None where they
    are learned, and stand for no demonstration.
    """

    positions: str | None = "text"

    def __post_init__(self) -> None:
        if self.positions is not None:
            check_positions(self.positions)


class FusedTokens(NamedTuple):
    """What ``ops.prefix_splice`` takes as its bank: demonstration d is ``rows[offsets[d]:offsets[d + 1]]``.

    rows: ``[N, C]``, floating, or int8 beside ``scale``. offsets: int64 ``[M + 1]``. scale: fp32 ``[N]``, for
    rows that are ``rows[n] * scale[n]``; None beside floating rows.
    """

    rows: Tensor
    offsets: Tensor
    scale: Tensor | None


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {choices}")
