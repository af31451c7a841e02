"""Where every fused token and every prompt goes, and the copies: the kernels in plain PyTorch.

C++ (csrc/cpu) and ``_triton`` have the same ``prefix_splice_fwd``, ``prefix_splice_place_`` and
``prefix_splice_bwd``.

A place is a batch row's first row in the flat batch and a position in that batch row; a token of it is
there if its position lies in ``[0, L)``. A packed batch is one batch row. What is dropped is at DROPPED.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import accumulation_dtype
from mmicl_kernels.ops.prefix_splice.reference import IGNORED

NO_LIMIT = 2**62  # tokens of a request
DROPPED = -(2**48)  # so far before a batch row that no token of a demonstration reaches it


class Spans(NamedTuple):
    """What there is one of per request, as Python numbers.

    kept: its first occurrence that is not dropped. begins: position of its first token in its batch row.
    fused, own: its tokens of either kind. padding: rows of padding before and after it.
    """

    kept: list[int]
    begins: list[int]
    fused: list[int]
    own: list[int]
    padding: list[tuple[int, int]]


def prompt_bounds(
    like: Tensor, R: int, T: int, start: Tensor | None, end: Tensor | None, cu_prompt: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The first row of every request's prompt among ``[R * T]`` or ``[T]`` rows, and its tokens; int64."""
    if cu_prompt is not None:
        bounds = cu_prompt.long()
        return bounds[:-1], bounds.diff()
    none = torch.zeros(R, dtype=torch.long, device=like.device)
    first = none if start is None else start.long()
    last = none + T if end is None else end.long()
    return first + T * torch.arange(R, device=like.device), last - first


