"""The attention function HuggingFace calls in a patched layer, and what its masks mean."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmicl_kernels.models.anchors import UnsupportedModelError
from mmicl_kernels.ops import attention_shift, shifted_attention

NAME = "mmicl"

# transformers makes the masks of every implementation with one of these; what they mean is known.
MASK_KINDS = {
    sdpa_mask: "sdpa",
    eager_mask: "eager",
    flash_attention_mask: "flash",
    flex_attention_mask: "flex",
}

TRANSFORMERS_OWN = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def register() -> None:
    """Make ``NAME`` known to transformers. No mask function: decoders keep their own implementation."""
    AttentionInterface.register(NAME, attention_forward)


def mask_kind(implementation: str | None) -> str:
    """Whose masks a decoder of this ``_attn_implementation`` makes: "sdpa", "eager", "flash" or "flex".

    Raises:
        UnsupportedModelError: transformers makes none for it, or by a function whose masks may mean anything.
    """
    kind = known_masks(implementation)
    if kind is not None:
        return kind
    # As the decoder looks it up: without an entry its attention is given no mask, and hides what it likes.
    registered = implementation in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    maker = ALL_MASK_ATTENTION_FUNCTIONS[implementation] if registered else None
    found = getattr(maker, "__name__", repr(maker)) if registered else "none"
    raise UnsupportedModelError(
        f"MimIC cannot stand in for attention implementation {implementation!r}: expected masks made by "
        f"{', '.join(known.__name__ for known in MASK_KINDS)}, found {found}; see "
        f"AttentionMaskInterface.register({implementation!r}, ...) of transformers"
    )


def known_masks(implementation: str | None) -> str | None:
    """:func:`mask_kind`, or None; it is asked for every token, so not by the registry's own functions."""
    registry = ALL_MASK_ATTENTION_FUNCTIONS
    if implementation not in registry._global_mapping:
        return None
    maker = registry._local_mapping.get(implementation, registry._global_mapping[implementation])
    for known, kind in MASK_KINDS.items():
        if maker is known:  # what users register need not have a hash
            return kind
    return None


