"""What a client computes of its own rows, and all that it reveals before the first round: never a row.

The server's half is discover.py; its docstring tells the exchanges in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from fedrouter.config import Count
from fedrouter.errors import TrainingError
from fedrouter.types import Array, Float64s, LocalClusters, Membership, Moments, RoutingSpace, Subset

Labels = NDArray[np.int64]

MAX_LOCAL = 64  # local clusters of "auto"
MIN_ROWS = 5  # a local cluster of "auto" holds at least so many rows on average
SET_ASIDE = 3  # every third row judges the space that the others made
QUANTILES = np.linspace(0, 1, 101)


def set_aside(num_rows: int, seed: int) -> tuple[Labels, Labels]:
    """Return (fit, held): row numbers that the space is fitted to, and those that it is judged on."""
    order = np.random.default_rng(seed).permutation(num_rows)
    cut = num_rows // SET_ASIDE
    return np.sort(order[cut:]), np.sort(order[:cut])


def num_validation(num_rows: int, share: float) -> int:
    """Return how many of a subset's rows are not trained on; one row at least is."""
    return min(int(share * num_rows), num_rows - 1)


def summarise(x: Array, num: Count, seed: int) -> LocalClusters:
    """Cut a client's rows into local clusters by k-means.

    Parameters
    ----------
    x : (n, d) float32, embedded prompts.
    num : local clusters; "auto" cuts much finer than tasks, the server joins what belongs together.

    Raises
    ------
    TrainingError
        If more clusters are asked for than there are rows.
    """
    given = int(np.clip(len(x) // MIN_ROWS, 1, MAX_LOCAL)) if num == "auto" else num
    if given > len(x):
        raise TrainingError(f"{given} local clusters but only {len(x)} rows to cluster; lower cluster.local")
    rows = x.astype(np.float64)
    if num == "auto":
        # Mended later, so one attempt is enough; in units in which no few dimensions decide alone.
        labels = KMeans(given, n_init=1, random_state=seed).fit_predict(rows / np.maximum(rows.std(0), 1e-12))
    else:
        labels = KMeans(given, n_init=10, random_state=seed).fit_predict(rows)
    groups = _gather(rows, labels, given)
    full = groups.counts > 0
    return LocalClusters(groups.counts[full], groups.centroids[full], groups.scatter)


def regroup(x: Array, space: RoutingSpace) -> LocalClusters:
    """Give each row to the nearest centroid; reveal what came together."""
    return _gather(x.astype(np.float64), nearest(x, space)[0], len(space.centroids))


def moments(x: Array, answers: Array, held: Labels, space: RoutingSpace, basis: Float64s) -> Moments:
    """Reveal moments by nearest centroid: of rows set aside in coordinates ``basis``, and of all answers.

    Parameters
    ----------
    x, answers : (n, d) float32, embedded prompts and completions.
    held : numbers of the rows set aside.
    """
    member = np.eye(len(space.centroids))[nearest(x, space)[0]]  # (n, m)
    z = (x[held].astype(np.float64) - space.mean) @ space.transform @ basis  # (n, r)
    aside = member[held]
    squares = np.einsum("nm,nr,ns->mrs", aside, z, z, optimize=True)
    return Moments(aside.sum(0), aside.T @ z, squares, member.T @ answers, member.sum(0))


def told_rows(client: str, tasks: Sequence[str | None], told: Membership) -> dict[int, Labels]:
    """Return row numbers by task cluster, as the client or its labels are told."""
    found = {k: np.arange(len(tasks)) for k in told.clients.get(client, ())}
    if told.tasks:
        labels = np.array([-1 if task is None else told.tasks.get(task, -1) for task in tasks])
        found |= {int(k): np.flatnonzero(labels == k) for k in np.unique(labels) if k >= 0}
    return found


def gather(x: Array, rows: Mapping[int, Labels], num: int) -> LocalClusters:
    """Reveal what the first ``num`` task clusters' rows come to."""
    labels = np.full(len(x), -1)
    for k, own in rows.items():
        if k < num:
            labels[own] = k
    return _gather(x[labels >= 0].astype(np.float64), labels[labels >= 0], num)


def assign(
    x: Array,
    held: Labels,
    space: RoutingSpace,
    tasks: Sequence[str | None],
    told: Mapping[int, Labels] | None = None,
) -> tuple[dict[int, Labels], tuple[Subset, ...]]:
    """Give each row to its nearest centroid's task cluster, or where it is told.

    Returns
    -------
    rows : row numbers by task cluster; stays with the client.
    subsets : what the client reveals: counts, and quantiles of the distances of rows set aside.
    """
    centroid, distance = nearest(x, space)
    labels = np.asarray(space.cluster_of)[centroid]
    found = {int(k): np.flatnonzero(labels == k) for k in np.unique(labels)} if told is None else dict(told)
    subsets = []
    for k, rows in sorted(found.items()):
        if told is not None:
            distance = nearest(x, _only(space, k))[1]
        aside = np.intersect1d(rows, held)
        quantiles = np.quantile(distance[aside if len(aside) else rows], QUANTILES).astype(np.float32)
        subsets.append(Subset(k, len(rows), len(aside), quantiles, count_tasks(tasks, rows)))
    return found, tuple(subsets)


def nearest(x: Array, space: RoutingSpace) -> tuple[Labels, Float64s]:
    """Return each row's nearest centroid and the distance to it."""
    z = (x.astype(np.float64) - space.mean) @ space.transform
    centroids = space.centroids.astype(np.float64)
    squared = (z**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * z @ centroids.T
    found = squared.argmin(1)
    return found, np.sqrt(np.maximum(squared[np.arange(len(x)), found], 0))


def compare(x: Array, space: RoutingSpace, radii: Sequence[float]) -> tuple[Labels, Labels]:
    """Return the task cluster of each row within its radius, and the numbers of the rows beyond."""
    centroid, distance = nearest(x, space)
    labels = np.asarray(space.cluster_of)[centroid]
    inside = distance <= np.asarray(radii)[labels]
    return labels[inside], np.flatnonzero(~inside)


def count_tasks(tasks: Sequence[str | None], rows: Labels) -> Mapping[str, int]:
    """Count the task labels among ``rows``."""
    counts: dict[str, int] = {}
    for row in rows:
        if (task := tasks[row]) is not None:
            counts[task] = counts.get(task, 0) + 1
    return dict(sorted(counts.items()))


def _only(space: RoutingSpace, cluster: int) -> RoutingSpace:
    """Return the space with one task cluster's centroids; all of them where it has none."""
    own = np.flatnonzero(np.asarray(space.cluster_of) == cluster)
    return replace(space, centroids=space.centroids[own], cluster_of=(0,) * len(own)) if len(own) else space


def _gather(x: Float64s, labels: Labels, num: int) -> LocalClusters:
    counts = np.bincount(labels, minlength=num).astype(np.float64)
    sums = np.zeros((num, x.shape[1]))
    np.add.at(sums, labels, x)
    centroids = sums / np.maximum(counts, 1)[:, None]
    centred = x - centroids[labels]
    return LocalClusters(counts, centroids, centred.T @ centred)
