"""``prefix_splice`` as registered operators: out of place, in place, and their backward."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    distinct,
    kernels_of,
    needs_grad,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import last_dim_contiguous
from mmicl_kernels.ops.prefix_splice import _torch
from mmicl_kernels.ops.prefix_splice._torch import DROPPED, empty_outputs

_BANK = "Tensor bank, Tensor? bank_scale, Tensor offsets, Tensor demo_ids, Tensor cu_demos"
_BOUNDS = "Tensor? prompt_start, Tensor? prompt_end, Tensor? cu_prompt"
torch.library.define(
    "mmicl::prefix_splice_fwd",
    f"({_BANK}, Tensor prompt, {_BOUNDS}, Tensor? labels, str layout, SymInt length, SymInt max_length,"
    " str impl) -> (Tensor embeddings, Tensor attention_mask, Tensor position_ids, Tensor cu_seqlens,"
    " Tensor labels, Tensor demo_places, Tensor prompt_places)",
)
torch.library.define(
    "mmicl::prefix_splice_place_",
    f"(Tensor(a!) embeddings, {_BANK}, Tensor starts, str impl) -> (Tensor demo_places, Tensor end_places)",
)
torch.library.define(
    "mmicl::prefix_splice_bwd",
    "(Tensor dout, Tensor offsets, Tensor demo_ids, Tensor demo_places, Tensor prompt_places,"
    f" SymInt[] prompt_shape, {_BOUNDS}, SymInt N, ScalarType bank_dtype, bool need_dbank, bool need_dprompt,"
    " str impl) -> (Tensor dbank, Tensor dprompt)",
)

_kernels = kernels_of(__package__, _torch)


def _prefix_splice_fwd(bank, *arguments):
    *arguments, impl = arguments
    return _kernels(impl, bank.device).prefix_splice_fwd(bank, *arguments)


torch.library.impl("mmicl::prefix_splice_fwd", ("cpu", "cuda"), _prefix_splice_fwd)


@torch.library.register_fake("mmicl::prefix_splice_fwd")
def _prefix_splice_fwd_fake(
    bank, bank_scale, offsets, demo_ids, cu_demos, prompt, prompt_start, prompt_end, cu_prompt, labels,
    layout, length, max_length, impl,
):  # fmt: skip
    R = cu_demos.shape[0] - 1
    B = 1 if layout == "packed" else R
    return empty_outputs(prompt, demo_ids.shape[0], R, B, length, labels is not None)


def _prefix_splice_place_(embeddings, *arguments):
    *arguments, starts, impl = arguments
    if starts.device.type == "cpu":  # where places are Python's and C++'s numbers, which must not overflow
        starts = starts.long().clamp(DROPPED, -DROPPED)
    return _kernels(impl, embeddings.device).prefix_splice_place_(embeddings, *arguments, starts)


torch.library.impl("mmicl::prefix_splice_place_", ("cpu", "cuda"), _prefix_splice_place_)


@torch.library.register_fake("mmicl::prefix_splice_place_")
def _prefix_splice_place_fake(embeddings, bank, bank_scale, offsets, demo_ids, cu_demos, starts, impl):
    return tuple(starts.new_empty(2, x.shape[0], dtype=torch.long) for x in (demo_ids, starts))


def _prefix_splice_bwd(dout, *arguments):
    *arguments, impl = arguments
    return _kernels(impl, dout.device).prefix_splice_bwd(dout, *arguments)


torch.library.impl("mmicl::prefix_splice_bwd", ("cpu", "cuda"), _prefix_splice_bwd)


@torch.library.register_fake("mmicl::prefix_splice_bwd")
def _prefix_splice_bwd_fake(
    dout, offsets, demo_ids, demo_places, prompt_places, prompt_shape, prompt_start, prompt_end, cu_prompt, N,
    bank_dtype, need_dbank, need_dprompt, impl,
):  # fmt: skip
    C = dout.shape[2]
    dbank = dout.new_empty(N, C, dtype=bank_dtype) if need_dbank else dout.new_empty(0)
    return dbank, dout.new_empty(prompt_shape) if need_dprompt else dout.new_empty(0)


class _PrefixSpliceFunction(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return torch.ops.mmicl.prefix_splice_fwd(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        bank, _, offsets, demo_ids, _, prompt, *bounds, _, _, _, _, ctx.impl = inputs
        ctx.N, ctx.bank_dtype, ctx.prompt_shape = bank.shape[0], bank.dtype, list(prompt.shape)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for six outputs, by six launches
        ctx.save_for_backward(offsets, demo_ids, *output[5:], *bounds)

    @staticmethod
    @refuse_double_backward("prefix_splice")
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * 14
        offsets, demo_ids, demo_places, prompt_places, *bounds = ctx.saved_tensors
        need_dbank, need_dprompt = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        dbank, dprompt = torch.ops.mmicl.prefix_splice_bwd(
            last_dim_contiguous(dout), offsets, demo_ids, demo_places, prompt_places, ctx.prompt_shape,
            *bounds, ctx.N, ctx.bank_dtype, need_dbank, need_dprompt, ctx.impl,
        )  # fmt: skip
        grads = [None] * 14
        grads[0], grads[5] = dbank if need_dbank else None, dprompt if need_dprompt else None
        return tuple(grads)

    vmap = staticmethod(refuse_vmap("prefix_splice"))


class _PrefixSplicePlaceFunction(torch.autograd.Function):
    # Without setup_context: it would need the places as outputs, and a function that writes into a view
    # may have one output alone.
    @staticmethod
    def forward(ctx, embeddings, bank, bank_scale, offsets, demo_ids, cu_demos, starts, impl):
        places = torch.ops.mmicl.prefix_splice_place_(
            embeddings, bank, bank_scale, offsets, demo_ids, cu_demos, starts, impl
        )
        ctx.N, ctx.bank_dtype, ctx.impl = bank.shape[0], bank.dtype, impl
        ctx.mark_dirty(embeddings)
        ctx.save_for_backward(offsets, demo_ids, starts, *places)
        return embeddings

    @staticmethod
    @refuse_double_backward("prefix_splice_")
    def backward(ctx, dout):
        offsets, demo_ids, starts, demo_places, end_places = ctx.saved_tensors
        need_dembeddings, need_dbank, *_ = ctx.needs_input_grad
        dembeddings = dbank = None
        if need_dembeddings:
            dembeddings = dout.masked_fill(_overwritten(dout, starts, end_places), 0)
        if need_dbank:
            dbank, _ = torch.ops.mmicl.prefix_splice_bwd(
                last_dim_contiguous(dout), offsets, demo_ids, demo_places, end_places, [0, 0, dout.shape[2]],
                None, None, None, ctx.N, ctx.bank_dtype, True, False, ctx.impl,
            )  # fmt: skip
        return dembeddings, dbank, None, None, None, None, None, None


def _overwritten(dout: Tensor, starts: Tensor, end_places: Tensor) -> Tensor:
    """``[B, L, 1]``: the rows that fused tokens were written to."""
    B, L, _ = dout.shape
    j, copies = torch.arange(L, device=dout.device), B // max(starts.shape[0], 1)
    rows = (j >= starts[:, None]) & (j < end_places[1][:, None])
    return rows.repeat_interleave(copies, 0)[..., None]


torch.library.register_vmap("mmicl::prefix_splice_fwd", refuse_vmap("prefix_splice"))
torch.library.register_vmap("mmicl::prefix_splice_place_", refuse_vmap("prefix_splice_"))


def prefix_splice_op(bank, *arguments) -> tuple[Tensor, ...]:
    if needs_grad(bank, arguments[4]):
        return _PrefixSpliceFunction.apply(*distinct(bank, *arguments))
    return torch.ops.mmicl.prefix_splice_fwd(bank, *arguments)


def prefix_splice_op_(embeddings, bank, *arguments) -> Tensor:
    if needs_grad(embeddings, bank):
        return _PrefixSplicePlaceFunction.apply(*distinct(embeddings, bank, *arguments))
    torch.ops.mmicl.prefix_splice_place_(embeddings, bank, *arguments)
    return embeddings
