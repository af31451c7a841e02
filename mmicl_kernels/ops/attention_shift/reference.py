"""Virtual keys beside the keys of an attention, by its output and log-sum-exp: the specification.

    g_n = q . weight_n + bias_n      L = logaddexp(lse, logsumexp_n g_n)      p_n = exp(g_n - L)
    out' = (1 - c mu) out + sum_n p_n shift_n      mu = sum_n p_n = sigmoid(logsumexp_n g_n - lse)

``mu`` is the softmax mass of the virtual keys beside the keys that ``lse`` sums over; c is 1 where they are a
prefix, which takes its mass from the keys, else 0. Of one key ``out + mu shift``: MimIC (arXiv 2504.08851),
section 3.2, where exp(g) is the learned normaliser of the absent demonstrations. Of N: HiFICL (arXiv
2603.12760).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.ops._core.virtual_keys import of_queries, of_tokens, stacked_keys


def attention_shift_reference(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None = None,
    prefix: bool | Tensor = False,
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.attention_shift`; fp64 in, fp64 out."""
    acc, H = torch.promote_types(out.dtype, torch.float32), q.shape[1]
    with torch.autocast(out.device.type, enabled=False):
        keys = stacked_keys(weight, bias, shift, adapter_ids is not None)
        # [B or 1, H, T or 1, N, D], zeros where there is no adapter
        weight, bias, shift = (of_tokens(x.to(acc), adapter_ids, H) for x in keys)
        logit = (q.to(acc)[..., None, :] * weight).sum(-1) + bias
        # Rows without a key that counts are replaced before they meet a logarithm, so that their gradient is
        # 0, not NaN.
        unused = (logit == -torch.inf).all(-1)
        logit = logit.masked_fill(unused[..., None], 0.0)
        active = ~torch.isinf(lse) & ~unused
        if adapter_ids is not None:
            active = active & of_queries(adapter_ids >= 0)

        x = torch.logsumexp(logit, -1) - lse.to(acc).masked_fill(~active, 0.0)
        # By its logarithm the sigmoid's gradient keeps 1 - mu exact where mu is near 1.
        p = F.logsigmoid(x).exp()[..., None] * torch.softmax(logit, -1)
        kept = out.to(acc)
        if prefix is not False:
            is_prefix = _of_rows(prefix, adapter_ids, active)
            kept = torch.where(is_prefix[..., None], F.logsigmoid(-x).exp()[..., None] * kept, kept)
        shifted = kept + (p[..., None] * shift).sum(-2)
        return torch.where(active[..., None], shifted.to(out.dtype), out)


def _of_rows(prefix: bool | Tensor, adapter_ids: Tensor | None, active: Tensor) -> Tensor:
    """Whether the adapter of every query ``[B, H, T]`` is a prefix."""
    if not isinstance(prefix, Tensor) or adapter_ids is None:
        return torch.as_tensor(prefix, device=active.device).expand_as(active)
    return of_tokens(prefix[:, None], adapter_ids, 1).expand_as(active)
