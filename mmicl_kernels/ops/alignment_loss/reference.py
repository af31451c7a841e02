"""States of chosen tokens against a teacher's, layer by layer: the specification.

    d_n = |x_n - y_n|^2      s_n = |x_n|^2 + |y_n|^2,  x_n = states_{index_n}, n over the N rows that are some
    loss of a layer = mean_n d_n / s_n  or  sum_n d_n / (N C);  the value is the mean

Source: MimIC (arXiv 2504.08851, section 3.3), the second form. The first is ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment_loss_reference(
    states: Sequence[Tensor], targets: Sequence[Tensor], index: Tensor, form: str
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.alignment_loss`; fp64 in, fp64 out.

    Args:
        index: ``[N]`` int64, rows of each ``states.flatten(0, 1)``; what is outside of them is no row.
    """
    losses = [_layer_loss(x, y, index, form) for x, y in zip(states, targets, strict=True)]
    return sum(loss.to(losses[0].device) for loss in losses) / len(losses)


def _layer_loss(states: Tensor, targets: Tensor, index: Tensor, form: str) -> Tensor:
    x, y, none = _chosen_rows(states, targets, index)
    with torch.autocast(x.device.type, enabled=False):
        d, count = (x - y).square().sum(-1), (~none).sum().clamp(min=1)
        if form == "mean_square":
            return d.sum() / count / max(x.shape[1], 1)
        s = x.square().sum(-1) + y.square().sum(-1)
        zero = s < torch.finfo(s.dtype).tiny  # whose inverse overflows
        return (d / s.masked_fill(zero, 1.0)).masked_fill(zero, 0.0).sum() / count


def _chosen_rows(states: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x, y [N, C]``, both 0 where there is no row, and where that is."""
    acc = torch.promote_types(states.dtype, torch.float32)
    flat, index = states.flatten(0, 1).to(acc), index.to(states.device)
    none = (index < 0) | (index >= flat.shape[0])
    # A row of zeros at the end is what "no row" reads.
    x = F.pad(flat, (0, 0, 0, 1))[index.masked_fill(none, flat.shape[0])]
    return x, targets.to(acc).masked_fill(none[:, None], 0.0), none
