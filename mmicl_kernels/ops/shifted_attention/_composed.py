"""Stock attention, then the shift in one more pass over its output; exact gradients by one stock backward.

Registered as two operators under one autograd function. The backward's derivation is in README.md.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.ops._impl import needs_grad, no_autocast, refuse_double_backward, refuse_vmap
from mmicl_kernels.ops.attention_shift._composed import kernels, new_output, stacked_parameters
from mmicl_kernels.ops.attention_shift._op import last_dim_contiguous, parameter_grads
from mmicl_kernels.ops.shifted_attention._stock import attention_kernel
from mmicl_kernels.ops.shifted_attention.visibility import Visibility

_OPTIONS = (
    "float scale, float? softcap, bool causal, int? window, SymInt? q_start, Tensor? q_starts,"
    " Tensor? kv_start, Tensor? kv_end, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? adapter_ids, bool all_keys"
)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor shift"

torch.library.define("mmicl::shifted_attention_fwd", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "mmicl::shifted_attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor gate_lse, bool need_dqkv,"
    f" {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class Options(NamedTuple):
    """The arguments of the operators that are not differentiated, in the order of their schema."""

    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    q_start: int | None
    q_starts: Tensor | None
    kv_start: Tensor | None
    kv_end: Tensor | None
    mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    adapter_ids: Tensor | None
    all_keys: bool

    @property
    def visibility(self) -> Visibility:
        q_start = self.q_start if self.q_starts is None else self.q_starts
        return Visibility(self.causal, self.window, q_start, self.kv_start, self.kv_end, self.mask)

    def sequences(self) -> list[tuple[slice, slice, "Options"]]:
        """Rows of queries and keys, and options, of every packed sequence; one of all if not packed."""
        if self.cu_seqlens_q is None:
            return [(slice(None), slice(None), self)]
        starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        dense = self._replace(cu_seqlens_q=None, cu_seqlens_k=None)
        ids = self.adapter_ids
        return [
            (
                slice(starts_q[n], starts_q[n + 1]),
                slice(starts_k[n], starts_k[n + 1]),
                dense._replace(adapter_ids=None if ids is None else ids[n : n + 1]),
            )
            for n in range(len(starts_q) - 1)
        ]


def _shifted_attention_fwd(q, k, v, weight, bias, shift, *options):
    options = Options(*options)
    forward = _forward if options.cu_seqlens_q is None else _packed_forward
    with no_autocast(q.device):
        return forward(q, k, v, stacked_parameters(q, weight, bias, shift), options)


torch.library.impl("mmicl::shifted_attention_fwd", ("cpu", "cuda"), _shifted_attention_fwd)


@torch.library.register_fake("mmicl::shifted_attention_fwd")
def _shifted_attention_fwd_fake(q, k, v, weight, bias, shift, *options):
    acc = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=acc)
    gate_lse = torch.empty_like(lse) if Options(*options).all_keys else lse.new_empty(0)
    return new_output(q), lse, gate_lse


def _shifted_attention_bwd(dout, dlse, out, lse, gate_lse, need_dqkv, q, k, v, *rest):
    weight, bias, shift, *options = rest
    options = Options(*options)
    backward = _backward if options.cu_seqlens_q is None else _packed_backward
    results = (out, lse, gate_lse if options.all_keys else lse)
    with no_autocast(q.device):
        parameters = stacked_parameters(q, weight, bias, shift)
        dqkv, grads = backward(dout, dlse, results, need_dqkv, (q, k, v), parameters, options)
    return *dqkv, *parameter_grads(grads, weight, bias, shift)


torch.library.impl("mmicl::shifted_attention_bwd", ("cpu", "cuda"), _shifted_attention_bwd)


@torch.library.register_fake("mmicl::shifted_attention_bwd")
def _shifted_attention_bwd_fake(dout, dlse, out, lse, gate_lse, need_dqkv, q, k, v, *rest):
    dqkv = (new_output(x) if need_dqkv else x.new_empty(0) for x in (q, k, v))
    return *dqkv, *(x.new_empty(x.shape) for x in rest[:3])


def _forward(q, k, v, parameters, options: Options):
    visibility = options.visibility
    out, lse = attention_kernel(q, k, options.scale, options.softcap, visibility).forward(q, k, v)
    gate_lse = lse
    if options.all_keys and not visibility.simplified(q.shape[2], k.shape[2]).is_all_keys():
        gate = attention_kernel(q, k, options.scale, options.softcap, visibility.all_keys())
        gate_lse = gate.forward(q, k, k)[1].masked_fill(lse == -torch.inf, -torch.inf)

    shift_kernels = kernels("composed", q.device)
    if out.transpose(1, 2).is_contiguous():
        shift_kernels.attention_shift_fwd_(out, gate_lse, q, *parameters, options.adapter_ids)
    else:
        out = shift_kernels.attention_shift_fwd(out, gate_lse, q, *parameters, options.adapter_ids)
    lse = lse.contiguous()
    return (
        out,
        lse,
        gate_lse.clone(memory_format=torch.contiguous_format) if options.all_keys else lse.new_empty(0),
    )


def _packed_forward(q, k, v, parameters, options: Options):
    out, lse, gate_lse = _shifted_attention_fwd_fake(q, k, v, *parameters, *options)
    for rows, keys, sequence in options.sequences():
        results = _forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], parameters, sequence)
        out[:, :, rows], lse[:, :, rows] = results[:2]
        if options.all_keys:
            gate_lse[:, :, rows] = results[2]
    return out, lse, gate_lse


def _backward(dout, dlse, results, need_dqkv, qkv, parameters, options: Options):
    """``dq, dk, dv`` (empty unless needed) and the gradients of the stacked parameters."""
    q, k, v = qkv
    out, lse, gate_lse = results
    shift_kernels = kernels("composed", q.device)
    gate_power = 1 if options.all_keys else 2
    dg, _, base, *dparameters = shift_kernels.attention_shift_bwd(
        dout, gate_lse, q, *parameters, options.adapter_ids, out, gate_power, False
    )
    if not need_dqkv:
        return [x.new_empty(0) for x in qkv], dparameters

    kernel = attention_kernel(q, k, options.scale, options.softcap, options.visibility)
    dq, dk, dv = kernel.backward(dout, q, k, v, base, lse)
    if options.all_keys:
        gate = attention_kernel(q, k, options.scale, options.softcap, options.visibility.all_keys())
        _add_lse_grad(gate, -dg, gate_lse, q, k, dq, dk)
    if dlse is not None:
        _add_lse_grad(kernel, dlse, lse, q, k, dq, dk)
    shift_kernels.add_gate_grad_(dq, dg, parameters[0], options.adapter_ids)
    return [_head_major(x) for x in (dq, dk, dv)], dparameters


def _packed_backward(dout, dlse, results, need_dqkv, qkv, parameters, options: Options):
    grads = [torch.zeros_like(x) for x in parameters]
    dq, dk, dv = (new_output(x) if need_dqkv else x.new_empty(0) for x in qkv)
    for rows, keys, sequence in options.sequences():
        part_qkv = [x[:, :, part] for x, part in zip(qkv, (rows, keys, keys), strict=True)]
        dqkv, dparameters = _backward(
            dout[:, :, rows],
            None if dlse is None else dlse[:, :, rows],
            [x[:, :, rows] for x in results],
            need_dqkv,
            part_qkv,
            parameters,
            sequence,
        )
        for total, part in zip(grads, dparameters, strict=True):
            total += part
        if need_dqkv:
            dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = dqkv
    return (dq, dk, dv), grads


def _add_lse_grad(kernel, dlse, lse, q, k, dq, dk) -> None:
    """Add the gradient that reaches q and k through an lse: ``ds_ij = P_ij dlse_i``.

    With ``v = 0``, ``dout = e_1`` and ``out = -dlse e_1`` a stock backward computes exactly this.
    """
    dout, out = torch.zeros_like(q), torch.zeros_like(q)
    dout[..., 0] = 1.0
    out[..., 0] = -dlse
    dq_lse, dk_lse, _ = kernel.backward(dout, q, k, torch.zeros_like(k), out, lse)
    dq += dq_lse
    dk += dk_lse


def _head_major(x: Tensor) -> Tensor:
    """``x`` itself if its ``transpose(1, 2)`` is contiguous, else a copy that is."""
    return x if x.transpose(1, 2).is_contiguous() else new_output(x).copy_(x)


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
        out, lse, gate_lse = output
        ctx.mark_non_differentiable(gate_lse)
        ctx.set_materialize_grads(False)
        tensors = {name: x for name, x in options._asdict().items() if isinstance(x, Tensor)}
        ctx.options, ctx.tensor_options = options._replace(**dict.fromkeys(tensors)), list(tensors)
        ctx.save_for_backward(out, lse, gate_lse, *qkv_parameters, *tensors.values())

    @staticmethod
    @refuse_double_backward("shifted_attention")
    def backward(ctx, dout, dlse, _):
        out, lse, gate_lse, *inputs = ctx.saved_tensors
        options = ctx.options._replace(**dict(zip(ctx.tensor_options, inputs[6:], strict=True)))
        dout = torch.zeros_like(out) if dout is None else last_dim_contiguous(dout)
        need_dqkv = any(ctx.needs_input_grad[:3])
        grads = torch.ops.mmicl.shifted_attention_bwd(
            dout, dlse, out, lse, gate_lse, need_dqkv, *inputs[:6], *options
        )
        dqkv = grads[:3] if need_dqkv else (None, None, None)
        return *dqkv, *grads[3:], None

    vmap = staticmethod(refuse_vmap("shifted_attention"))


# apply() asks for the signature at every call; making it takes longer than the shift of 256 tokens.
_ShiftedAttentionFunction.forward.__signature__ = inspect.signature(_ShiftedAttentionFunction.forward)
torch.library.register_vmap("mmicl::shifted_attention_fwd", refuse_vmap("shifted_attention"))


def shifted_attention_composed(q, k, v, weight, bias, shift, options: Options) -> tuple[Tensor, Tensor]:
    """``out, lse`` of :func:`mmicl_kernels.ops.shifted_attention` for checked arguments."""
    inputs = (q, k, v, weight, bias, shift)
    if needs_grad(*inputs):
        return _ShiftedAttentionFunction.apply(*inputs, options)[:2]
    return _fwd_op(*inputs, *options)[:2]
