"""What a fused kernel is compared with on a GPU: stock attention, alone and with a compiled epilogue."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from benchmarks.peers import all_heads

aten = torch.ops.aten

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def forced_attention(backend: str) -> Callable[..., Tensor]:
    """Stock attention by this backend of SDPA, or a RuntimeError: ``(q, k, v, causal=)``.

    "efficient" knows no grouped heads: its keys and values are repeated first, as transformers does,
    and that is part of its time.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        if backend == "efficient":
            k, v = all_heads(k, q), all_heads(v, q)
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return attention


def shift_formula(out: Tensor, lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """The epilogue as one would write it in PyTorch; see :func:`mmicl_kernels.ops.attention_shift`."""
    logit = (q.to(lse.dtype) * weight[:, None]).sum(-1) + bias[:, None]
    mu = torch.sigmoid(logit - lse)
    return (out.to(lse.dtype) + mu[..., None] * shift[:, None]).to(out.dtype)


# B and T are symbols: one compilation serves every length. H and D stay numbers, so that the sum over D
# is unrolled. Made once, because torch.compile keeps its cache by function.
_compiled_formula = torch.compile(shift_formula, dynamic=False)


def compiled_shift(
    out: Tensor, lse: Tensor, q: Tensor, weight: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """:func:`shift_formula` by torch.compile, with B and T dynamic; no gradient."""
    out, lse, q = (x.detach() for x in (out, lse, q))  # the marks must not stay on the caller's tensors
    for x in (out, lse, q):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return _compiled_formula(out, lse, q, weight, bias, shift)


def cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
    return out, lse.reshape(q.shape[:3])


def flash_with_lse(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[:2]


WITH_LSE: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cudnn": cudnn_with_lse,
    "flash": flash_with_lse,
}


def stock_and_epilogue(backend: str) -> Callable[..., Tensor]:
    """``(q, k, v, weight, bias, shift, causal=)``, forward only.

    The stock backward takes no gradient of the lse: autograd through this one would be wrong in q and k.
    """

    def attention(
        q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, *, causal: bool = False
    ) -> Tensor:
        with torch.no_grad():
            out, lse = WITH_LSE[backend](q, k, v, causal=causal)
            return compiled_shift(out, lse, q, weight, bias, shift)

    return attention


def causal_block_mask(T: int, device: str | torch.device) -> BlockMask:
    """Made for one length: FlexAttention needs another for every T."""
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


def flex_shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """FlexAttention, its lse, and the epilogue: to be compiled as one. The gradient of lse is exact."""
    out, aux = flex_attention(
        q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True)
    )
    return shift_formula(out, aux.lse, q, weight, bias, shift)