def demo_bounds(offsets: Tensor, demo_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first bank row of every named demonstration and its tokens; int64 ``[K]``."""
    ids = demo_ids.long()
    first = offsets[ids].long()
    return first, offsets[ids + 1] - first


def lay_out(
    sizes: list[int], ends: list[int], own: list[int], layout: str, length: int, max_length: int
) -> Spans:
    """Where every request goes; there is at least one.

    Raises:
        ValueError: a packed batch has more than ``length`` tokens.
    """
    requests, total = [], 0
    for low, k, n in zip(ends, ends[1:], own, strict=False):
        fused = 0
        while k > low and sizes[k - 1] <= max_length - n - fused:
            k -= 1
            fused += sizes[k]
        if layout == "packed":
            requests.append((k, total, fused, n, (0, 0)))
            total += fused + n
        else:
            left = length - fused - n
            padding = (left, 0) if layout == "left" else (0, left)
            requests.append((k, padding[0], fused, n, padding))
    if total > length:
        raise ValueError(f"length is {length}, expected at least the {total} tokens of the packed batch")
    spans = Spans(*map(list, zip(*requests, strict=True)))
    if layout == "packed":
        spans.padding[-1] = (0, length - total)
    return spans


def places_of(
    sizes: list[int], ends: list[int], kept: list[int], begins: list[int], rows: list[int]
) -> list[list[int]]:
    """demo_places: the batch row and the position of every occurrence, in order from ``begins`` on."""
    row, position = [0] * len(sizes), [DROPPED] * len(sizes)
    for high, first, at, b in zip(ends[1:], kept, begins, rows, strict=True):
        for k in range(first, high):
            row[k], position[k] = b, at
            at += sizes[k]
    return [row, position]


def runs(places: Tensor, sizes: Tensor, sources: Tensor, rows: int, length: int) -> Tensor:
    """For each of ``rows`` rows of a batch its source, or -1.

    Run i, ``sizes[i]`` long, lies at ``places[:, i]`` and comes from ``sources[i]`` and what follows.
    Its first row counts up with i, and no two runs overlap.
    """
    if sizes.shape[0] == 0:
        return torch.full((rows,), -1, dtype=torch.long, device=sizes.device)
    row, position = places
    low, high = position.clamp(0, length), (position + sizes).clamp(0, length)
    first = torch.where(low < high, row + low, rows)  # past the end: runs without a row
    # Each row belongs to the last run that begins at or before it.
    run = torch.full((rows + 1,), -1, dtype=torch.long, device=sizes.device)
    index = torch.arange(sizes.shape[0], device=sizes.device)
    run = run.scatter_reduce(0, first, index, "amax")[:rows].cummax(0).values
    j = torch.arange(rows, device=sizes.device)
    inside = (run >= 0) & (j < (row + high)[run])
    return (j + (sources - row - position)[run]).where(inside, -1)


def prefix_splice_fwd(
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
) -> tuple[Tensor, ...]:
    """embeddings, attention_mask, position_ids, cu_seqlens, labels (empty without), and the places."""
    R = cu_demos.shape[0] - 1
    B = 1 if layout == "packed" else R
    if R == 0:
        return empty_outputs(prompt, demo_ids.shape[0], R, B, length, labels is not None, filled=True)
    ids, ends = demo_ids.tolist(), cu_demos.tolist()
    first, sizes = (x.tolist() for x in demo_bounds(offsets, demo_ids))
    own_first, own = (
        x.tolist() for x in prompt_bounds(prompt, R, prompt.shape[1], prompt_start, prompt_end, cu_prompt)
    )
    spans = lay_out(sizes, ends, own, layout, length, max_length)
    views = demonstrations(bank, bank_scale, ids, first, sizes, prompt.dtype)
    fused = [[views[d] for d in ids[k:end]] for k, end in zip(spans.kept, ends[1:], strict=True)]
    outputs = empty_outputs(prompt, len(ids), R, B, length, labels is not None)
    join(spans, fused, prompt.flatten(0, 1), own_first, 0, outputs[0])
    if labels is not None:
        ignored = labels.new_full((length,), IGNORED, dtype=torch.long)
        covered = [[ignored[:n]] for n in spans.fused]
        join(spans, covered, labels.flatten().long(), own_first, IGNORED, outputs[4])
    rows = [0] * R if layout == "packed" else [r * length for r in range(R)]
    demo_places = places_of(sizes, ends, spans.kept, spans.begins, rows)
    like = {"dtype": torch.long, "device": prompt.device}
    outputs[5].copy_(torch.tensor(demo_places, **like))
    row, begins, fused_tokens, own_tokens = torch.tensor([rows, *spans[1:4]], **like)
    torch.stack([row, begins + fused_tokens], out=outputs[6])
    write_positions(begins, fused_tokens + own_tokens, *outputs[1:4])
    return outputs


def write_positions(
    begins: Tensor, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, cu_seqlens: Tensor
) -> None:
    """From every request's first position and tokens ``[R]``; one batch row for several is a packed batch."""
    B, length = position_ids.shape
    cu_seqlens[0] = 0
    cu_seqlens[1:] = tokens.cumsum(0)
    position = torch.arange(length, device=tokens.device)
    if len(tokens) > B:
        # The rows at the end, without a request, count from the end of the last one.
        begins = torch.cat([begins, begins[-1:] + tokens[-1:]])
        spread = torch.cat([tokens, length - begins[-1:]])
        position = (position - begins.repeat_interleave(spread))[None]
        torch.lt(torch.arange(length, device=tokens.device), begins[-1], out=attention_mask[0])
    else:
        position = position - begins[:, None]
        torch.ge(position, 0, out=attention_mask).mul_(position < tokens[:, None])
    torch.mul(position, attention_mask, out=position_ids)


def demonstrations(
    bank: Tensor,
    bank_scale: Tensor | None,
    ids: list[int],
    first: list[int],
    sizes: list[int],
    dtype: torch.dtype,
) -> dict[int, Tensor]:
    """Views of the bank, or rows made from it in ``dtype``, by id."""
    # One split makes all views: a Python call for each would take longer than to copy them.
    parts, numbers, end = [], {}, 0
    for d, low, size in sorted(set(zip(ids, first, sizes, strict=True))):
        if low > end:
            parts.append(low - end)
        numbers[d] = len(parts)
        parts.append(size)
        end = low + size
    parts.append(len(bank) - end)
    pieces = bank.split_with_sizes(parts)
    if bank.dtype == dtype:
        return {d: pieces[i] for d, i in numbers.items()}
    if bank_scale is None:
        return {d: pieces[i].to(dtype) for d, i in numbers.items()}
    scales = bank_scale.split_with_sizes(parts)
    return {d: scaled(pieces[i], scales[i], dtype) for d, i in numbers.items()}


def scaled(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows * scale`` in fp32 (fp64 for fp64), rounded once."""
    acc = torch.promote_types(dtype, torch.float32)
    return (rows.to(acc) * scale[:, None].to(acc)).to(dtype)


def join(
    spans: Spans, fused: list[list[Tensor]], prompt: Tensor, prompt_first: list[int], fill: int, out: Tensor
) -> None:
    """Writes all rows of the batch ``out [B, L, ...]`` in order, in one copy."""
    padding = out.new_full((max(map(max, spans.padding)), *out.shape[2:]), fill)
    pieces = []
    for (before, after), rows, first, n in zip(spans.padding, fused, prompt_first, spans.own, strict=True):
        pieces += [padding[:before], *rows, prompt[first : first + n], padding[:after]]
    torch.cat(pieces, out=out.flatten(0, 1))


def empty_outputs(
    prompt: Tensor, K: int, R: int, B: int, length: int, has_labels: bool, filled: bool = False
) -> tuple[Tensor, ...]:
    """The outputs of ``prefix_splice_fwd``, uninitialised; or ``filled`` as without any token."""
    make = torch.Tensor.new_zeros if filled else torch.Tensor.new_empty
    long = {"dtype": torch.long}
    labels = prompt.new_empty((B, length) if has_labels else 0, **long)
    return (
        make(prompt, (B, length, prompt.shape[-1])),
        make(prompt, (B, length), **long),
        make(prompt, (B, length), **long),
        make(prompt, (R + 1,), dtype=torch.int32),
        labels.fill_(IGNORED) if filled else labels,
        make(prompt, (2, K), **long),
        make(prompt, (2, R), **long),
    )


def prefix_splice_place_(
    embeddings: Tensor,
    bank: Tensor,
    bank_scale: Tensor | None,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes the fused tokens' rows of ``embeddings``; the places of demonstrations and of their ends."""
    B, L, C = embeddings.shape
    R = cu_demos.shape[0] - 1
    if R == 0 or B == 0:
        shapes = ((2, demo_ids.shape[0]), (2, R))
        return tuple(starts.new_full(shape, DROPPED, dtype=torch.long) for shape in shapes)
    ids, ends, at = demo_ids.tolist(), cu_demos.tolist(), starts.tolist()
    first, sizes = (x.tolist() for x in demo_bounds(offsets, demo_ids))
    views = demonstrations(bank, bank_scale, ids, first, sizes, embeddings.dtype)
    last = []
    for r, rows in enumerate(embeddings.unflatten(0, (R, -1))):
        fused, start = [views[d] for d in ids[ends[r] : ends[r + 1]]], at[r]
        last.append(start + sum(map(len, fused)))
        low, high = min(max(start, 0), L), min(max(last[r], 0), L)
        if low < high:
            rows[:, low:high] = torch.cat(fused)[low - start : high - start]
    batch_rows = [r * (B // R) * L for r in range(R)]
    like = {"dtype": torch.long, "device": starts.device}
    demo_places = torch.tensor(places_of(sizes, ends, ends[:-1], at, batch_rows), **like)
    return demo_places, torch.tensor([batch_rows, last], **like)


def copied(source: Tensor, R: int, L: int) -> Tensor:
    """``source [B * L]`` of each request's first batch row, for all of its batch rows."""
    return source.view(R, -1, L)[:, :1].expand(R, source.numel() // (R * L), L).reshape(-1)


def prefix_splice_bwd(
    dout: Tensor,
    offsets: Tensor,
    demo_ids: Tensor,
    demo_places: Tensor,
    prompt_places: Tensor,
    prompt_shape: list[int],
    prompt_start: Tensor | None,
    prompt_end: Tensor | None,
    cu_prompt: Tensor | None,
    N: int,
    bank_dtype: torch.dtype,
    need_dbank: bool,
    need_dprompt: bool,
) -> tuple[Tensor, Tensor]:
    """``dbank [N, C]`` and ``dprompt`` from ``dout [B, L, C]``; what is not needed is empty.

    With ``need_dbank`` alone several batch rows may belong to one request.
    """
    B, L, C = dout.shape
    R = prompt_places.shape[1]
    dbank, dprompt = dout.new_empty(0), dout.new_empty(0)  # no two outputs may be one tensor
    flat = dout.reshape(B * L, C)
    if need_dbank:
        first, sizes = demo_bounds(offsets, demo_ids)
        source = runs(demo_places, sizes, first, B * L, L)
        source = copied(source, R, L) if 0 < R < B and L > 0 else source
        dbank = sum_rows(flat.to(accumulation_dtype(dout)), source, N).to(bank_dtype)
    if need_dprompt:
        first, sizes = prompt_bounds(dout, R, prompt_shape[1], prompt_start, prompt_end, cu_prompt)
        source = runs(prompt_places, sizes, first, B * L, L)
        dprompt = sum_rows(flat, source, prompt_shape[0] * prompt_shape[1]).view(prompt_shape)
    return dbank, dprompt


def sum_rows(rows: Tensor, index: Tensor, N: int) -> Tensor:
    """``[N, C]``: the sum of the rows that have each index, in their order; those of index -1 left out."""
    return torch.ops.aten.embedding_dense_backward(rows, index, N, -1, False)
