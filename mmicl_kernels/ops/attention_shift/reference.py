"""Per-head, query-dependent attention shift: the specification.

    g = q . weight_h + bias_h        mu = sigmoid(g - lse)        out' = out + mu * shift_h

``mu`` is the softmax mass of one virtual key with logit ``g`` beside the keys that ``lse`` sums over.
Source: MimIC (arXiv 2504.08851) section 3.2, where exp(g) is the learned normaliser of the absent
demonstrations.
"""

import torch
from torch import Tensor


def attention_shift_reference(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.attention_shift`; fp64 in, fp64 out."""
    acc = torch.promote_types(out.dtype, torch.float32)
    with torch.autocast(out.device.type, enabled=False):
        if adapter_ids is None:
            active = ~torch.isinf(lse)
            weight, bias, shift = weight[None], bias[None], shift[None]
        else:
            active = ~torch.isinf(lse) & (adapter_ids >= 0)[:, None, None]
            row = adapter_ids.clamp(min=0).long()
            weight, bias, shift = weight[row], bias[row], shift[row]

        logit = (q.to(acc) * weight.to(acc)[:, :, None]).sum(-1) + bias.to(acc)[:, :, None]
        # An infinite lse is replaced before the sigmoid so that its gradient is 0, not NaN.
        mu = torch.sigmoid(logit - lse.to(acc).masked_fill(~active, 0.0))
        mu = mu.masked_fill(~active, 0.0)
        return (out.to(acc) + mu[..., None] * shift.to(acc)[:, :, None]).to(out.dtype)
