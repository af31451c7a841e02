"""Softmax attention whose output is shifted per head by a query-dependent amount: the specification.

    s_ij = scale * q_i.k_j  (softcap, mask)          lse_i = log sum_j exp(s_ij)
    a_i = sum_j exp(s_ij - lse_i) v_j                mu_i = sigmoid(q_i.weight_h + bias_h - lse_i)
    out_i = a_i + mu_i shift_h

Source: MimIC (arXiv 2504.08851) section 3.2. ``[B, H, T, S]`` is materialised here.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops.attention_shift.reference import attention_shift_reference
from mmicl_kernels.ops.shifted_attention.options import Options


def shifted_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.shifted_attention`; returns ``(out, lse)``."""
    # The empty piece gives a batch of no sequences its shape.
    acc = torch.promote_types(q.dtype, torch.float32)
    pieces = [(q[:, :, :0], q[:, :, :0].sum(-1, dtype=acc))]
    for rows, keys, sequence in options.sequences():
        qkv = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        pieces.append(_dense(*qkv, weight, bias, shift, sequence))
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _dense(q, k, v, weight, bias, shift, options: Options) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    (T, S), groups = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    softcap, visibility = options.softcap, options.visibility
    with torch.autocast(q.device.type, enabled=False):
        k_acc = k.to(acc).repeat_interleave(groups, dim=1)
        v_acc = v.to(acc).repeat_interleave(groups, dim=1)
        scores = options.scale * (q.to(acc) @ k_acc.transpose(-1, -2))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)

        keep = visibility.keep(T, S, q.device)
        probabilities, lse = masked_softmax(scores, keep, visibility.additive_mask())
        gate_lse = lse
        if options.all_keys:
            gate_lse = masked_softmax(scores, visibility.all_keys().keep(T, S, q.device), None)[1]
            gate_lse = gate_lse.masked_fill(lse == -torch.inf, -torch.inf)
        a = probabilities @ v_acc
        prefix = options.prefix if options.prefixes is None else options.prefixes
        keys = weight, bias, shift, options.adapter_ids, prefix
        out = attention_shift_reference(a, gate_lse, q, *keys)
    return out.to(q.dtype), lse


def masked_softmax(scores: Tensor, keep: Tensor | None, additive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and natural-log normaliser of ``scores [B, H, T, S]`` under a visibility.

    A row that sees no key has probabilities 0 and normaliser -inf, and gets no gradient.
    """
    if additive is not None:
        scores = scores + additive.to(scores.dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    blind = (scores == -torch.inf).all(-1)
    # The blind rows' scores are replaced first: logsumexp of -inf alone has a NaN gradient.
    scores = scores.masked_fill(blind[..., None], 0.0)
    # In two steps: where a whole row carries finfo.min, the first swallows the logarithm of the sum.
    level = torch.logsumexp(scores, -1).detach()
    scores = scores - level[..., None]
    remainder = torch.logsumexp(scores, -1)
    probabilities = torch.exp(scores - remainder[..., None]).masked_fill(blind[..., None], 0.0)
    return probabilities, (level + remainder).masked_fill(blind, -torch.inf)
