"""Attention, then the shift in one more pass over its output; exact gradients by one backward.

On CPU the attention is C++'s, if that was built, else the best stock one. README.md derives the backward.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys, backend_kernels, logit_grad
from mmicl_kernels.ops.shifted_attention._cpp import CppAttention
from mmicl_kernels.ops.shifted_attention._stock import attention_kernel
from mmicl_kernels.ops.shifted_attention.options import Options, Visibility, new_results


def forward(q, k, v, keys: VirtualKeys, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, ``gate_lse``, ``lse_low`` and ``a`` of ``new_results``.

    ``lse_low`` is 0: stock kernels do not say what rounding took; ``_stock`` recovers it where it matters.
    """
    part = _forward if options.cu_seqlens_q is None else _packed_forward
    out, lse, gate_lse, a = part(q, k, v, keys, options)
    lse_low = torch.zeros_like(lse) if options.is_mask_added else lse.new_empty(0)
    return out, lse, gate_lse, lse_low, a


def backward(dout, dlse, results, need_dqkv, qkv, keys: VirtualKeys, options: Options):
    """``dq, dk, dv`` (empty unless needed) and the gradients of the stacked parameters.

    ``results`` are ``a``, ``lse``, ``gate_lse`` and ``lse_low`` of the forward, with lse in place of an empty
    gate_lse.
    """
    part = _backward if options.cu_seqlens_q is None else _packed_backward
    return part(dout, dlse, results[:3], need_dqkv, qkv, keys, options)


def _forward(q, k, v, keys: VirtualKeys, options: Options):
    a, lse, gate_lse = _attention(q, k, v, options)
    epilogue = backend_kernels("composed", q.device)
    if a.transpose(1, 2).is_contiguous() and not options.training:
        out = a
        epilogue.attention_shift_fwd_(out, gate_lse, q, *keys)
    else:
        out = epilogue.attention_shift_fwd(a, gate_lse, q, *keys)
    lse = lse.contiguous()
    return (
        out,
        lse,
        gate_lse.clone(memory_format=torch.contiguous_format) if options.all_keys else lse.new_empty(0),
        _head_major(a) if options.training else a.new_empty(0),
    )


def _attention(q, k, v, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Without a shift: ``a``, its lse and the gate's, which is another one for all_keys alone."""
    if CppAttention.runs_on(q):
        return CppAttention(options.scale, options.softcap, options.visibility).forward(
            q, k, v, options.all_keys
        )
    visibility = options.visibility
    a, lse = attention_kernel(q, k, options.scale, options.softcap, visibility).forward(q, k, v)
    if not options.all_keys or visibility.simplified(q.shape[2], k.shape[2]).is_all_keys():
        return a, lse, lse
    gate = attention_kernel(q, k, options.scale, options.softcap, visibility.all_keys())
    return a, lse, gate.forward(q, k, k)[1].masked_fill(lse == -torch.inf, -torch.inf)


def _packed_forward(q, k, v, keys: VirtualKeys, options: Options):
    out, lse, gate_lse, _, a = new_results(q, options)
    for rows, columns, sequence in options.sequences():
        own = keys._replace(adapter_ids=sequence.adapter_ids)
        results = _forward(q[:, :, rows], k[:, :, columns], v[:, :, columns], own, sequence)
        out[:, :, rows], lse[:, :, rows] = results[:2]
        if options.all_keys:
            gate_lse[:, :, rows] = results[2]
        if options.training:
            a[:, :, rows] = results[3]
    return out, lse, gate_lse, a


def _backward(dout, dlse, results, need_dqkv, qkv, keys: VirtualKeys, options: Options):
    q, k, v = qkv
    a, lse, gate_lse = results
    epilogue = backend_kernels("composed", q.device)
    through_lse = need_dqkv and not options.all_keys
    attended = a if through_lse or keys.prefix is not None else None
    dg, total, _, base, lift, *dparameters = epilogue.attention_shift_bwd(
        dout, gate_lse, q, *keys, attended, False
    )
    if not need_dqkv:
        return [x.new_empty(0) for x in qkv], dparameters

    kernel = _kernel(q, k, options, options.visibility)
    if options.all_keys:
        # The gate's lse may be of another size: lse + lift could round to lse.
        kept = dout if keys.prefix is None else (dout * torch.exp(-lift)[..., None]).to(dout.dtype)
        dq, dk, dv = kernel.backward(kept, q, k, v, a, lse)
        gate = _kernel(q, k, options, options.visibility.all_keys())
        _add_lse_grad(gate, -logit_grad(dg, total), gate_lse, q, k, dq, dk)
    else:
        raised = lse if keys.prefix is None else lse + lift
        dq, dk, dv = kernel.backward(dout, q, k, v, base, raised)
    if dlse is not None:
        # of a query that sees no key it may be NaN: the gradient of -inf through a torch.where
        _add_lse_grad(kernel, dlse.masked_fill(lse == -torch.inf, 0.0), lse, q, k, dq, dk)
    epilogue.add_gate_grad_(dq, dg, keys.weight, keys.adapter_ids)
    return [_head_major(x) for x in (dq, dk, dv)], dparameters


def _kernel(q, k, options: Options, visibility: Visibility):
    """What has the backward. Of masks that are added stock kernels know how finfo.min swallows an lse."""
    if CppAttention.runs_on(q) and visibility.additive_mask() is None:
        return CppAttention(options.scale, options.softcap, visibility)
    return attention_kernel(q, k, options.scale, options.softcap, visibility)


def _packed_backward(dout, dlse, results, need_dqkv, qkv, keys: VirtualKeys, options: Options):
    grads = [torch.zeros_like(x) for x in keys.parameters]
    dq, dk, dv = (new_heads(x) if need_dqkv else x.new_empty(0) for x in qkv)
    for rows, columns, sequence in options.sequences():
        part_qkv = [x[:, :, part] for x, part in zip(qkv, (rows, columns, columns), strict=True)]
        dqkv, dparameters = _backward(
            dout[:, :, rows],
            None if dlse is None else dlse[:, :, rows],
            [x[:, :, rows] for x in results],
            need_dqkv,
            part_qkv,
            keys._replace(adapter_ids=sequence.adapter_ids),
            sequence,
        )
        for total, part in zip(grads, dparameters, strict=True):
            total += part
        if need_dqkv:
            dq[:, :, rows], dk[:, :, columns], dv[:, :, columns] = dqkv
    return (dq, dk, dv), grads


def _add_lse_grad(kernel, dlse, lse, q, k, dq, dk) -> None:
    """Add the gradient that reaches q and k through an lse: ``ds_ij = P_ij dlse_i``.

    With ``v = 0`` and ``dout . out = -dlse`` a stock backward computes exactly this.
    """
    dout, out = q.new_zeros(q.shape), q.new_zeros(q.shape)
    # A fraction and a power of two, neither of which fp16 lacks where it lacks dlse.
    exponent = torch.frexp(dlse).exponent.clamp(-14, 15)
    dout[..., 0] = torch.exp2(exponent.to(dlse.dtype))
    out[..., 0] = -torch.ldexp(dlse, -exponent)
    dq_lse, dk_lse, _ = kernel.backward(dout, q, k, k.new_zeros(k.shape), out, lse)
    dq += dq_lse
    dk += dk_lse


def _head_major(x: Tensor) -> Tensor:
    """``x`` itself if its ``transpose(1, 2)`` is contiguous, else a copy that is."""
    return x if x.transpose(1, 2).is_contiguous() else new_heads(x).copy_(x)
