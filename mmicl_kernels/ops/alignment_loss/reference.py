"""States of chosen tokens against a teacher's, layer by layer: the specification.

    d_n = |x_n - y_n|^2      p_n = |y_n|^2,  x_n = states_{index_n}, n over the N rows that are some
    loss of a layer = sum_n d_n / (N C),  sum_n d_n / sum_n p_n  or  mean_n d_n / p_n;  the value is the mean

Source: MimIC (arXiv 2504.08851, section 3.3), the first form. The relative ones are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment_loss_reference(
    states: Sequence[Tensor], targets: Sequence[Tensor], index: Tensor, relative_to: str | None
) -> Tensor:
    """Plain PyTorch form of :func:`mmicl_kernels.ops.alignment_loss`; fp64 in, fp64 out.

    Args:
        index: ``[N]`` int64, rows of each ``states.flatten(0, 1)``; what is outside of them is no row.
    """
    losses = [_layer_loss(x, y, index, relative_to) for x, y in zip(states, targets, strict=True)]
    return sum(loss.to(losses[0].device) for loss in losses) / len(losses)


def alignment_squares_reference(
    states: Sequence[Tensor], targets: Sequence[Tensor], index: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """``d [N]`` and ``p [N]`` of every layer, 0 where there is no row."""
    rows = [_chosen_rows(x, y, index) for x, y in zip(states, targets, strict=True)]
    return [(x - y).square().sum(-1) for x, y, _ in rows], [y.square().sum(-1) for _, y, _ in rows]


def _layer_loss(states: Tensor, targets: Tensor, index: Tensor, relative_to: str | None) -> Tensor:
    x, y, none = _chosen_rows(states, targets, index)
    with torch.autocast(x.device.type, enabled=False):
        p, count = y.square().sum(-1), (~none).sum().clamp(min=1)
        power = p.sum()
        off = {None: none, "layer": (power == 0).expand_as(none), "token": p == 0}[relative_to]
        # Taken out before they are squared: what has no part has no gradient either, NaN included.
        d = (x - y).masked_fill(off[:, None], 0.0).square().sum(-1)
        if relative_to is None:
            return d.sum() / count / max(x.shape[1], 1)
        if relative_to == "layer":
            return d.sum() / power.masked_fill(power == 0, 1.0)
        return (d / p.masked_fill(off, 1.0)).sum() / count


def _chosen_rows(states: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x, y [N, C]``, both 0 where there is no row, and where that is."""
    acc = torch.promote_types(states.dtype, torch.float32)
    flat, index = states.flatten(0, 1).to(acc), index.to(states.device)
    none = (index < 0) | (index >= flat.shape[0])
    # A row of zeros at the end is what "no row" reads.
    x = F.pad(flat, (0, 0, 0, 1))[index.masked_fill(none, flat.shape[0])]
    return x, targets.to(acc).masked_fill(none[:, None], 0.0), none
