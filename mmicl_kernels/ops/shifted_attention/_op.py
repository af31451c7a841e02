"""``shifted_attention`` as registered operators, forward and backward, under one autograd function.

``impl`` names a module with ``forward`` and ``backward`` as in :mod:`._composed`; "auto" is resolved inside
of the operators, where a compiled graph has real tensors.
"""

import inspect
from types import ModuleType, UnionType

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import (
    distinct,
    needs_grad,
    no_autocast,
    refuse_double_backward,
    refuse_vmap,
)
from mmicl_kernels.ops._core.layout import last_dim_contiguous, new_heads
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys, parameter_grads, virtual_keys
from mmicl_kernels.ops.shifted_attention import _composed, _cuda
from mmicl_kernels.ops.shifted_attention._inference import infer, infers
from mmicl_kernels.ops.shifted_attention.dispatch import choose
from mmicl_kernels.ops.shifted_attention.options import Options, new_results


def _argument(name: str, kind: type | UnionType) -> str:
    """``float? softcap`` of ``softcap: float | None``."""
    kinds = getattr(kind, "__args__", (kind,))
    return f"{kinds[0].__name__}{'?' if len(kinds) > 1 else ''} {name}"


_OPTIONS = ", ".join(_argument(*field) for field in Options.__annotations__.items())
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor shift"

torch.library.define(
    "mmicl::shifted_attention_fwd",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor gate_lse, Tensor lse_low, Tensor a)",
)
torch.library.define(
    "mmicl::shifted_attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor a, Tensor lse, Tensor gate_lse, Tensor lse_low, bool need_dqkv,"
    f" {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _implementation(q: Tensor, k: Tensor, options: Options) -> ModuleType:
    impl = choose(q, k, options) if options.impl == "auto" else options.impl
    if impl == "triton":
        from mmicl_kernels.ops.shifted_attention import _triton

        return _triton
    return _cuda if impl == "cuda" else _composed


def _virtual_keys(q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, options: Options) -> VirtualKeys:
    which = options.adapter_ids, options.prefix, options.prefixes
    return virtual_keys(q, weight, bias, shift, *which)


def _shifted_attention_fwd(q, k, v, weight, bias, shift, *options):
    options = Options(*options)
    with no_autocast(q.device):
        keys = _virtual_keys(q, weight, bias, shift, options)
        return _implementation(q, k, options).forward(q, k, v, keys, options)


torch.library.impl("mmicl::shifted_attention_fwd", ("cpu", "cuda"), _shifted_attention_fwd)


@torch.library.register_fake("mmicl::shifted_attention_fwd")
def _shifted_attention_fwd_fake(q, k, v, weight, bias, shift, *options):
    return new_results(q, Options(*options))


def _shifted_attention_bwd(dout, dlse, a, lse, gate_lse, lse_low, need_dqkv, q, k, v, *rest):
    weight, bias, shift, *options = rest
    options = Options(*options)
    results = (a, lse, gate_lse if options.all_keys else lse, lse_low)
    with no_autocast(q.device):
        keys = _virtual_keys(q, weight, bias, shift, options)
        dqkv, grads = _implementation(q, k, options).backward(
            dout, dlse, results, need_dqkv, (q, k, v), keys, options
        )
    return *dqkv, *parameter_grads(grads, weight, bias, shift)


torch.library.impl("mmicl::shifted_attention_bwd", ("cpu", "cuda"), _shifted_attention_bwd)


@torch.library.register_fake("mmicl::shifted_attention_bwd")
def _shifted_attention_bwd_fake(dout, dlse, a, lse, gate_lse, lse_low, need_dqkv, q, k, v, *rest):
    dqkv = (new_heads(x) if need_dqkv else x.new_empty(0) for x in (q, k, v))
    return *dqkv, *(x.new_empty(x.shape) for x in rest[:3])


# The overload itself: finding it by name takes as long as the shift of a decoded token.
_fwd_op = torch.ops.mmicl.shifted_attention_fwd.default


class _ShiftedAttentionFunction(torch.autograd.Function):
    # The options travel as one argument: apply() binds every argument by name, which is slow.
    @staticmethod
    def forward(q, k, v, weight, bias, shift, options):
        return _fwd_op(q, k, v, weight, bias, shift, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *qkv_parameters, options = inputs
        _, lse, gate_lse, lse_low, a = output
        ctx.mark_non_differentiable(gate_lse, lse_low, a)
        ctx.set_materialize_grads(False)
        tensors = {name: x for name, x in options._asdict().items() if isinstance(x, Tensor)}
        ctx.options, ctx.tensor_options = options._replace(**dict.fromkeys(tensors)), list(tensors)
        ctx.save_for_backward(a, lse, gate_lse, lse_low, *qkv_parameters, *tensors.values())

    @staticmethod
    @refuse_double_backward("shifted_attention")
    def backward(ctx, dout, dlse, *_):
        saved = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        results, inputs, tensors = saved[:4], saved[4:10], saved[10:]
        options = ctx.options._replace(**dict(zip(ctx.tensor_options, tensors, strict=True)))
        dout = torch.zeros_like(results[0]) if dout is None else last_dim_contiguous(dout)
        need_dqkv = any(ctx.needs_input_grad[:3])
        grads = torch.ops.mmicl.shifted_attention_bwd(dout, dlse, *results, need_dqkv, *inputs, *options)
        dqkv = grads[:3] if need_dqkv else (None, None, None)
        return *dqkv, *grads[3:], None

    vmap = staticmethod(refuse_vmap("shifted_attention"))


# apply() asks for the signature at every call; making it takes longer than the shift of 256 tokens.
_ShiftedAttentionFunction.forward.__signature__ = inspect.signature(_ShiftedAttentionFunction.forward)
torch.library.register_vmap("mmicl::shifted_attention_fwd", refuse_vmap("shifted_attention"))


def shifted_attention_op(q, k, v, weight, bias, shift, options: Options) -> tuple[Tensor, Tensor]:
    """``out, lse`` of :func:`mmicl_kernels.ops.shifted_attention` for checked arguments."""
    inputs = (q, k, v, weight, bias, shift)
    if needs_grad(*inputs):
        options = Options(*distinct(*options._replace(training=True)))
        return _ShiftedAttentionFunction.apply(*distinct(*inputs), options)[:2]
    if infers(q, options):
        return infer(q, k, v, _virtual_keys(q, weight, bias, shift, options), options)
    return _fwd_op(*inputs, *options)[:2]