def is_users_own(implementation: str) -> bool:
    """Whether somebody else registered the function that a decoder of this implementation calls."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if implementation == "eager" and function is None:  # every family has one of its own
        return False
    module = getattr(inspect.unwrap(function), "__module__", None) or ""
    return implementation not in TRANSFORMERS_OWN or module.partition(".")[0] != "transformers"


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
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: object | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Shifted attention in the interface of transformers.

    ``query [B, H, T, D]``, ``key, value [B, G, S, D]`` after RoPE and the cache's update, to
    ``[B, T, H, D]``. Models pass further arguments of their own, which differ between versions and mean
    nothing to attention; those named here are all that do.
    """
    if position_bias is not None or cache is not None:
        given = "cache" if position_bias is None else "position_bias"
        raise NotImplementedError(
            f"the model gives its attention {given}, expected none: MimIC has no biases of positions and no "
            "paged cache (continuous batching)"
        )
    if dropout > 0:
        raise ValueError(f"dropout is {dropout}, expected 0: set attention_dropout=0 or model.eval()")
    layer = getattr(module, "mmicl_layer", None)
    if layer is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} is set by mmicl_kernels.attach(model, adapter) alone"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.shape[2] == 1 and s_aux is None:
        window = sliding_window if is_causal else None
        out = layer.decode(query, key, value, attention_mask, scaling, softcap, window)
        if out is not None:
            return out, None
    kind, T = mask_kind(layer.base_implementation), query.shape[2]
    key, value = _in_use(attention_mask, kind == "sdpa" and is_causal, T, key, value)
    visible = _visibility(attention_mask, kind, is_causal, sliding_window, query, key)
    layer.warn_of_padding(kind, attention_mask)
    keys, packed = layer.virtual_keys(query), {}
    if attention_mask is None and kind == "flash":
        packed = _packed(query, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    options = {"scale": scaling, "softcap": softcap, "impl": layer.impl, **visible, **packed}
    if s_aux is not None:
        out = _beside_sinks(query, key, value, s_aux, keys, layer.normalizer, options)
        return out.transpose(1, 2), None
    weight, bias, shift, adapter_ids, prefix = keys
    if packed and adapter_ids is not None and adapter_ids.dim() == 1:
        adapter_ids = adapter_ids.expand(len(packed["cu_seqlens_q"]) - 1)
    out = shifted_attention(
        query, key, value, weight, bias, shift,
        adapter_ids=adapter_ids, prefix=prefix, normalizer=layer.normalizer,
        kv_end=_used_keys(visible["mask"], query, key) if layer.normalizer == "all_keys" else None,
        **options,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _beside_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    keys: tuple[Tensor, Tensor, Tensor, Tensor | None, bool | Tensor],
    normalizer: str,
    options: dict[str, Any],
) -> Tensor:
    """Shifted attention in whose softmax every head has one more score, of ``sinks [H]``, without a value.

    A sink is a virtual key of the model's own. An adapter's ``keys`` weigh against all that the model attends
    to, so the sink is in the lse before they come. A query that sees no key is not shifted here either.
    """
    if normalizer == "all_keys":
        raise NotImplementedError(
            "the model gives its attention s_aux and normalizer is 'all_keys', expected 'visible': the "
            "official gate, which counts hidden keys too, is of models without sinks"
        )
    weight, bias, shift, adapter_ids, prefix = keys
    nothing = query.new_zeros(query.shape[1], query.shape[3])
    out, lse = shifted_attention(
        query, key, value, nothing, sinks, nothing, prefix=True, return_lse=True, **options
    )
    blind = lse == -torch.inf
    joint = torch.logaddexp(lse.masked_fill(blind, 0.0), sinks.to(lse.dtype)[:, None])
    return attention_shift(
        out, joint.masked_fill(blind, -torch.inf), query.to(out.dtype), weight, bias, shift,
        adapter_ids=adapter_ids, prefix=prefix, impl=options["impl"],
    )  # fmt: skip


def _in_use(
    mask: Tensor | BlockMask | None, top_left: bool, T: int, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values without the rows at the end of a static cache that are not filled yet."""
    S = key.shape[2]
    if mask is None and top_left and 1 < T < S:  # it is being filled, and sdpa means top-left causal
        S = T
    elif isinstance(mask, Tensor) and mask.dim() == 2:  # flash's, which is as long as what is filled
        S = mask.shape[1]
    return key[:, :, :S], value[:, :, :S]


def _visibility(
    mask: Tensor | BlockMask | None,
    kind: str,
    is_causal: bool,
    window: int | None,
    query: Tensor,
    key: Tensor,
) -> dict[str, Any]:
    """What ``shifted_attention`` is told: the mask, and what implementations of its kind add to it.

    sdpa is causal without a mask, and flash always, beside a mask ``[B, S]`` of the padding alone. Eager and
    flex attend to whatever the mask leaves.
    """
    whole = _four_dimensional(mask, query, key)
    flash = kind == "flash" and not isinstance(mask, BlockMask)
    if is_causal and (flash or (mask is None and kind == "sdpa")):
        return {"mask": whole, "causal": query.shape[2] > 1, "window": window}
    if flash and window is not None:
        whole = _near(window, whole, query, key)
    return {"mask": whole}


def _near(window: int, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """``mask`` of the keys fewer than ``window`` tokens away: flash's windows reach both ways."""
    T, S = query.shape[2], key.shape[2]
    near = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T + window - 1)
    near = near.triu(S - T - window + 1)[None, None]
    return near if mask is None else near & mask


def _packed(
    query: Tensor, position_ids: Tensor | None, starts_q: Tensor | None, starts_k: Tensor | None
) -> dict[str, Any]:
    """What parts sequences in one row, as flash is told without a mask: ``cu_seq_lens``, or positions.

    The other implementations have them in their masks. Positions are read on the host, as flash's are.
    """
    B, _, T, _ = query.shape
    if starts_q is None:
        if B > 1 or T == 1 or position_ids is None or position_ids.shape != (1, T):
            return {}
        first = (position_ids[0] == position_ids.min()).nonzero().flatten()
        if len(first) == 1:
            return {}
        starts_q = torch.cat([first, first.new_tensor([T])])
    starts_q = starts_q.int()
    starts_k = starts_q if starts_k is None else starts_k.int()
    return {
        "cu_seqlens_q": starts_q,
        "cu_seqlens_k": starts_k,
        "max_seqlen_q": int(starts_q.diff().max()),
        "max_seqlen_k": int(starts_k.diff().max()),
    }


def _four_dimensional(mask: Tensor | BlockMask | None, query: Tensor, key: Tensor) -> Tensor | None:
    """``mask`` as bool or additive ``[B, H or 1, T or 1, S]``."""
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 4):
        return mask
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, B, 1, T, S, device=query.device)
    if mask.dim() == 2:
        return mask[:, None, None, -S:].bool()
    raise ValueError(f"attention_mask has {mask.dim()} dimensions, expected 2 or 4")


def _used_keys(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Number of cached keys in use, ``[B]``: the official gate counts none of a static cache's empty rows.

    The newest key is visible to its own query, so the last key that any query of any row sees is the last
    in use; where it is padding in all rows, the queries' own keys are in use all the same. Without a cache
    all keys are, the padding at the end included.
    """
    if mask is None or query.shape[2] == key.shape[2]:
        return None
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min
    seen = mask.reshape(-1, mask.shape[-1]).any(0)
    positions = torch.arange(1, seen.shape[0] + 1, device=seen.device)
    used = (seen * positions).amax().clamp(min=query.shape[2])
    return used.expand(query.shape[0])
