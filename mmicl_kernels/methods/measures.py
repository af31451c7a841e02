"""Which part of a loss decides: the norm of each part's gradient, and who has the largest share of a part.

A loss whose scale is the model's, as a plain mean of squares has it, may be that of one layer or token alone:
attention sinks have activations that are orders of magnitude larger than others'.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmicl_kernels.methods.answers import upcast

LARGE = 0.5  # a share that outweighs all others together


def gradient_norms(terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """``"<name>/gradient_norm"``: of each weighted term's gradient, over all ``parameters``.

    Costs a backward pass for each term, and keeps the graph.
    """
    outputs, parameters, norms = list(terms.values()), list(parameters), {}
    for i, name in enumerate(terms):
        # The other terms take part with a gradient of 0: a sharded model gathers each layer's weights when
        # the backward pass reaches its output, which a loss of what is inside it would go round.
        ones = [torch.full_like(x, float(i == j)) for j, x in enumerate(outputs)]
        found = torch.autograd.grad(outputs, parameters, ones, retain_graph=True, allow_unused=True)
        of_each = [x.norm().to(outputs[0].device) for x in found if x is not None]
        norms[f"{name}/gradient_norm"] = torch.stack(of_each).norm()
    return norms


@torch.no_grad()
def alignment_shares(
    states: Sequence[Tensor], targets: Sequence[Tensor], query: Tensor, layers: Sequence[int], form: str
) -> dict[str, Tensor]:
    """Shares of the largest layer, token and channel in the sum that the alignment of ``form`` is.

    A layer's share is the sum over all else, and so are those of a channel and of a token, which is the k-th
    of every query: sinks are at the same place in each. ``states`` ``[B, T, C]``, and ``targets`` ``[N, C]``
    at the tokens of ``query``, bool ``[B, T]``, are of each of ``layers``, which are gone through one after
    another: nothing is stacked.

    Returns:
        ``"align/layer"``, its index, and ``"align/layer_share"``; so for "token", from 0, and "channel".
    """
    device = states[0].device
    of_layers, of_tokens, of_channels = [], 0, 0
    places = query.nonzero(as_tuple=True)  # once: the host waits for it
    for x, y in zip(states, targets, strict=True):
        x, y = upcast(x[tuple(place.to(x.device) for place in places)]), upcast(y)
        squares = (x - y).square_()
        if form == "relative":
            both = x.square().sum(1) + y.square().sum(1)
            squares /= both.clamp_min(torch.finfo(both.dtype).tiny)[:, None]
        of_layers.append(squares.sum().to(device))
        of_tokens = of_tokens + squares.sum(1).to(device)
        of_channels = of_channels + squares.sum(0).to(device)
    ranks = (query.cumsum(-1) - 1)[query].to(device)
    of_ranks = of_tokens.new_zeros(int(ranks.max()) + 1).index_add_(0, ranks, of_tokens)
    return {
        **_largest("align/layer", torch.stack(of_layers), layers),
        **_largest("align/token", of_ranks),
        **_largest("align/channel", of_channels),
    }


@torch.no_grad()
def layer_shares(name: str, losses: Sequence[Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """``"<name>/layer"`` and ``"<name>/layer_share"`` of a loss that is the sum of one of each layer."""
    device = losses[0].device
    return _largest(f"{name}/layer", torch.stack([x.to(device) for x in losses]), layers)


def _largest(name: str, parts: Tensor, indices: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The index and the share of the largest; of one alone there is nothing to say."""
    if len(parts) < 2:
        return {}
    total, largest = parts.sum().clamp_min(torch.finfo(parts.dtype).tiny), parts.argmax()
    index = largest if indices is None else torch.tensor(indices)[largest.cpu()]
    return {name: index, f"{name}_share": parts.max() / total}


def describe_large_shares(measured: Mapping[str, float]) -> str | None:
    """What has more than half of a part of the loss, in words, or None if nothing has."""
    large = []
    for key, share in measured.items():
        if key.endswith("_share") and share > LARGE:
            name, _, kind = key.removesuffix("_share").rpartition("/")
            index = int(measured[f"{name}/{kind}"])
            where = f"{kind} {index} of the query" if kind == "token" else f"{kind} {index}"
            large.append(f"{where} has {share:.1%} of {name}")
    if not large:
        return None
    return (
        f"{', '.join(large)}: more than all others together, so that it decides the gradient and the others "
        "are hardly learned; see mmicl_kernels/training/README.md"
    )
