"""What a client computes of its own rows, and all that it reveals before the first round: never a row.

The server's half is discover.py; its docstring tells the exchanges in order.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from scipy.stats import norm
from sklearn.cluster import KMeans
from sklearn.metrics import euclidean_distances

from fedrouter.config import Count
from fedrouter.errors import TrainingError
from fedrouter.types import Array, Float64s, LocalClusters, Membership, Moments, RoutingSpace, Subset

Labels = NDArray[np.int64]

MAX_LOCAL = 64  # local clusters of "auto"
BRIEF = 32  # numbers that stand for a completion, beside its prompt
MIN_ROWS = 2  # of a local cluster of "auto" on average, before small ones are united
SET_ASIDE = 3  # every third row judges the space that the others made
SMALL = 100  # rows; a client of fewer is small: a third of them tells too little
CROWD = 16  # among so many small clients, a third of the clients stands for all of them
UNTOLD = 0.5  # share of its rows that a client may leave out rather than join small groups
FEW = "few rows"  # stands for all labels that too few rows of a client carry
QUANTILES = np.linspace(0, 1, 101)


def crowd(rows: Mapping[str, Sized]) -> set[str]:
    """Return the small clients' names if they are many: each is set aside whole, or not at all."""
    small = {name for name, own in rows.items() if len(own) < SMALL}
    return small if len(small) >= CROWD else set()


def set_aside(num_rows: int, seed: int, whole: bool = False) -> tuple[Labels, Labels]:
    """Return (fit, held): row numbers that the space is fitted to, and those that it is judged on.

    Every third row is set aside; with ``whole`` all rows in one of three draws, else none.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_rows)
    cut = num_rows // SET_ASIDE
    if whole:
        cut = num_rows if rng.integers(SET_ASIDE) == 0 else 0
    return np.sort(order[cut:]), np.sort(order[:cut])


def rows_needed(least: int) -> int:
    """Return how many rows a client must have for ``least`` of them not to be set aside; two at the least."""
    return max(2, (SET_ASIDE * least - 1) // (SET_ASIDE - 1))


def num_validation(num_rows: int, share: float) -> int:
    """Return how many of a subset's rows are not trained on; one row at least is."""
    return min(int(share * num_rows), num_rows - 1)


def beside(x: Array, answers: Array) -> Array:
    """Return prompts, and beside each its completion in brief: (n, d + BRIEF) float32.

    In brief: a random projection, the same everywhere. Lengths and angles stay as they are but for some
    1/√BRIEF (Johnson and Lindenstrauss 1984), and a scatter matrix of both stays small.
    """
    d = x.shape[1]
    projection = np.random.default_rng(0).normal(size=(d, BRIEF)) / np.sqrt(BRIEF)
    return np.asarray(np.c_[x, answers @ projection], dtype=np.float32)


