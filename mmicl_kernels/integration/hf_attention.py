"""The attention function HuggingFace calls in a patched layer, and what its masks mean."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface

from mmicl_kernels.ops import shifted_attention

NAME = "mmicl"


def register() -> None:
    """Make ``NAME`` known to transformers. No mask function: decoders keep their own implementation."""
    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Shifted attention in the interface of transformers.

    ``query [B, H, T, D]``, ``key, value [B, G, S, D]`` after RoPE and the cache's update, to
    ``[B, T, H, D]``. Models pass further arguments of their own, which differ between versions and mean
    nothing to attention; those named here are all that do.
    """
    if dropout > 0:
        raise ValueError(f"dropout is {dropout}, expected 0: set attention_dropout=0 or model.eval()")
    layer = getattr(module.config, "mmicl_layer", None)
    if layer is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} is set by mmicl_kernels.attach(model, adapter) alone"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    T, S = query.shape[2], key.shape[2]
    if _is_empty_static_cache(attention_mask, layer.base_implementation, is_causal, T, S):
        key, value = key[:, :, :T], value[:, :, :T]
    visibility = _visibility(attention_mask, layer.base_implementation, is_causal, sliding_window, query, key)
    if layer.normalizer == "all_keys" and key.shape[2] > T:
        visibility["kv_end"] = _used_keys(attention_mask, query)
    weight, bias, shift, adapter_ids = layer.parameters(query.shape[0])
    out = shifted_attention(
        query, key, value, weight, bias, shift,
        scale=scaling, softcap=softcap, adapter_ids=adapter_ids,
        normalizer=layer.normalizer, impl=layer.impl, **visibility,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _is_empty_static_cache(mask, base: str, is_causal: bool, T: int, S: int) -> bool:
    """Whether keys beyond the first T are unused rows of a static cache that is being filled.

    Only sdpa leaves the mask out then, and means top-left causal; flash means bottom-right.
    """
    return mask is None and base == "sdpa" and is_causal and 1 < T < S


def _visibility(mask, base: str, is_causal: bool, window, query: Tensor, key: Tensor) -> dict:
    """Arguments of the op for the mask as the decoder's own implementation would read it."""
    T, S = query.shape[2], key.shape[2]
    if isinstance(mask, BlockMask):
        mask = create_mask(mask.mask_mod, query.shape[0], 1, T, S, device=query.device)
    if mask is not None and mask.dim() == 4:
        return {"mask": mask}
    if mask is not None and mask.dim() == 2:
        visible = {"mask": mask[:, None, None, -S:].bool()}
    elif mask is None:
        visible = {}
    else:
        raise ValueError(f"attention_mask has {mask.dim()} dimensions, expected 2 or 4")
    # Without a mask eager and flex attend to every key; sdpa and flash are causal by themselves.
    implicit = mask is not None or base == "sdpa" or "flash" in base
    if implicit and is_causal:
        visible |= {"causal": T > 1, "window": window}
    return visible


def _used_keys(mask, query: Tensor) -> Tensor | None:
    """Number of keys in use, ``[B]``: a static cache is longer, and the official gate counts no zeros.

    The newest key is visible to its own query, so the last key that any query of any row sees is the
    last in use.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min
    seen = mask.bool().reshape(-1, mask.shape[-1]).any(0)
    positions = torch.arange(1, seen.shape[0] + 1, device=seen.device)
    return (seen * positions).amax().expand(query.shape[0])
