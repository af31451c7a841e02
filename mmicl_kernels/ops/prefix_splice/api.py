"""The public ops: contract, checks, dispatch."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import (
    Sizes,
    check_choice,
    check_float,
    check_integer,
    check_last_stride,
    check_range,
    check_same_device,
    is_readable,
    is_whole,
    overlaps,
)
from mmicl_kernels.ops._core.dispatch import backend, require_triton, resolve
from mmicl_kernels.ops.prefix_splice._op import prefix_splice_op, prefix_splice_op_
from mmicl_kernels.ops.prefix_splice._torch import NO_LIMIT, prompt_bounds
from mmicl_kernels.ops.prefix_splice.reference import prefix_splice_reference, prefix_splice_reference_

LAYOUTS = ("left", "right", "packed")


class Splice(NamedTuple):
    """A batch ready for a model: ``[R, L]`` padded, or ``[1, L]`` packed.

    embeddings: ``[R, L, C]`` in the prompt's dtype, 0 where padded. attention_mask: int64, 1 at tokens.
    position_ids: int64, from 0 in every request, 0 where padded. cu_seqlens: int32 ``[R + 1]``, tokens of
    the requests before. labels: int64, -100 over fused tokens and padding; None if none were given.
    """

    embeddings: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor | None


def prefix_splice(
    bank: Tensor,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    prompt: Tensor,
    *,
    length: int,
    layout: str = "left",
    max_length: int | None = None,
    prompt_start: Tensor | None = None,
    prompt_end: Tensor | None = None,
    cu_prompt: Tensor | None = None,
    labels: Tensor | None = None,
    bank_scale: Tensor | None = None,
    impl: str = "auto",
) -> Splice:
    """Write each request's fused tokens, then its prompt, into one batch: AIM (arXiv 2406.07588).

    Request r is the demonstrations ``demo_ids[cu_demos[r]:cu_demos[r + 1]]``, in this order, repeated ones
    included; demonstration d is the rows ``bank[offsets[d]:offsets[d + 1]]``. Nothing is read back from the
    device. Gradients reach ``bank`` (a demonstration's sum over all its uses, in a fixed order) and
    ``prompt``.

    **Truncation.** A request has at most ``max_length`` tokens. The prompt is never cut. Of the
    demonstrations the longest run of last ones that fits beside it is kept, each of them whole.

    Args:
        bank: fused tokens ``[N, C]``, any floating dtype, or int8 beside ``bank_scale``; contiguous last
            dimension. The result is the prompt's dtype.
        offsets: int32 or int64 ``[M + 1]``, not decreasing. demo_ids: int32 or int64 ``[K]``.
        cu_demos: int32 or int64 ``[R + 1]``, from 0; ids past its last are not used, but checked.
        prompt: the prompts' own embeddings, ``[R, T, C]``, of which request r has the rows from
            ``prompt_start[r]`` (0 if None) to ``prompt_end[r]`` (T if None), int32 or int64 ``[R]``; or
            packed ``[1, T, C]`` with ``cu_prompt``, int32 or int64 ``[R + 1]``. fp16, bf16, fp32, fp64.
        length: L, the padded length, or the rows of a packed batch.
        layout: "left" or "right", where the padding is, or "packed"; its unused rows come last.
        max_length: tokens of a request, fused and own; ``length`` if None, and no more where padded.
        labels: int32 or int64 in the shape of ``prompt`` without C; the prompt's own labels.
        bank_scale: ``[N]``, floating; a row is ``bank[n] * bank_scale[n]``. Such a bank has no gradient.
        impl: "reference" (reads ids on the host), "composed" (Triton on CUDA; where that is not installed
            it reads ids too), "triton" or "auto".

    Returns:
        A :class:`Splice` of new tensors.

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device or unknown name; and where it can be read
        (a CPU tensor outside of a compiled graph) an id or bound out of range, a prompt longer than
        ``max_length`` or a packed batch longer than ``length``. On CUDA such values are not checked; they
        make rows of zeros or of other demonstrations, never a read or write out of bounds.
        NotImplementedError: an ``impl`` this op does not have. RuntimeError: "triton" on CPU tensors
        without ``TRITON_INTERPRET=1``.
    """
    sizes = Sizes()
    _check_bank(sizes, bank, bank_scale, offsets, demo_ids, cu_demos)
    _check_prompt(sizes, prompt, prompt_start, prompt_end, cu_prompt, labels)
    check_choice("layout", layout, LAYOUTS)
    _check_count("length", length)
    max_length = length if max_length is None else max_length
    _check_count("max_length", max_length, None if layout == "packed" else length)
    length, max_length = int(length), min(int(max_length), NO_LIMIT)
    check_same_device(
        bank=bank, bank_scale=bank_scale, offsets=offsets, demo_ids=demo_ids, cu_demos=cu_demos,
        prompt=prompt, prompt_start=prompt_start, prompt_end=prompt_end, cu_prompt=cu_prompt, labels=labels,
    )  # fmt: skip
    spliced = (bank, bank_scale, offsets, demo_ids, cu_demos)
    own = (prompt, prompt_start, prompt_end, cu_prompt)
    impl = _named_impl(impl, prompt)
    if prompt_start is prompt_end is cu_prompt is None:
        _check_tokens([sizes["T"]] * min(sizes["R"], 1), max_length)
    if _must_check_values(impl, prompt):
        _check_demonstrations(sizes, offsets, demo_ids, cu_demos)
        _check_prompt_bounds(sizes, own, max_length)
    if impl == "reference":
        return Splice(*prefix_splice_reference(*spliced, *own, labels, layout, length, max_length))
    outputs = prefix_splice_op(*spliced, *own, labels, layout, length, max_length, impl)
    return Splice(*outputs[:4], None if labels is None else outputs[4])


def prefix_splice_(
    embeddings: Tensor,
    bank: Tensor,
    offsets: Tensor,
    demo_ids: Tensor,
    cu_demos: Tensor,
    starts: Tensor,
    *,
    bank_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Overwrite the rows that are kept free for fused tokens, in place: what an embedding hook does.

    The fused tokens of request r go to the rows ``starts[r]``, ``starts[r] + 1``, ... of its batch row. Rows
    outside of ``[0, L)`` are left out, so a chunk of a prompt takes ``starts`` less its first position.
    Gradients reach ``bank`` and, but for the overwritten rows, what ``embeddings`` was made from.

    Args:
        embeddings: ``[B, L, C]``, floating, contiguous last dimension, rows that share no memory. B is R, or
            a multiple: the rows of one request (beams) lie together and get the same tokens.
        bank, offsets, demo_ids, cu_demos, bank_scale, impl: as in :func:`prefix_splice`.
        starts: int32 or int64 ``[R]``, may be negative.

    Returns:
        ``embeddings``.

    Raises:
        As :func:`prefix_splice`.
    """
    sizes = Sizes()
    _check_bank(sizes, bank, bank_scale, offsets, demo_ids, cu_demos)
    sizes.bind("embeddings", embeddings, "B L C")
    check_float("embeddings", embeddings)
    check_last_stride("embeddings", embeddings)
    if overlaps(embeddings):
        raise ValueError(f"embeddings has strides {list(embeddings.stride())}, expected rows of their own")
    sizes.bind("starts", starts, "R")
    check_integer("starts", starts)
    B, R = sizes["B"], sizes["R"]
    if B != 0 and (R == 0 or B % R != 0):
        raise ValueError(f"embeddings has {B} rows, expected a multiple of the {R} requests of cu_demos")
    check_same_device(
        embeddings=embeddings, bank=bank, bank_scale=bank_scale, offsets=offsets, demo_ids=demo_ids,
        cu_demos=cu_demos, starts=starts,
    )  # fmt: skip
    arguments = (embeddings, bank, bank_scale, offsets, demo_ids, cu_demos, starts)
    impl = _named_impl(impl, embeddings)
    if _must_check_values(impl, embeddings):
        _check_demonstrations(sizes, offsets, demo_ids, cu_demos)
    if impl == "reference":
        return prefix_splice_reference_(*arguments)
    return prefix_splice_op_(*arguments, impl)


def _named_impl(impl: str, x: Tensor) -> str:
    impl = resolve(impl, ("reference", "composed", "triton"), "composed", "prefix_splice")
    if impl == "triton":
        require_triton(x.device)
    return impl


def _check_bank(
    sizes: Sizes, bank: Tensor, scale: Tensor | None, offsets: Tensor, demo_ids: Tensor, cu_demos: Tensor
) -> None:
    sizes.bind("bank", bank, "N C")
    check_last_stride("bank", bank)
    if scale is None:
        if bank.dtype == torch.int8:
            raise ValueError("bank has dtype torch.int8 without bank_scale, expected a scale [N] beside it")
        check_float("bank", bank)
    else:
        sizes.bind("bank_scale", scale, "N")
        check_float("bank_scale", scale)
        if bank.dtype != torch.int8:
            raise TypeError(f"bank has dtype {bank.dtype}, expected torch.int8 beside bank_scale")
        if scale.requires_grad:
            raise ValueError("bank_scale requires grad, expected a constant: an int8 bank has no gradient")
    for name, values, letters in (
        ("offsets", offsets, "M+1"), ("demo_ids", demo_ids, "K"), ("cu_demos", cu_demos, "R+1"),
    ):  # fmt: skip
        sizes.bind(name, values, letters)
        check_integer(name, values)
    for name, size in (("offsets", sizes["M+1"]), ("cu_demos", sizes["R+1"])):
        if size == 0:
            raise ValueError(f"{name} is empty, expected at least [0]")
    sizes["R"] = sizes["R+1"] - 1


def _check_prompt(
    sizes: Sizes,
    prompt: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    cu_prompt: Tensor | None,
    labels: Tensor | None,
) -> None:
    if cu_prompt is None:
        sizes.bind("prompt", prompt, "R T C")
    else:
        if start is not None or end is not None:
            raise ValueError("cu_prompt was given beside prompt_start or prompt_end, expected one kind")
        sizes.bind("prompt", prompt, "1 T C")
        if prompt.shape[0] != 1:
            raise ValueError(f"prompt has shape {list(prompt.shape)}, expected [1, T, C] beside cu_prompt")
        sizes.bind("cu_prompt", cu_prompt, "R+1")
        check_integer("cu_prompt", cu_prompt)
    check_float("prompt", prompt)
    check_last_stride("prompt", prompt)
    for name, bound in (("prompt_start", start), ("prompt_end", end)):
        if bound is not None:
            sizes.bind(name, bound, "R")
            check_integer(name, bound)
    if labels is not None:
        sizes.bind("labels", labels, "R T" if cu_prompt is None else "1 T")
        check_integer("labels", labels)


def _check_count(name: str, value: int, most: int | None = None) -> None:
    if not is_whole(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0 or (most is not None and value > most):
        raise ValueError(f"{name} is {value}, expected " + ("0 or more" if most is None else f"0 to {most}"))


def _must_check_values(impl: str, x: Tensor) -> bool:
    """Whether ids and bounds are to be checked here: where they can be read, but not for the kernels in C++.

    Those check them themselves, with the same messages.
    """
    return is_readable(x) and (impl == "reference" or backend(impl, x.device) != "cpp")


def _check_demonstrations(sizes: Sizes, offsets: Tensor, demo_ids: Tensor, cu_demos: Tensor) -> None:
    check_range("demo_ids", demo_ids, 0, sizes["M+1"] - 2)
    _check_bounds("offsets", offsets, sizes["N"])
    _check_bounds("cu_demos", cu_demos, sizes["K"])
    if cu_demos[0] != 0:
        raise ValueError(f"cu_demos begins with {int(cu_demos[0])}, expected 0")


def _check_bounds(name: str, bounds: Tensor, most: int) -> None:
    check_range(name, bounds, 0, most)
    if bool((bounds[1:] < bounds[:-1]).any()):
        raise ValueError(f"{name} decreases, expected bounds from 0 to {most} in order")


def _check_prompt_bounds(sizes: Sizes, own: tuple[Tensor | None, ...], max_length: int) -> None:
    prompt, start, end, cu_prompt = own
    if cu_prompt is not None:
        _check_bounds("cu_prompt", cu_prompt, sizes["T"])
    for name, bound in (("prompt_start", start), ("prompt_end", end)):
        if bound is not None:
            check_range(name, bound, 0, sizes["T"])
    _check_tokens(prompt_bounds(prompt, sizes["R"], sizes["T"], *own[1:])[1].tolist(), max_length)


def _check_tokens(tokens: list[int], max_length: int) -> None:
    """Raise ValueError where a prompt has more tokens than a request may have, or less than none."""
    for r, n in enumerate(tokens):
        if not 0 <= n <= max_length:
            raise ValueError(f"prompt has {n} tokens in request {r}, expected 0 to max_length = {max_length}")
