"""Task discovery on the server: from what clients reveal to the space in which prompts are routed.

**What counts as a task.** Only prompts are used. A tree joins the clients' fine groups of prompts, always
the two groups whose union adds least scatter (Ward 1963). Read from the top, the tree splits the rows into
2, 3, … groups. A split separates tasks if it explains a fair part of what a task explains on average:
K · ΔB ≥ SHARE · B, where B is the scatter between all groups and ΔB is what the split into K groups adds to
it. This works because between tasks whole prompts change (form, length, words), but within a task only the
content that fills the form. So ΔB stays near B / K down to the last split between tasks and then drops to
what splits of a single cloud explain. If rows differ much within tasks, that is more than SHARE; so a split
between tasks must also explain ``ABOVE`` times as much as the split that explains least. In a single cloud
the first split explains least, which gives one task. The rule has no unit: B grows with the differences
between tasks. With many tasks that are all equally far apart, each of the first splits explains little. They
end in a cliff: a split that explains at least twice SHARE is followed by one that explains less than half as
much. The last cliff then gives the number of tasks.

The exchanges, in order; no row leaves its client in any of them:

1. Each client groups its rows into small local clusters of prompts, and reveals centroids, counts and one
   pooled scatter matrix (``cluster.summarise``).
2. The server joins the groups; every client has the same weight (``find_tasks``). Each dimension is scaled to
   unit variance and then half whitened by the scatter within groups (``metric``), so that large dimensions do
   not dominate and directions in which rows of one group vary count less. The first tree uses the scatter
   within local clusters. Once it gives the number of tasks, it is cut ``FINER`` times as fine, and a second
   tree joins these groups with the scatter within them.
3. The routing space is half whitened by the scatter within task clusters and has one centroid for each, as in
   the paper. Directions between task clusters are stretched so that a prompt of no task lies outside every
   radius (``routing_space``).
4. Each client reveals quantiles of its rows' distances (``cluster.assign``). A quantile of all clients'
   distances together is a task cluster's ``radius``.

``cluster.method = "kmeans"`` is the paper's method (section 3): k-means on each client and k-means over the
centroids, with Euclidean distances.

The server sums what clients reveal as it arrives: it holds one client's scatter matrix at a time and keeps
only counts and centroids of each.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from fedrouter.config import ClusterSettings, Count
from fedrouter.errors import TrainingError
from fedrouter.train.federation import QUANTILES, Summaries
from fedrouter.train.space import Labels, k_means
from fedrouter.types import Float64s, LocalClusters, RoutingSpace, Subset

SHARE = 0.15  # minimum share of an average task's scatter that a split between tasks explains
ABOVE = 1.25  # minimum ratio to the split that explains least
NEW_SHARE = 0.5  # minimum share of a known task's scatter for a split of later rows (see decision 0019)
FINER = 3  # groups per task cluster from which the scatter within groups is computed
SHRINKAGE = 0.5  # weight of the isotropic part of the covariance within groups: half whitened
LEVERAGE = 0.1  # relative growth of a squared radius per squared distance ÷ number of rows
MAX_JOINED = 1024  # maximum number of groups in the tree; if there are more, k-means unites the closest
MAX_FITTED = 8192  # maximum number of centroids that k-means fits; if there are more, a random sample


def discover(federation: Summaries, settings: ClusterSettings, seed: int) -> RoutingSpace:
    """Find the task clusters of a federation.

    Raises
    ------
    TrainingError
        If ``cluster.global`` exceeds the number of groups of rows.
    """
    if settings.method == "kmeans":
        return kmeans_space(federation.summarise(settings.local), settings.global_, seed)
    return routing_space(find_tasks(federation, settings))


def find_tasks(federation: Summaries, settings: ClusterSettings, known: float | None = None) -> LocalClusters:
    """Return the task clusters as groups of rows: counts, centroids, scatter (exchanges 1 and 2).

    Parameters
    ----------
    known : the result of ``explained_by_a_task`` for an existing routing space, in whose coordinates the rows
        are given.
    """
    groups = _collected(map(_equally_weighted, federation.summarise(settings.local)))
    if len(groups.counts) > MAX_JOINED:
        groups = united(groups, _nearby_groups(groups))
    num = settings.global_
    if num != "auto" and num > len(groups.counts):
        raise TrainingError(
            f"{num} task clusters but only {len(groups.counts)} groups of rows; lower cluster.global"
        )
    tree = Tree(groups, known)
    num = tree.num_tasks() if num == "auto" else num
    if known is not None:
        return united(groups, tree.cut(num))
    finer = united(groups, tree.cut(min(FINER * num, len(groups.counts))))
    return united(finer, Tree(finer).cut(num))


class Tree:
    """Agglomerative clustering of groups of rows by Ward's criterion (Ward 1963).

    Attributes
    ----------
    costs : (m - 1,) scatter added by each union, in the order of the unions.
    between : scatter of all groups about their mean.
    """

    def __init__(self, groups: LocalClusters, known: float | None = None):
        counts = groups.counts.copy()
        z = groups.centroids - _mean(groups)
        if known is None:
            z = z @ metric(groups)
        self._num, self._known = len(counts), known
        self.between, self._weight = float(counts @ (z**2).sum(1)), float(counts.sum())
        self.costs, self._unions = np.zeros(self._num - 1), np.zeros((self._num - 1, 2), dtype=np.int64)
        norms = (z**2).sum(1)
        squared = np.maximum(norms[:, None] + norms - 2 * z @ z.T, 0)
        cost = squared * (counts[:, None] * counts / np.maximum(counts[:, None] + counts, 1e-12))
        np.fill_diagonal(cost, np.inf)
        for step in range(self._num - 1):
            a, b = sorted(np.unravel_index(cost.argmin(), cost.shape))
            self.costs[step], self._unions[step] = cost[a, b], (a, b)
            # Lance and Williams 1967: the costs of the union follow from those of its parts.
            union = (counts[a] + counts) * cost[a] + (counts[b] + counts) * cost[b] - counts * cost[a, b]
            union /= counts[a] + counts[b] + counts
            union[[a, b]] = np.inf
            counts[a] += counts[b]
            cost[a] = cost[:, a] = union
            cost[b] = cost[:, b] = np.inf

    def num_tasks(self) -> int:
        """Return the number of groups after the last split that separates tasks."""
        if not self.between:
            return 1
        if self._known is not None:
            too_little = np.append(self.costs[::-1] / self._weight < NEW_SHARE * self._known, True)
            return int(too_little.argmax()) + 1
        explained = np.arange(2, self._num + 1) * self.costs[::-1] / self.between  # by the split into 2, 3 …
        limit = self._num // 2  # a task cluster has at least two groups
        num = int((explained < max(SHARE, ABOVE * explained[:limit].min())).argmax()) + 1
        cliffs = np.flatnonzero(
            (explained[:limit] >= 2 * SHARE) & (explained[1:][:limit] < explained[:limit] / 2)
        )
        return max(num, int(cliffs[-1]) + 2) if len(cliffs) else num

    def cut(self, num: int) -> Labels:
        """Cut the tree into ``num`` groups; return labels (m,), numbered in the order of first members."""
        labels = np.arange(self._num)
        for a, b in self._unions[: self._num - num]:
            labels[labels == b] = a
        return np.asarray(np.unique(labels, return_inverse=True)[1])


def explained_by_a_task(space: RoutingSpace) -> float | None:
    """Return the average scatter per row that a task explains, before stretching; None with a single task."""
    centroids = space.centroids.astype(np.float64)
    if len(centroids) < 2:
        return None
    stretched = float(((centroids - centroids.mean(0)) ** 2).sum(1).mean())
    return stretched / float(np.sqrt(len(space.transform) / (len(centroids) - 1)))


def kmeans_space(clients: Iterable[LocalClusters], num: Count, seed: int) -> RoutingSpace:
    """Cluster all centroids by k-means, weighted by counts; distances are Euclidean (paper section 3)."""
    groups = _collected(clients)
    assert num != "auto", "the configuration refuses this"
    if num > len(groups.counts):
        raise TrainingError(
            f"{num} task clusters but only {len(groups.counts)} local clusters; "
            "lower cluster.global or raise cluster.local"
        )
    attempts = 50 if len(groups.counts) <= MAX_FITTED else 10
    found = k_means(groups.centroids, num, attempts, seed, groups.counts)
    d = groups.centroids.shape[1]
    return _space(np.zeros(d), np.eye(d), found.cluster_centers_)


def pool(clients: Iterable[LocalClusters], num: int) -> LocalClusters:
    """Pool the clients' groups, of which every client has ``num``; scatter is about the pooled centroids."""
    groups = _collected(clients)
    return united(groups, np.arange(len(groups.counts)) % num)


