"""Fused tokens before a prompt, one request after the other: the specification.

Sources: AIM (arXiv 2406.07588), prompt = [C_1; ...; C_k; prompt's own embeddings].
"""

import torch
from torch import Tensor

IGNORED = -100  # the label that no loss counts, as in torch.nn.functional.cross_entropy

Sequences = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def prefix_splice_reference(
    bank: Tensor,
    bank_scale: Tensor | None,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    prompt: Tensor,
    prompt_start: Tensor | None,
    prompt_end: Tensor | None,
    cu_prompt: Tensor | None,
    labels: Tensor | None,
    layout: str,
    length: int,
    max_length: int,
) -> Sequences:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.prefix_splice`, with autograd; reads every id.

    Returns:
        embeddings, attention_mask, position_ids, cu_seqlens and labels (None without ``labels``).
    """
    demonstrations = _named(bank, bank_scale, offsets, demo_ids, cu_demos, prompt.dtype)
    rows, masks, positions, targets = [], [], [], []
    for r, tokens in enumerate(demonstrations):
        own = _prompt_rows(r, prompt, prompt_start, prompt_end, cu_prompt)
        fused = _newest_that_fit(tokens, max_length - len(prompt[own]))
        sequence = torch.cat([*fused, prompt[own]])
        ignored = demo_ids.new_full((sum(map(len, fused)),), IGNORED, dtype=torch.long)
        rows.append(sequence)
        masks.append(demo_ids.new_ones(len(sequence), dtype=torch.long))
        positions.append(torch.arange(len(sequence), device=prompt.device))
        targets.append(torch.cat([ignored, labels[own].long()]) if labels is not None else ignored)
    batch = [_batched(x, layout, length, like, fill) for x, like, fill in (
        (rows, prompt, 0), (masks, demo_ids.long(), 0), (positions, demo_ids.long(), 0),
        (targets, demo_ids.long(), IGNORED),
    )]  # fmt: skip
    lengths = torch.tensor([0, *map(len, rows)], device=prompt.device)
    return *batch[:3], lengths.cumsum(0).int(), None if labels is None else batch[3]


def prefix_splice_reference_(
    embeddings: Tensor,
    bank: Tensor,
    bank_scale: Tensor | None,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    starts: Tensor,
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.prefix_splice_`."""
    B, L, C = embeddings.shape
    demonstrations = _named(bank, bank_scale, offsets, demo_ids, cu_demos, embeddings.dtype)
    for b in range(B):
        r = b * len(demonstrations) // B
        fused = torch.cat([embeddings.new_empty(0, C), *demonstrations[r]])
        first = int(starts[r])
        low, high = max(first, 0), min(max(first + len(fused), 0), L)
        if low < high:
            embeddings[b, low:high] = fused[low - first : high - first]
    return embeddings


def _named(
    bank: Tensor,
    bank_scale: Tensor | None,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """The fused tokens ``[n, C]`` of every demonstration of every request."""
    bounds, ids, ends = offsets.tolist(), demo_ids.tolist(), cu_demos.tolist()
    acc = torch.promote_types(dtype, torch.float32)

    def fused(d: int) -> Tensor:
        rows = bank[bounds[d] : bounds[d + 1]]
        if bank_scale is not None:
            rows = rows.to(acc) * bank_scale[bounds[d] : bounds[d + 1], None].to(acc)
        return rows.to(dtype)

    return [[fused(d) for d in ids[a:b]] for a, b in zip(ends, ends[1:], strict=False)]


def _prompt_rows(
    r: int, prompt: Tensor, start: Tensor | None, end: Tensor | None, cu_prompt: Tensor | None
) -> tuple[int, slice]:
    """Where the prompt's own tokens of request ``r`` are."""
    if cu_prompt is not None:
        return 0, slice(int(cu_prompt[r]), int(cu_prompt[r + 1]))
    return r, slice(0 if start is None else int(start[r]), prompt.shape[1] if end is None else int(end[r]))


def _newest_that_fit(tokens: list[Tensor], room: int) -> list[Tensor]:
    """Whole demonstrations, the last ones first, until one does not fit."""
    kept: list[Tensor] = []
    for demonstration in reversed(tokens):
        room -= len(demonstration)
        if room < 0:
            break
        kept.insert(0, demonstration)
    return kept


def _batched(rows: list[Tensor], layout: str, length: int, like: Tensor, fill: int) -> Tensor:
    """Rows of unequal length in one tensor of ``like``'s kind, the rest filled."""

    def padded(x: Tensor, before: bool = False) -> Tensor:
        if len(x) > length:
            raise ValueError(f"length is {length}, expected at least the {len(x)} tokens of the batch")
        pad = like.new_full((length - len(x), *x.shape[1:]), fill)
        return torch.cat([pad, x] if before else [x, pad])

    nothing = like.flatten()[:0]  # which autograd knows to come from the prompt
    if layout == "packed":
        return padded(torch.cat([nothing.view(0, *like.shape[2:]), *rows]))[None]
    if not rows:
        return nothing.view(0, length, *like.shape[2:])
    return torch.stack([padded(x, before=layout == "left") for x in rows])
