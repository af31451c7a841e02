"""Virtual keys of heads, stacked by adapter, and which of them a token uses.

The canonical form is ``[A, P, N, ...]``: A adapters, P heads of which each stands for H / P neighbouring
query heads, N virtual keys. A key whose bias is -inf is none.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import Sizes, check_float, check_integer, check_range

MAX_KEYS = 2048


def check_virtual_keys(
    q: Tensor,
    rows: int,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: bool | Tensor,
) -> None:
    """Check ``weight, shift [H, D]`` or ``[P, N, D]``, ``bias [H]`` or ``[P, N]``, all with A before them
    beside ``adapter_ids``, and ``prefix``, a bool or beside ids bool ``[A]``.

    ids are one for each of ``rows``, batch rows of q or packed sequences, or ``[B, T]``, one for each query.
    """
    sizes = Sizes(H=q.shape[1], D=q.shape[3])
    stacked = "" if adapter_ids is None else "A "
    dims = weight.dim() if isinstance(weight, Tensor) else 0
    if adapter_ids is not None and dims == 2:
        raise ValueError(
            f"adapter_ids were given beside a 2-D weight {list(weight.shape)}, expected [A, H, D] or "
            "[A, heads, keys, D]"
        )
    if adapter_ids is None and dims == 4:
        raise ValueError(f"weight has shape {list(weight.shape)}: a 4-D weight needs adapter_ids, got None")
    heads = "P N" if dims == (3 if adapter_ids is None else 4) else "H"
    sizes.bind("weight", weight, f"{stacked}{heads} D")
    sizes.bind("bias", bias, stacked + heads)
    sizes.bind("shift", shift, f"{stacked}{heads} D")
    for name, tensor in (("weight", weight), ("bias", bias), ("shift", shift)):
        check_float(name, tensor)
    if heads != "H" and (sizes["P"] == 0 or sizes["H"] % sizes["P"] != 0):
        raise ValueError(
            f"weight has {sizes['P']} heads, expected as many as q has, {sizes['H']}, or a divisor of that"
        )
    if heads != "H" and not 1 <= sizes["N"] <= MAX_KEYS:
        raise ValueError(f"weight has {sizes['N']} virtual keys, expected 1 to {MAX_KEYS}")
    if adapter_ids is not None:
        if isinstance(adapter_ids, Tensor) and adapter_ids.dim() == 2:
            Sizes(B=q.shape[0], T=q.shape[2]).bind("adapter_ids", adapter_ids, "B T")
        elif isinstance(adapter_ids, Tensor) and adapter_ids.dim() != 1:
            raise ValueError(f"adapter_ids has shape {list(adapter_ids.shape)}, expected [B] or [B, T]")
        else:
            Sizes(B=rows).bind("adapter_ids", adapter_ids, "B")
        check_integer("adapter_ids", adapter_ids)
        check_range("adapter_ids", adapter_ids, -1, sizes["A"] - 1)
    _check_prefix(sizes, prefix, adapter_ids)


def _check_prefix(sizes: Sizes, prefix: bool | Tensor, adapter_ids: Tensor | None) -> None:
    if isinstance(prefix, bool):
        return
    if not isinstance(prefix, Tensor):
        raise TypeError(f"prefix is {prefix!r}, expected True, False or a bool tensor [A]")
    if adapter_ids is None:
        raise ValueError("prefix is a tensor, expected True or False where there are no adapter_ids")
    sizes.bind("prefix", prefix, "A")
    if prefix.dtype != torch.bool:
        raise TypeError(f"prefix has dtype {prefix.dtype}, expected torch.bool")


def stacked_keys(weight: Tensor, bias: Tensor, shift: Tensor, is_stacked: bool) -> tuple[Tensor, ...]:
    """``weight, shift [A, P, N, D]`` and ``bias [A, P, N]`` of what :func:`check_virtual_keys` lets pass."""
    if not is_stacked:
        weight, bias, shift = weight[None], bias[None], shift[None]
    if weight.dim() == 3:
        weight, bias, shift = weight[:, :, None], bias[:, :, None], shift[:, :, None]
    return weight, bias, shift


def of_tokens(stacked: Tensor, adapter_ids: Tensor | None, H: int) -> Tensor:
    """The ``[A, P, ...]`` parameter of every query, ``[B or 1, H, T or 1, ...]``; zeros for an id of -1."""
    stacked = stacked.repeat_interleave(H // stacked.shape[1], dim=1)
    if adapter_ids is None:
        return stacked[:, :, None]
    nothing = stacked.new_zeros(1, *stacked.shape[1:])  # no slot stands in for none
    chosen = torch.cat((stacked, nothing))[adapter_ids.long()]
    return chosen[:, :, None] if adapter_ids.dim() == 1 else chosen.transpose(1, 2)


def of_queries(x: Tensor) -> Tensor:
    """What batch rows ``[B]`` or queries ``[B, T]`` have, as ``[B, 1, T or 1]``."""
    return x[:, None, None] if x.dim() == 1 else x[:, None]


def is_one_key(H: int, weight: Tensor, adapter_ids: Tensor | None, prefix: Tensor | None) -> bool:
    """Whether each of H heads has one key, which adds to the attention: the form that kernels do fastest."""
    per_query = adapter_ids is not None and adapter_ids.dim() == 2
    return weight.shape[1:3] == (H, 1) and prefix is None and not per_query