def united(groups: LocalClusters, labels: Labels) -> LocalClusters:
    """Unite groups with the same label; the scatter between them becomes scatter within groups."""
    num = labels.max() + 1
    counts = np.bincount(labels, weights=groups.counts, minlength=num).astype(np.float64)
    sums = np.zeros((num, groups.centroids.shape[1]))
    np.add.at(sums, labels, groups.counts[:, None] * groups.centroids)
    centroids = sums / np.maximum(counts, 1e-12)[:, None]
    offset = (groups.centroids - centroids[labels]) * np.sqrt(groups.counts)[:, None]
    return LocalClusters(counts, centroids, groups.scatter + offset.T @ offset)


def routing_space(tasks: LocalClusters) -> RoutingSpace:
    """Return the space that prompts are routed in, with one centroid per task cluster.

    Few of the d directions lie between task clusters. Stretched by (d / (K-1))^¼, they add as much spread to
    the squared distance of an in-distribution row as all other directions together. A prompt between task
    clusters then lies far from all of them, while the nearest centroid hardly ever changes.
    """
    mean, transform = _mean(tasks), metric(tasks)
    centroids = (tasks.centroids - mean) @ transform
    if len(centroids) > 1:
        _, sizes, axes = np.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
        between = axes[: len(centroids) - 1][sizes[: len(centroids) - 1] > 1e-9 * max(sizes[0], 1e-12)].T
        stretch = (len(transform) / max(between.shape[1], 1)) ** 0.25
        transform = transform + (stretch - 1) * transform @ between @ between.T
        centroids = (tasks.centroids - mean) @ transform
    return _space(mean, transform, centroids)


