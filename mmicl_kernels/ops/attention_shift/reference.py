"""Per-head, query-dependent attention shift: the specification.

    g = q . weight_h + bias_h        mu = sigmoid(g - lse)        out' = out + mu * shift_h

``mu`` is the softmax mass of one virtual key with logit ``g`` beside the keys that ``lse`` sums over.
Source: MimIC (arXiv 2504.08851) section 3.2, where exp(g) is the learned normaliser of the absent
demonstrations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
            weight, bias, shift = (_of_rows(x, adapter_ids) for x in (weight, bias, shift))

        logit = (q.to(acc) * weight.to(acc)[:, :, None]).sum(-1) + bias.to(acc)[:, :, None]
        # An infinite lse is replaced before the sigmoid so that its gradient is 0, not NaN. By its logarithm
        # the sigmoid's gradient keeps 1 - mu exact where mu is near 1.
        mu = F.logsigmoid(logit - lse.to(acc).masked_fill(~active, 0.0)).exp()
        shifted = out.to(acc) + mu[..., None] * shift.to(acc)[:, :, None]
        return torch.where(active[..., None], shifted.to(out.dtype), out)


def _of_rows(stacked: Tensor, adapter_ids: Tensor) -> Tensor:
    """The ``[A, ...]`` parameter of every batch row, zeros where its id is -1: no slot stands in for none."""
    nothing = stacked.new_zeros(1, *stacked.shape[1:])
    return torch.cat((stacked, nothing))[adapter_ids.long()]
