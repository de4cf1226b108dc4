"""What a client computes from its rows and reveals before the first round; it never reveals a row.

The server's side is discover.py, whose docstring lists the exchanges in order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.interpolate import make_interp_spline
from scipy.stats import norm
from sklearn.metrics import euclidean_distances

from fedrouter.config import Count
from fedrouter.errors import TrainingError
from fedrouter.train.federation import FEW, QUANTILES
from fedrouter.train.space import Labels, k_means, nearest, only
from fedrouter.types import Array, Float64s, LocalClusters, Membership, RoutingSpace, Subset

MAX_LOCAL = 128  # maximum number of local clusters with "auto": 200 KB of float32 at d = 384
LOCAL_ROWS = 2  # mean number of rows per local cluster with "auto", before small ones are united
TRIM = 0.25  # share of the rows, those farthest from their centroid, that the scatter leaves out


def summarise(x: Array, num: Count, seed: int, least: int = 1) -> LocalClusters:
    """Group a client's rows into local clusters by k-means.

    A row in the wrong local cluster inflates the scatter in the very directions in which two tasks differ, so
    the farthest rows are left out of the scatter.

    Parameters
    ----------
    x : (n, d) float32, embedded prompts.
    num : number of local clusters, found with Euclidean distances (the paper's method); "auto" gives clusters
        much finer than tasks, with dimensions scaled to unit variance, which the server joins.
    least : minimum number of rows; smaller local clusters are united with each other or with larger ones.

    Raises
    ------
    TrainingError
        If ``num`` exceeds the number of rows.
    """
    num_clusters = num_local(len(x), num)
    rows = x.astype(np.float64)
    z, attempts = (rows / np.maximum(rows.std(0), 1e-12), 1) if num == "auto" else (rows, 10)
    labels = _united(z, k_means(z, num_clusters, attempts, seed).labels_, least)
    found = gather(rows, labels, labels.max() + 1)
    far = (((rows - found.centroids[labels]) / np.maximum(rows.std(0), 1e-12)) ** 2).sum(1)
    near = far <= np.quantile(far, 1 - TRIM)
    return replace(
        found, scatter=_scatter(rows[near], found.centroids[labels[near]]) * len(rows) / near.sum()
    )


def num_local(num_rows: int, num: Count) -> int:
    """Return the number of local clusters of a client, before small ones are united.

    Raises
    ------
    TrainingError
        If ``num`` exceeds the number of rows.
    """
    if num == "auto":
        return int(np.clip(num_rows // LOCAL_ROWS, 1, MAX_LOCAL))
    if num > num_rows:
        raise TrainingError(f"{num} local clusters but only {num_rows} rows to cluster; lower cluster.local")
    return num


def regroup(x: Array, space: RoutingSpace, least: int = 1) -> LocalClusters:
    """Group rows by nearest centroid; leave out groups of fewer than ``least`` rows."""
    labels = nearest(x, space)[0]
    counts = np.bincount(labels, minlength=len(space.centroids))
    revealed = counts[labels] >= min(least, counts.max())
    return gather(x.astype(np.float64)[revealed], labels[revealed], len(space.centroids))


def rows_by_membership(client: str, tasks: Sequence[str | None], membership: Membership) -> dict[int, Labels]:
    """Return row numbers by task cluster, as ``membership`` assigns the client or its task labels."""
    found = {k: np.arange(len(tasks)) for k in membership.clients.get(client, ())}
    if membership.tasks:
        labels = np.array([-1 if task is None else membership.tasks.get(task, -1) for task in tasks])
        found |= {int(k): np.flatnonzero(labels == k) for k in np.unique(labels) if k >= 0}
    return found


def gather_members(x: Array, rows: Mapping[int, Labels], num: int, least: int = 1) -> LocalClusters:
    """Group rows of the first ``num`` task clusters; leave out groups of fewer than ``least`` rows."""
    labels = np.full(len(x), -1)
    for k, own in rows.items():
        if k < num and len(own) >= least:
            labels[own] = k
    return gather(x[labels >= 0].astype(np.float64), labels[labels >= 0], num)


def gather(x: Float64s, labels: Labels, num: int) -> LocalClusters:
    """Return counts, centroids and pooled scatter of rows in ``num`` groups."""
    counts = np.bincount(labels, minlength=num).astype(np.float64)
    sums = np.zeros((num, x.shape[1]))
    np.add.at(sums, labels, x)
    centroids = sums / np.maximum(counts, 1)[:, None]
    return LocalClusters(counts, centroids, _scatter(x, centroids[labels]))


def assign(
    x: Array,
    space: RoutingSpace,
    tasks: Sequence[str | None],
    members: Mapping[int, Labels] | None = None,
    least: int = 1,
) -> tuple[dict[int, Labels], tuple[Subset, ...]]:
    """Assign each row to the task cluster of its nearest centroid, or by ``members``.

    Rows of a task cluster with fewer than ``least`` rows of this client go to the nearest one with enough;
    with ``members`` they are left out instead.

    Parameters
    ----------
    members : row numbers by task cluster, in a baseline.

    Returns
    -------
    rows : row numbers by task cluster, for the client only.
    subsets : counts and distance quantiles, which the client reveals.
    """
    if members is None:
        counts = np.bincount(np.asarray(space.cluster_of)[nearest(x, space)[0]])
        enough = only(space, np.flatnonzero(counts >= min(least, counts.max())))
        labels = np.asarray(enough.cluster_of)[nearest(x, enough)[0]]
        found = {int(k): np.flatnonzero(labels == k) for k in np.unique(labels)}
    else:
        found = {k: rows for k, rows in members.items() if len(rows) >= least}
    subsets = []
    for k, rows in sorted(found.items()):
        distance = nearest(x[rows], only(space, [k]))[1]
        subsets.append(Subset(k, len(rows), quantiles(distance, least), count_tasks(tasks, rows, least)))
    return found, tuple(subsets)


def quantiles(distances: Float64s, least: int) -> Array:
    """Return (101,) float32 quantiles, each computed from at least ``least`` rows.

    The sorted distances are cut into blocks. The blocks' means are interpolated linearly over the block means
    of a normal distribution, and extrapolated at both ends. A single block is treated as normally
    distributed.
    """
    if least == 1:
        return np.quantile(distances, QUANTILES, method="hazen").astype(np.float32)
    blocks = np.array_split(np.sort(distances), max(len(distances) // least, 1))
    means = np.array([block.mean() for block in blocks])
    wanted = norm.ppf(np.clip(QUANTILES, 0.01, 0.99))
    if len(blocks) == 1:
        found = means[0] + distances.std(ddof=min(1, len(distances) - 1)) * wanted
    else:
        ends = np.cumsum([0, *map(len, blocks)]) / len(distances)
        normal = -np.diff(norm.pdf(norm.ppf(ends))) / np.diff(ends)  # block means of the normal distribution
        found = make_interp_spline(normal, means, k=1)(wanted)
    return np.asarray(np.maximum(found, 0), dtype=np.float32)


def compare(x: Array, space: RoutingSpace, radii: Sequence[float]) -> tuple[Labels, Labels]:
    """Return the task clusters of the rows within a radius, and the row numbers of the others."""
    centroid, distance = nearest(x, space)
    labels = np.asarray(space.cluster_of)[centroid]
    inside = distance <= np.asarray(radii)[labels]
    return labels[inside], np.flatnonzero(~inside)


def count_tasks(tasks: Sequence[str | None], rows: Labels, least: int = 1) -> Mapping[str, int]:
    """Count the task labels of ``rows``; labels of fewer than ``least`` rows are counted as ``FEW``."""
    counts = Counter(task for row in rows if (task := tasks[row]) is not None)
    revealed = {task: count for task, count in sorted(counts.items()) if count >= least}
    few = counts.total() - sum(revealed.values())
    return {**revealed, FEW: few} if few else revealed


def _united(z: Float64s, labels: Labels, least: int) -> Labels:
    """Unite groups smaller than ``least`` with others, always where it adds least scatter (Ward 1963).

    Small groups may unite with each other: two of one task should not end up in a large group of another.
    """
    found, labels = np.unique(labels, return_inverse=True)
    counts = np.bincount(labels)
    means = np.stack([z[labels == k].mean(0) for k in range(len(found))])
    squared = euclidean_distances(means, squared=True)
    while len(counts) > 1 and counts.min() < least:
        small = np.flatnonzero(counts < least)
        cost = squared[small] / (1 / counts[small, None] + 1 / counts)
        cost[np.arange(len(small)), small] = np.inf
        i, j = np.unravel_index(cost.argmin(), cost.shape)
        a, b = sorted((int(small[i]), int(j)))
        means[a] = np.average(means[[a, b]], axis=0, weights=counts[[a, b]])
        counts[a] += counts[b]
        squared[a] = squared[:, a] = ((means - means[a]) ** 2).sum(1)
        labels = np.where(labels == b, a, labels - (labels > b))
        counts, means = np.delete(counts, b), np.delete(means, b, 0)
        squared = np.delete(np.delete(squared, b, 0), b, 1)
    return labels


def _scatter(x: Float64s, centres: Float64s) -> Float64s:
    return (x - centres).T @ (x - centres)
