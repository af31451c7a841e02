"""One forward pass: which columns of its sequences it sees, and where their prompts are."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmicl_kernels.patch.slots import for_batch


class Prompt(NamedTuple):
    """A batch of prompts, padded to one length.

    length: of all, with padding, ``[]``. last: each one's last column, ``[R]``. from_end: of each token of
    its own how many there are up to the prompt's last, itself included, ``[R, L]``; 0 of others. All int64.
    """

    length: Tensor
    last: Tensor
    from_end: Tensor

    def of_batch(self, B: int) -> "Prompt":
        """Its rows repeated for a batch of B; of none where rows of the cache were dropped since."""
        R = max(len(self.last), len(self.from_end))
        if B % R == 0:
            last, from_end = (for_batch(x.expand(R, *x.shape[1:]), B) for x in self[1:])
            return Prompt(self.length, last, from_end)
        return Prompt(self.length, self.last.new_full((B,), -1), self.from_end.new_zeros(B, 1))

    def unless(self, begun: Tensor, other: "Prompt", B: int) -> "Prompt":
        """For a batch of B this one where a pass has ``begun`` it, else the ``other``."""
        L = max(x.from_end.shape[1] for x in (self, other))
        both = [x.of_batch(B) for x in (self, other)]
        both = [x._replace(from_end=F.pad(x.from_end, (0, L - x.from_end.shape[1]))) for x in both]
        return Prompt(*(torch.where(begun, *x) for x in zip(*both, strict=True)))


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
    ids: Tensor | None, begins_text: bool | Tensor, L: int, attention_mask: Tensor | None,
    counted: Tensor | None, begins: Tensor,
) -> Prompt:  # fmt: skip
    """The first L tokens of a batch, ``ids [R, T]`` of as many of them as are known.

    Of each prompt what ``attention_mask [R, S]`` shows is its own, and what it does not reach; but not a
    first token among the ids ``begins``, if it ``begins_text``, nor what a mask ``counted [R, L]`` leaves
    out, which ``last`` does not look at.
    """
    device = begins.device
    seen = torch.ones(1, L, dtype=torch.bool, device=device)
    if attention_mask is not None:
        known = attention_mask[:, :L].bool().to(device)
        seen = F.pad(known, (0, L - known.shape[1]), value=True)
    own = seen if counted is None else seen & counted
    if ids is not None and begins_text is not False:
        is_begin = (ids[:, :L].to(device)[..., None] == begins).any(-1) & begins_text
        own = own & ~(F.pad(is_begin, (0, L - is_begin.shape[1])) & (own.cumsum(-1) == 1))
    from_end = own.int().flip(-1).cumsum(-1).flip(-1) * own
    length = torch.full((), L, dtype=torch.long, device=device)
    return Prompt(length, L - 1 - seen.flip(-1).int().argmax(-1), from_end)
