"""Arithmetic in the routing space, for server and clients: nearest centroids, and derived spaces."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from fedrouter.types import Array, Float64s, RoutingSpace

Labels = NDArray[np.int64]


def nearest(x: Array, space: RoutingSpace) -> tuple[Labels, Float64s]:
    """Return the index of each row's nearest centroid and the distance to it: (n,), (n,)."""
    squared = _squared(x, space)
    index = squared.argmin(1)
    return index, np.sqrt(np.maximum(squared[np.arange(len(x)), index], 0))


def only(space: RoutingSpace, wanted: Collection[int]) -> RoutingSpace:
    """Return the space with only the centroids of the task clusters ``wanted``, or with all if none match."""
    kept = [i for i, k in enumerate(space.cluster_of) if k in wanted]
    cluster_of = tuple(space.cluster_of[i] for i in kept)
    return replace(space, centroids=space.centroids[kept], cluster_of=cluster_of) if kept else space


def _squared(x: Array, space: RoutingSpace) -> Float64s:
    """Return the squared distances between rows and centroids: (n, m)."""
    z = space.project(x.astype(np.float64))
    centroids = space.centroids.astype(np.float64)
    return np.asarray((z**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * z @ centroids.T)


def widened(space: RoutingSpace, centroids: Array) -> RoutingSpace:
    """Append one task cluster for each of ``centroids``, (n, m)."""
    first = max(space.cluster_of) + 1
    return replace(
        space,
        centroids=np.concatenate([space.centroids, centroids]),
        cluster_of=(*space.cluster_of, *range(first, first + len(centroids))),
    )


def narrowed(space: RoutingSpace, kept: Sequence[int]) -> RoutingSpace:
    """Return the space with only the task clusters ``kept``, renumbered in that order."""
    rows = [i for i, k in enumerate(space.cluster_of) if k in kept]
    number = {k: i for i, k in enumerate(kept)}
    return replace(
        space,
        centroids=space.centroids[rows],
        cluster_of=tuple(number[space.cluster_of[i]] for i in rows),
    )


def renumbered(space: RoutingSpace, order: Sequence[int]) -> RoutingSpace:
    """Return the space with task cluster ``order[k]`` renumbered to k."""
    number = {old: new for new, old in enumerate(order)}
    return replace(space, cluster_of=tuple(number[k] for k in space.cluster_of))


def k_means(x: Float64s, num: int, attempts: int, seed: int, weights: Float64s | None = None) -> KMeans:
    """Fit k-means to (n, d); fewer distinct rows than ``num`` give fewer clusters, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
        return KMeans(num, n_init=attempts, random_state=seed).fit(x, sample_weight=weights)
