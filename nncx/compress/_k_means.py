"""k-means of numbers: the values that Deep Compression lets the weights of a layer share.

Sorted, a cluster is a stretch of numbers between two midpoints. So a round of Lloyd's algorithm
takes two binary searches a cluster and differences of prefix sums, whatever the count of numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_MOST_ROUNDS = 10_000  # half a million normal weights and 255 clusters took up to 4,350


def k_means(values: Tensor, k: int, init: str = "linear", seed: int = 0) -> Tensor:
    """Lloyd's algorithm until nothing changes; the same bits for the same arguments.

    A value in the middle between two centroids belongs to the lower one. A cluster that has lost
    its last value begins anew at the value that is farthest from its centroid.

    Args:
        values: finite, any shape, dtype and device.
        k: how many clusters, at least 1.
        init: where the centroids begin. "linear": evenly spaced from the least to the largest
            value, which gives the few large weights, the important ones, centroids of their own.
            "density": at the quantiles, as many values to each. "random": at values that are drawn.
        seed: of "random".

    Returns:
        float32 `[c]` on the CPU, ascending: `k` centroids, or the distinct values if those are not
        more than `k`.

    Raises:
        ValueError: for NaN or infinity.
    """
    if not values.isfinite().all():
        raise ValueError("k-means: the values must be finite, got NaN or infinity; train anew")
    points, counts = values.detach().cpu().double().flatten().unique(return_counts=True)
    if len(points) <= k:
        return points.float()
    centroids = _STARTS[init](points, counts, k, seed)
    sizes = _prefix_sums(counts)
    totals = _prefix_sums(points * counts)
    before = None
    for _ in range(_MOST_ROUNDS):
        edges = _edges(points, centroids)
        if before is not None and torch.equal(before, edges):
            break
        members, sums = sizes[edges].diff(), totals[edges].diff()
        empty = members == 0
        if empty.any():
            distances = (points - centroids.repeat_interleave(edges.diff())).abs()
            sums[empty] = points[distances.topk(int(empty.sum())).indices]
            members[empty] = 1
        centroids = (sums / members).sort().values
        before = edges
    return centroids.float()


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest of the ascending `centroids`, int64 like `values`, on its device."""
    midpoints = _midpoints(centroids.double()).to(values.device)
    return torch.bucketize(values.detach().double().contiguous(), midpoints)


def _midpoints(centroids: Tensor) -> Tensor:
    return (centroids[1:] + centroids[:-1]) / 2


def _edges(points: Tensor, centroids: Tensor) -> Tensor:
    """Where in the ascending `points` each cluster begins, and where the last one ends."""
    inner = torch.searchsorted(points, _midpoints(centroids), right=True)
    return torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), len(points))))


def _prefix_sums(values: Tensor) -> Tensor:
    return torch.cat((values.new_zeros(1), values.cumsum(0)))


def _linear(points: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    return torch.linspace(float(points[0]), float(points[-1]), k, dtype=points.dtype)


def _density(points: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    ranks = (torch.arange(k, dtype=torch.double) + 0.5) / k * int(counts.sum())
    return points[torch.searchsorted(counts.cumsum(0).double(), ranks)]


def _random(points: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randperm(len(points), generator=generator)[:k]].sort().values


_Start = Callable[[Tensor, Tensor, int, int], Tensor]
_STARTS: dict[str, _Start] = {"linear": _linear, "density": _density, "random": _random}
INITS = tuple(_STARTS)
