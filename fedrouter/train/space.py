"""Arithmetic in the routing space, for both sides: the nearest centroid, and spaces made of other spaces."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedrouter.types import Array, Float64s, RoutingSpace

Labels = NDArray[np.int64]


def nearest(x: Array, space: RoutingSpace) -> tuple[Labels, Float64s]:
    """Return each row's nearest centroid and the distance to it."""
    squared = _squared(x, space)
    found = squared.argmin(1)
    return found, np.sqrt(np.maximum(squared[np.arange(len(x)), found], 0))


def only(space: RoutingSpace, wanted: Collection[int]) -> RoutingSpace:
    """Return the space with the centroids of some task clusters; all of them where these have none."""
    own = [i for i, k in enumerate(space.cluster_of) if k in wanted]
    cluster_of = tuple(space.cluster_of[i] for i in own)
    return replace(space, centroids=space.centroids[own], cluster_of=cluster_of) if own else space


def _squared(x: Array, space: RoutingSpace) -> Float64s:
    """(n, m) squared distances between rows and centroids."""
    z = space.project(x.astype(np.float64))
    centroids = space.centroids.astype(np.float64)
    return np.asarray((z**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * z @ centroids.T)


def widened(space: RoutingSpace, centroids: Array) -> RoutingSpace:
    """Return the space with new task clusters, a centroid each: (n, m)."""
    first = max(space.cluster_of) + 1
    return replace(
        space,
        centroids=np.concatenate([space.centroids, centroids]),
        cluster_of=(*space.cluster_of, *range(first, first + len(centroids))),
    )


def narrowed(space: RoutingSpace, kept: Sequence[int]) -> RoutingSpace:
    """Return the space with the task clusters ``kept`` alone, numbered anew in that order."""
    rows = [i for i, k in enumerate(space.cluster_of) if k in kept]
    number = {k: i for i, k in enumerate(kept)}
    return replace(
        space,
        centroids=space.centroids[rows],
        cluster_of=tuple(number[space.cluster_of[i]] for i in rows),
    )


def renumbered(space: RoutingSpace, order: Sequence[int]) -> RoutingSpace:
    """Return the space with task cluster ``order[k]`` as number k."""
    number = {old: new for new, old in enumerate(order)}
    return replace(space, cluster_of=tuple(number[k] for k in space.cluster_of))
