"""Where the tokens of a prompt stand once fused tokens are before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING, FUSED = -1, -2

# Inputs with one entry per token, and what fused tokens and padding have there. Of `input_ids` and
# `attention_mask` the two differ: they are written by hand.
FILL = {
    "labels": -100,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "image_attention_mask": 0,
    "cross_attention_mask": 0,
}
# Made by the model from ids and mask; for a longer prompt they would be others.
REFUSED = ("inputs_embeds", "position_ids", "cache_position", "past_key_values")


@dataclass(frozen=True)
class Plan:
    """Where every token of a spliced batch comes from.

    Attributes:
        source: int64 ``[R, L]`` on the CPU: the prompt's token, ``PADDING`` or ``FUSED``.
        starts: the first place of each request's fused tokens.
        demonstrations: those that are kept, request after request; ``counts`` of each request.
    """

    source: Tensor
    starts: list[int]
    demonstrations: list[int]
    counts: list[int]

    def equals(self, other: "Plan") -> bool:
        mine, theirs = ((x.starts, x.demonstrations, x.counts) for x in (self, other))
        return mine == theirs and torch.equal(self.source, other.source)


def lay_out(
    own: Tensor, leading: Sequence[int], demonstrations: Sequence[Sequence[int]], lengths: Mapping[int, int],
    max_length: int | None,
) -> Plan:  # fmt: skip
    """The plan of a batch: of each request its first ``leading`` tokens, its fused tokens, and the rest.

    ``own [R, T]`` is True at tokens that are seen, of which the first and the last bound a prompt;
    ``lengths`` has every demonstration that is named. Of those of a request the longest run of last ones is
    kept that fits into ``max_length`` beside the prompt, each whole. Padding is where the prompts have it,
    and on the left where they have none.

    Raises:
        ValueError: a prompt is longer than ``max_length``, or prompts are padded on different sides.
    """
    on_the_left = bool(own[:, -1].all())
    if not on_the_left and not own[:, 0].all():
        raise ValueError("attention_mask has padding on both sides, expected one side for all prompts")
    rows, kept, counts, places = [], [], [], []
    for r, (mask, chosen) in enumerate(zip(own, demonstrations, strict=True)):
        seen = mask.nonzero().flatten().tolist()
        tokens = range(seen[0], seen[-1] + 1)
        if max_length is not None and len(tokens) > max_length:
            raise ValueError(f"prompt {r} has {len(tokens)} tokens, expected at most max_length={max_length}")
        chosen = _last_that_fit(chosen, lengths, None if max_length is None else max_length - len(tokens))
        fused = [FUSED] * sum(lengths[demonstration] for demonstration in chosen)
        rows.append([*tokens[: leading[r]], *fused, *tokens[leading[r] :]])
        kept += chosen
        counts.append(len(chosen))
        places.append(leading[r])
    L = max(map(len, rows))
    padding = [[PADDING] * (L - len(row)) for row in rows]
    source = [pad + row if on_the_left else row + pad for pad, row in zip(padding, rows, strict=True)]
    starts = [place + len(pad) * on_the_left for place, pad in zip(places, padding, strict=True)]
    return Plan(torch.tensor(source), starts, kept, counts)


def _last_that_fit(chosen: Sequence[int], lengths: Mapping[int, int], room: int | None) -> list[int]:
    if room is None:
        return list(chosen)
    first = len(chosen)
    while first > 0 and lengths[chosen[first - 1]] <= room:
        first -= 1
        room -= lengths[chosen[first]]
    return list(chosen[first:])


def grow(
    inputs: Mapping[str, object], plan: Plan, placeholder_id: int, pad_id: int, per_image: Sequence[str] = ()
) -> dict[str, object]:  # fmt: skip
    """``inputs`` with every per-token entry as long as the plan; the others, and ``per_image``, as they are.

    Raises:
        ValueError: an input that the model has to make itself, or one that looks as if it had one entry
            per token, but it is not known what fused tokens have there.
    """
    R, T = inputs["input_ids"].shape
    grown = dict(inputs)
    for name, value in inputs.items():
        if name in per_image:
            continue
        if name in REFUSED and value is not None:
            raise ValueError(f"{name} was given, expected none: the model makes it for the longer prompt")
        if name in FILL and value is not None:
            if value.shape[:2] != (R, T):
                raise ValueError(f"{name} has shape {list(value.shape)}, expected [{R}, {T}, ...]")
            grown[name] = _take(value, plan.source, FILL[name], FILL[name])
        elif name not in ("input_ids", "attention_mask") and _per_token(value, R, T):
            raise ValueError(f"{name} has shape {list(value.shape)}, one entry per token: splice() knows "
                             f"input_ids, attention_mask, {', '.join(FILL)}")  # fmt: skip
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    grown["input_ids"] = _take(inputs["input_ids"], plan.source, pad_id, placeholder_id)
    grown["attention_mask"] = _take(mask, plan.source, 0, 1)
    return grown


def _per_token(value: object, R: int, T: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (R, T)


def _take(x: Tensor, source: Tensor, padding: int, fused: int) -> Tensor:
    """``x [R, T, ...]`` at ``source [R, L]``."""
    source = source.to(x.device)
    shape = (*source.shape, *[1] * (x.dim() - 2))
    rows = torch.arange(len(source), device=x.device)[:, None]
    taken = x[rows, source.clamp(min=0)]
    taken = taken.masked_fill((source == PADDING).view(shape), padding)
    return taken.masked_fill((source == FUSED).view(shape), fused)
