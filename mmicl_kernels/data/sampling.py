"""Which samples become queries and which their demonstrations: M2IV's training data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draw:
    """Indices of a query and of its demonstrations, in the order of the prompt."""

    query: int
    demonstrations: tuple[int, ...]


def draw_demonstrations(features: Tensor, queries: int, shots: int, *, seed: int = 0) -> list[Draw]:
    """Every query twice: with ``shots`` demonstrations, and with the same ones shuffled.

    The queries are the samples of ``features [n, d]`` next to the centroids of ``queries`` clusters; their
    demonstrations are drawn from all other samples, without replacement. After a re-implementation of M2IV
    (arXiv 2504.04633), which has 2,000 queries and 16 shots. Deterministic given ``seed``.

    Raises:
        ValueError: as :func:`nearest_to_centroids`, or fewer than ``shots`` samples are left.
    """
    chosen = nearest_to_centroids(features, queries, seed=seed)
    n = features.shape[0]
    if not 0 < shots <= n - queries:
        raise ValueError(f"shots is {shots!r}, expected 1 to {n - queries}, the samples that are no query")
    support = torch.ones(n, dtype=torch.bool)
    support[chosen] = False
    support = support.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for query in chosen.tolist():
        drawn = support[torch.randperm(len(support), generator=generator)[:shots]]
        shuffled = drawn[torch.randperm(shots, generator=generator)]
        draws += [Draw(query, tuple(order.tolist())) for order in (drawn, shuffled)]
    return draws


def nearest_to_centroids(features: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Sorted indices ``[count]``: of each k-means cluster of ``features [n, d]`` the member at its centre.

    Raises:
        ValueError: ``count`` is not 1 to n, or there are fewer different samples than that.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    n = features.shape[0]
    if not 0 < count <= n:
        raise ValueError(f"count is {count!r}, expected 1 to {n}, the number of samples")
    points = features.detach().double().cpu()
    distinct = points.unique(dim=0).shape[0]
    if distinct < count:
        raise ValueError(f"features has {distinct} different samples, expected at least {count}")
    members, centroids = _k_means(points, count, seed)
    distances = (points - centroids[members]).norm(dim=-1)
    # By cluster, and within one by distance; a cluster's first is its nearest.
    order = distances.argsort(stable=True)
    order = order[members[order].argsort(stable=True)]
    first = members[order].diff(prepend=torch.tensor([-1])) > 0
    return order[first].sort().values


def _k_means(points: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each point's cluster ``[n]`` and the centroids ``[count, d]``."""
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("clustering needs scikit-learn: pip install scikit-learn") from error
    clusters = KMeans(count, n_init=1, random_state=seed).fit(points.numpy())
    return torch.from_numpy(clusters.labels_).long(), torch.from_numpy(clusters.cluster_centers_)


def joint_features(image: Tensor, question: Tensor) -> Tensor:
    """``[n, d1 + d2]``: the features ``[n, d1]`` and ``[n, d2]``, each of unit length, side by side."""
    return torch.cat([F.normalize(image, dim=-1), F.normalize(question, dim=-1)], -1)


def split_shots(demonstrations: Sequence[Item], passes: int) -> list[Sequence[Item]]:
    """Consecutive demonstrations for each pass of a ``ManyShotBatch``; sizes differ by one at most.

    Raises:
        ValueError: ``passes`` is not 1 to the number of demonstrations.
    """
    n = len(demonstrations)
    if not 0 < passes <= n:
        raise ValueError(f"passes is {passes!r}, expected 1 to {n}, the number of demonstrations")
    return [demonstrations[n * i // passes : n * (i + 1) // passes] for i in range(passes)]
