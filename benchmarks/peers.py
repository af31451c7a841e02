"""MimIC as its authors published it: the op, and a whole model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PUBLISHED_NAME = "mimic_published"


def published_shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    causal: bool = False,
) -> Tensor:
    """MimIC as published (arXiv 2504.08851 and its code): attention, then a shift with its own q k^T.

    ``q [B, H, T, D]``, ``k, v [B, G, S, D]``, parameters ``[H, D]``, ``[H]``, ``[H, D]``, to
    ``[B, H, T, D]``. Equal to ``shifted_attention(..., normalizer="all_keys")`` in exact arithmetic;
    ``q_start`` is 0. All in q's dtype, as in a model that was loaded in it.
    """
    k, v = all_heads(k, q), all_heads(v, q)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    return _published_shift(out, q, k, weight, bias, shift, q.shape[-1] ** -0.5).transpose(1, 2)


def _published_shift(
    out: Tensor, q: Tensor, k: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: float
) -> Tensor:
    """``out [B, T, H, D]`` plus the gated shift; the gate's normaliser sees every key, masked or not."""
    weight, bias, shift = (x.to(q.dtype) for x in (weight, bias, shift))
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale  # [B, H, T, S]
    log_z2 = torch.logsumexp(scores, dim=-1).transpose(1, 2)  # [B, T, H]
    log_z1 = torch.einsum("bthd,hd->bth", q.transpose(1, 2), weight) + bias
    mu = torch.exp(log_z1 - torch.logaddexp(log_z1, log_z2))
    return out + mu[..., None] * shift


def all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[B, G, S, D]`` once for every head of ``q [B, H, T, D]``."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


@contextmanager
def published(model: nn.Module, adapter: nn.Module) -> Iterator[None]:
    """``model`` with a MimIC ``adapter`` in the published formulation, within a ``with`` block.

    The masks of the decoder reach its attention alone: the gate counts every key. Not for static
    caches, whose empty rows it would count.

    Raises:
        UnsupportedModelError: unknown family. ValueError: its attention implementation is not "sdpa".
    """
    from transformers import AttentionInterface

    from mmicl_kernels.models.anchors import find_anchors

    anchors = find_anchors(model)
    originals = [anchor.self_attn.config for anchor in anchors]
    for config in originals:
        if config._attn_implementation != "sdpa":
            raise ValueError(
                f"the model's attention implementation is {config._attn_implementation!r}, expected 'sdpa'"
            )
    AttentionInterface.register(PUBLISHED_NAME, _published_forward)
    for anchor, config in zip(anchors, originals, strict=True):
        clone = copy.copy(config)
        clone._attn_implementation_internal = PUBLISHED_NAME
        clone.mimic_published = adapter.layers[str(anchor.index)]
        anchor.self_attn.config = clone
    try:
        yield
    finally:
        for anchor, config in zip(anchors, originals, strict=True):
            anchor.self_attn.config = config


def _published_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The published formulation in the attention interface of transformers, to ``[B, T, H, D]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = module.config.mimic_published
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parameters = (layer.weight, layer.bias, layer.shift)
    return _published_shift(out, query, all_heads(key, query), *parameters, scale), None
