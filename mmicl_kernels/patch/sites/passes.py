"""One forward pass: which columns of its sequences it sees, and where their prompts are."""

from typing import NamedTuple

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """A batch of prompts, padded to one length.

    length: of all, with padding, ``[]``. last: each one's last column, ``[R]``. from_end: of each token of
    its own how many there are up to the prompt's last, itself included, ``[R, L]``; 0 of others. All int64.
    """

    length: Tensor
    last: Tensor
    from_end: Tensor

    def unless(self, begun: Tensor, other: "Prompt", T: int) -> "Prompt":
        """This one where a pass of T tokens has ``begun`` it, else the ``other``."""
        length, last = (torch.where(begun, *x) for x in zip(self[:2], other[:2], strict=True))
        return Prompt(length, last, self.from_end if T > 1 else other.from_end)


class Pass(NamedTuple):
    """columns: ``[T]``. chosen: bool ``[B, T]``, the tokens that adapters act on, None for all."""

    columns: Tensor
    prompt: Prompt
    chosen: Tensor | None


class PassesToRepeat:
    """The passes that built a graph since layers were last run again, as far as they chose tokens."""

    def __init__(self) -> None:
        self._found: list[Pass] = []
        self._were_repeated = False

    def note(self, one: Pass | None) -> None:
        """A layer of ``one`` was run."""
        if self._were_repeated:
            self._found, self._were_repeated = [], False
        if one is not None and not any(one is x for x in self._found):
            self._found = [*self._found[-1:], one]  # more than one is too many

    def are_only(self, one: Pass | None) -> bool:
        """Whether a layer that is run again can be of no other pass than ``one``."""
        self._were_repeated = True
        return len(self._found) <= 1 and all(one is x for x in self._found)


def read_prompt(
    ids: Tensor | None, T: int, attention_mask: object, counted: Tensor | None, begins: Tensor
) -> Prompt:  # fmt: skip
    """The first T tokens of a batch, ``ids [R, T]`` if they are known.

    Of each prompt what ``attention_mask [R, S]`` shows is its own, if it is one; but not a first token among
    the ids ``begins``, nor what a mask ``counted [R, L]`` leaves out, which ``last`` does not look at.
    """
    device = begins.device
    seen = torch.ones(1, T, dtype=torch.bool, device=device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        seen = attention_mask[:, :T].bool().to(device)
    own = seen if counted is None else seen & counted[:, :T]
    if ids is not None:
        is_begin = (ids[:, :T].to(device)[..., None] == begins).any(-1)
        own = own & ~(is_begin & (own.cumsum(-1) == 1))
    from_end = own.int().flip(-1).cumsum(-1).flip(-1) * own
    length = torch.full((), T, dtype=torch.long, device=device)
    return Prompt(length, T - 1 - seen.flip(-1).int().argmax(-1), from_end)