def summarise(x: Array, num: Count, seed: int, least: int = 1, answers: Array | None = None) -> LocalClusters:
    """Cut a client's rows into local clusters by k-means.

    Parameters
    ----------
    x : (n, d) float32, embedded prompts.
    num : local clusters; "auto" cuts much finer than tasks, the server joins what belongs together.
    answers : (n, d) float32, embedded completions. With them rows are cut by both, and both are revealed;
        without, it is the paper's way: plain k-means of prompts.
    least : rows; smaller local clusters are united, with each other or with larger ones.

    Raises
    ------
    TrainingError
        If more clusters are asked for than there are rows.
    """
    given = int(np.clip(len(x) // MIN_ROWS, 1, MAX_LOCAL)) if num == "auto" else num
    if given > len(x):
        raise TrainingError(f"{given} local clusters but only {len(x)} rows to cluster; lower cluster.local")
    if answers is None:
        rows = z = x.astype(np.float64)
    else:
        rows, z = beside(x, answers).astype(np.float64), _standard(np.c_[x, answers])
    attempts = 1 if num == "auto" else 10  # the fine cut is mended later
    labels = KMeans(given, n_init=attempts, random_state=seed).fit_predict(z)
    labels = _united(z, labels, least)
    return _gather(rows, labels, labels.max() + 1)


def regroup(x: Array, space: RoutingSpace, least: int = 1) -> LocalClusters:
    """Give each row to the nearest centroid; reveal what came together, ``least`` rows or more."""
    labels = grouped(x, space, least)
    return _gather(x.astype(np.float64)[labels >= 0], labels[labels >= 0], len(space.centroids))


def moments(
    x: Array, answers: Array, held: Labels, space: RoutingSpace, directions: Float64s, least: int = 1
) -> Moments:
    """Reveal moments by nearest centroid: of rows set aside along ``directions``, and of all answers.

    Parameters
    ----------
    x : (n, D) float32, rows as the space sees them.
    answers : (n, d) float32, embedded completions.
    held : numbers of the rows set aside.
    directions : (D, r) in which rows set aside are looked at.
    least : rows; of fewer that came together nothing is revealed.
    """
    member = _members(grouped(x, space, least), len(space.centroids))  # (n, m)
    aside = _members(grouped(x[held], space, least), len(space.centroids))
    z = (x[held].astype(np.float64) - space.mean) @ directions  # (n, r)
    squares = np.einsum("nm,nr,ns->mrs", aside, z, z, optimize=True)
    return Moments(aside.sum(0), aside.T @ z, squares, member.T @ answers, member.sum(0))


def told_rows(client: str, tasks: Sequence[str | None], told: Membership) -> dict[int, Labels]:
    """Return row numbers by task cluster, as the client or its labels are told."""
    found = {k: np.arange(len(tasks)) for k in told.clients.get(client, ())}
    if told.tasks:
        labels = np.array([-1 if task is None else told.tasks.get(task, -1) for task in tasks])
        found |= {int(k): np.flatnonzero(labels == k) for k in np.unique(labels) if k >= 0}
    return found


def gather(x: Array, rows: Mapping[int, Labels], num: int, least: int = 1) -> LocalClusters:
    """Reveal what the first ``num`` task clusters' rows come to, where they are ``least`` or more."""
    labels = np.full(len(x), -1)
    for k, own in rows.items():
        if k < num and len(own) >= least:
            labels[own] = k
    return _gather(x[labels >= 0].astype(np.float64), labels[labels >= 0], num)


def assign(
    x: Array,
    held: Labels,
    space: RoutingSpace,
    tasks: Sequence[str | None],
    told: Mapping[int, Labels] | None = None,
    least: int = 1,
) -> tuple[dict[int, Labels], tuple[Subset, ...]]:
    """Give each row to its nearest centroid's task cluster, or where it is told.

    Returns
    -------
    rows : row numbers by task cluster; stays with the client.
    subsets : what the client reveals: counts, and quantiles of the distances of rows set aside. Rows of a
        task cluster that has fewer than ``least`` of them go to the nearest one that has enough; where rows
        are told their task cluster, fewer take no part.
    """
    if told is None:
        counts = np.bincount(np.asarray(space.cluster_of)[nearest(x, space)[0]])
        enough = only(space, np.flatnonzero(counts >= min(least, counts.max())))
        labels = np.asarray(enough.cluster_of)[nearest(x, enough)[0]]
        found = {int(k): np.flatnonzero(labels == k) for k in np.unique(labels)}
    else:
        found = {k: rows for k, rows in told.items() if len(rows) >= least}
    subsets = []
    for k, rows in sorted(found.items()):
        distance = nearest(x[rows], only(space, [k]))[1]
        aside = distance[np.isin(rows, held)]
        if len(aside) < least:  # then of all its rows
            aside = aside[:0]
        found_quantiles = quantiles(aside if len(aside) else distance, least)
        subsets.append(Subset(k, len(rows), len(aside), found_quantiles, count_tasks(tasks, rows, least)))
    return found, tuple(subsets)


def quantiles(distances: Float64s, least: int) -> Array:
    """Return (101,) float32 quantiles, each of them made of ``least`` rows or more.

    The sorted distances are cut into blocks; a line through the blocks' means, over what a normal
    distribution has there, is carried on to both ends. A single block is taken for normally distributed.
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
        normal = -np.diff(norm.pdf(norm.ppf(ends))) / np.diff(ends)  # means of its blocks
        found = make_interp_spline(normal, means, k=1)(wanted)
    return np.asarray(np.maximum(found, 0), dtype=np.float32)


def grouped(x: Array, space: RoutingSpace, least: int) -> Labels:
    """Return each row's nearest centroid, -1 where fewer than ``least`` rows would be told of together.

    Where that were most rows, small groups give theirs to the next nearest centroids, those first whose rows
    have the shortest way, until no more than ``UNTOLD`` of all go untold. Joined without end, a client of few
    rows would mix its tasks; not joined at all, it would say nothing.
    """
    squared = _squared(x, space)
    squared[:, np.bincount(squared.argmin(1), minlength=len(space.centroids)) == 0] = np.inf
    while True:
        labels: Labels = squared.argmin(1)
        counts = np.bincount(labels, minlength=squared.shape[1])
        few = np.flatnonzero((counts > 0) & (counts < least))
        if counts[few].sum() <= UNTOLD * len(x) or (counts > 0).sum() == 1:
            return np.where(np.isin(labels, few), -1, labels)
        ways = []
        for k in few:
            own = squared[labels == k]
            ways.append((np.delete(own, k, 1).min(1) - own[:, k]).mean())
        squared[:, few[int(np.argmin(ways))]] = np.inf


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


def compare(x: Array, space: RoutingSpace, radii: Sequence[float]) -> tuple[Labels, Labels]:
    """Return the task cluster of each row within its radius, and the numbers of the rows beyond."""
    centroid, distance = nearest(x, space)
    labels = np.asarray(space.cluster_of)[centroid]
    inside = distance <= np.asarray(radii)[labels]
    return labels[inside], np.flatnonzero(~inside)


def count_tasks(tasks: Sequence[str | None], rows: Labels, least: int = 1) -> Mapping[str, int]:
    """Count the task labels among ``rows``; those that fewer than ``least`` carry are ``FEW``."""
    counts = Counter(task for row in rows if (task := tasks[row]) is not None)
    told = {task: count for task, count in sorted(counts.items()) if count >= least}
    few = counts.total() - sum(told.values())
    return {**told, FEW: few} if few else told


def _standard(x: Array) -> Float64s:
    """Return columns in units of their own standard deviation: no few dimensions decide alone."""
    rows = x.astype(np.float64)
    return np.asarray((rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-12))


def _squared(x: Array, space: RoutingSpace) -> Float64s:
    """(n, m) squared distances between rows and centroids."""
    z = (x.astype(np.float64) - space.mean) @ space.transform
    centroids = space.centroids.astype(np.float64)
    return np.asarray((z**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * z @ centroids.T)


def _united(z: Float64s, labels: Labels, least: int) -> Labels:
    """Unite groups smaller than ``least`` until none is left, always where it adds least scatter (Ward 1963).

    Two small groups of one kind make a large one; given to the nearest large group, they would spoil it.
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


def _members(labels: Labels, num: int) -> Float64s:
    """Return (n, num) ones and zeros; a row labelled -1 has zeros only."""
    return np.asarray(labels[:, None] == np.arange(num), dtype=np.float64)


def _gather(x: Float64s, labels: Labels, num: int) -> LocalClusters:
    counts = np.bincount(labels, minlength=num).astype(np.float64)
    sums = np.zeros((num, x.shape[1]))
    np.add.at(sums, labels, x)
    centroids = sums / np.maximum(counts, 1)[:, None]
    centred = x - centroids[labels]
    return LocalClusters(counts, centroids, centred.T @ centred)