def metric(groups: LocalClusters) -> Float64s:
    """Return W (d, d): (x - mean) @ W scales dimensions to unit variance and half whitens within groups."""
    num, centroids = groups.counts.sum(), groups.centroids - _mean(groups)
    within = groups.scatter / num
    variance = np.diag(within) + groups.counts @ centroids**2 / num
    # Without a lower bound, rounding errors would dominate a dimension that hardly varies.
    deviation = np.sqrt(np.maximum(variance, 1e-6 * (_mean(groups) ** 2).mean() + 1e-24))
    values, vectors = np.linalg.eigh(within / np.outer(deviation, deviation))
    isotropic = max(float(values.mean()), 0.01)
    shrunk = (1 - SHRINKAGE) * np.maximum(values, 0) + SHRINKAGE * isotropic
    return np.asarray(vectors / np.sqrt(shrunk) / deviation[:, None])


def radius(subsets: Sequence[Subset], quantile: float, shaped: int | None = None) -> float:
    """Return the distance within which ``quantile`` of a task cluster's new prompts will lie.

    The quantile over all clients is found by bisection, with each client's rows spread evenly between its own
    quantiles. It is then corrected for two effects of having been measured on the training rows. These rows
    determine the centroid, so a new prompt lies farther from it, by √((n + 1) / (n - 1)) for n rows. They
    also determine the metric, which shrinks the directions in which they vary: the leverage of a row at
    distance r is proportional to r² / N.

    Parameters
    ----------
    shaped : N, the number of rows from which the metric was computed; None if it was not computed from them.
    """
    weights = [s.num_examples for s in subsets]
    rows = sum(weights)
    low, high = 0.0, float(max(s.distances[-1] for s in subsets))
    for _ in range(60):
        middle = (low + high) / 2
        within = np.average([np.interp(middle, s.distances, QUANTILES) for s in subsets], weights=weights)
        low, high = (middle, high) if within < quantile else (low, middle)
    leverage = LEVERAGE * high**2 / shaped if shaped else 0.0
    return high * float(np.sqrt((rows + 1) / max(rows - 1, 1) * (1 + leverage)))


def _collected(clients: Iterable[LocalClusters]) -> LocalClusters:
    """Concatenate all groups and sum the scatter matrices."""
    counts, centroids, scatter = [], [], np.zeros((0, 0))
    for c in clients:
        counts.append(c.counts)
        centroids.append(c.centroids)
        scatter = scatter + c.scatter if len(scatter) else c.scatter
    return LocalClusters(np.concatenate(counts), np.concatenate(centroids), scatter)


def _equally_weighted(client: LocalClusters) -> LocalClusters:
    """Give every client the same weight, so that a task of one small client is found too."""
    rows = client.counts.sum()
    return LocalClusters(client.counts / rows, client.centroids, client.scatter / rows)


def _nearby_groups(groups: LocalClusters) -> Labels:
    """Group the closest centroids by k-means; return labels (m,) of at most ``MAX_JOINED`` groups."""
    z = groups.centroids @ metric(groups)
    fitted = np.arange(len(z))
    if len(z) > MAX_FITTED:
        fitted = np.random.default_rng(0).choice(len(z), MAX_FITTED, replace=False)
    found = k_means(z[fitted], MAX_JOINED, 1, 0, groups.counts[fitted])
    return np.unique(found.predict(z), return_inverse=True)[1]


def _mean(groups: LocalClusters) -> Float64s:
    return np.asarray(np.average(groups.centroids, axis=0, weights=groups.counts))


def _space(mean: Float64s, transform: Float64s, centroids: Float64s) -> RoutingSpace:
    return RoutingSpace(
        mean=mean.astype(np.float32),
        transform=transform.astype(np.float32),
        centroids=centroids.astype(np.float32),
        cluster_of=tuple(range(len(centroids))),
    )
