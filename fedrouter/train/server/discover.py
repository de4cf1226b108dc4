"""What the server computes: from what clients reveal to the space in which prompts are routed.

**What a task is.** Prompts decide. A tree joins the clients' fine groups of prompts, always the two whose
union adds least scatter (Ward 1963). A split of it is one between tasks while it explains a fair part of what
a task explains on average: K · ΔB ≥ SHARE · B, where ΔB is what the split into K groups adds to the scatter B
between all groups. Why it must work: from task to task whole prompts change (their form, their length, their
words), within a task only what fills the form. So down to the last split between tasks ΔB stays near B / K,
and then drops to what splits of a cloud explain. That depends on the rows: where they differ much within
tasks, it is more than SHARE; so a split between tasks also explains clearly more, by ``ABOVE``, than the one
that explains least. In a single cloud the first split explains least: one task. The rule has no unit: B grows
with the differences between tasks. Where tasks are many and all alike far from each other, each of the first
splits explains little; they end in a cliff, a split that explains twice SHARE before one that explains less
than half of it, and the number is where the last cliff is.

The exchanges, in order; no row leaves its client in any of them:

1. Each client cuts its rows into small local clusters by prompts, and reveals centroids, counts and one
   pooled scatter matrix (``cluster.summarise``).
2. The server joins them; every client counts alike (``find_tasks``). Distances are taken in dimensions of
   unit variance, half whitened by the scatter within groups (``metric``): large dimensions do not dominate,
   and directions in which rows of one group vary count less. First it is the scatter within local clusters;
   once the number is known, the tree is cut ``FINER`` times as fine, the scatter within these groups is
   taken, and they are joined again.
3. The routing space is half whitened by the scatter within task clusters, with one centroid for each, as in
   the paper; directions between task clusters are stretched so that abstention sees them (``routing_space``).
4. Each client reveals quantiles of its rows' distances (``cluster.assign``); their pooled quantile is a task
   cluster's ``radius``.

The paper's way (section 3) is ``kmeans``: k-means on each client, k-means over the centroids, plain Euclid.

What clients reveal is summed as it comes: the server holds one client's matrices at a time, and of each
only counts and centroids.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.cluster import KMeans

from fedrouter.config import ClusterSettings, Count
from fedrouter.errors import TrainingError
from fedrouter.train.federation import QUANTILES, Summaries
from fedrouter.train.space import Labels
from fedrouter.types import Float64s, LocalClusters, RoutingSpace, Subset

SHARE = 0.15  # of an average task's scatter that a split between tasks explains
ABOVE = 1.25  # times what the split explains that explains least
NEW_SHARE = 0.5  # of what a task explains, by a split of rows that came later (decision 0019: chosen on one)
FINER = 3  # groups a task cluster while the scatter within them is taken
SHRINKAGE = 0.5  # half whitened: the isotropic part of the covariance within groups
LEVERAGE = 0.1  # of a row's squared distance ÷ all rows, by which its squared radius grows
MAX_JOINED = 1024  # groups that the tree joins one by one; of more, k-means unites the closest first
MAX_FITTED = 8192  # centroids that k-means sees in full; of more, so many drawn at random


def discover(federation: Summaries, settings: ClusterSettings, seed: int) -> RoutingSpace:
    """Find the task clusters of a federation.

    Raises
    ------
    TrainingError
        If more task clusters are asked for than there are groups of rows.
    """
    if settings.method == "kmeans":
        return kmeans_space(federation.summarise(settings.local), settings.global_, seed)
    return routing_space(find_tasks(federation, settings))


def find_tasks(federation: Summaries, settings: ClusterSettings, known: float | None = None) -> LocalClusters:
    """Return the task clusters as groups of rows: counts, centroids, scatter (exchanges 1 and 2).

    Parameters
    ----------
    known : what a task explains (``explained_by_a_task``) in a space that stands; rows have its coordinates.
    """
    groups = _collected(map(_alike, federation.summarise(settings.local)))
    if len(groups.counts) > MAX_JOINED:
        groups = united(groups, _closest(groups))
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
    """Groups of rows joined pair by pair, always the two whose union adds least scatter (Ward 1963).

    Attributes
    ----------
    costs : (m - 1,) what each union added, in the order of the unions.
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
            # Lance and Williams 1967: the union's costs, from those of its parts.
            union = (counts[a] + counts) * cost[a] + (counts[b] + counts) * cost[b] - counts * cost[a, b]
            union /= counts[a] + counts[b] + counts
            union[[a, b]] = np.inf
            counts[a] += counts[b]
            cost[a] = cost[:, a] = union
            cost[b] = cost[:, b] = np.inf

    def num_tasks(self) -> int:
        """Return the number of groups after the last split that is one between tasks."""
        if not self.between:
            return 1
        if self._known is not None:
            few = np.append(self.costs[::-1] / self._weight < NEW_SHARE * self._known, True)
            return int(few.argmax()) + 1
        explained = np.arange(2, self._num + 1) * self.costs[::-1] / self.between  # by the split into 2, 3 …
        most = self._num // 2  # a task cluster has two groups or more
        num = int((explained < max(SHARE, ABOVE * explained[:most].min())).argmax()) + 1
        cliffs = np.flatnonzero(
            (explained[:most] >= 2 * SHARE) & (explained[1:][:most] < explained[:most] / 2)
        )
        return max(num, int(cliffs[-1]) + 2) if len(cliffs) else num

    def cut(self, num: int) -> Labels:
        """Return (m,) numbers of ``num`` groups, in the order of their first member."""
        labels = np.arange(self._num)
        for a, b in self._unions[: self._num - num]:
            labels[labels == b] = a
        return np.asarray(np.unique(labels, return_inverse=True)[1])


def explained_by_a_task(space: RoutingSpace) -> float | None:
    """Return what a task explains on average of a row's scatter, unstretched; None where one stands alone."""
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
    found = KMeans(num, n_init=attempts, random_state=seed).fit(groups.centroids, sample_weight=groups.counts)
    d = groups.centroids.shape[1]
    return _space(np.zeros(d), np.eye(d), found.cluster_centers_)


def pool(clients: Iterable[LocalClusters], num: int) -> LocalClusters:
    """Pool ``num`` groups that every client has; the scatter is about the pooled centroids."""
    groups = _collected(clients)
    return united(groups, np.arange(len(groups.counts)) % num)


def united(groups: LocalClusters, labels: Labels) -> LocalClusters:
    """Unite groups that have the same label; the scatter between them becomes scatter within."""
    num = labels.max() + 1
    counts = np.bincount(labels, weights=groups.counts, minlength=num).astype(np.float64)
    sums = np.zeros((num, groups.centroids.shape[1]))
    np.add.at(sums, labels, groups.counts[:, None] * groups.centroids)
    centroids = sums / np.maximum(counts, 1e-12)[:, None]
    offset = (groups.centroids - centroids[labels]) * np.sqrt(groups.counts)[:, None]
    return LocalClusters(counts, centroids, groups.scatter + offset.T @ offset)


def routing_space(tasks: LocalClusters) -> RoutingSpace:
    """Return the space that prompts are routed in: one centroid a task cluster.

    Directions between task clusters are few among d; stretched by (d / (K-1))^¼ they add as much spread to an
    in-distribution row's squared distance as all others together. A prompt between the task clusters then
    lies far out; which centroid is nearest hardly changes.
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
    """Return W (d, d): (x - mean) @ W has dimensions of unit variance, half whitened within the groups."""
    num, centroids = groups.counts.sum(), groups.centroids - _mean(groups)
    within = groups.scatter / num
    variance = np.diag(within) + groups.counts @ centroids**2 / num
    # A dimension that hardly varies would let rounding decide.
    deviation = np.sqrt(np.maximum(variance, 1e-6 * (_mean(groups) ** 2).mean() + 1e-24))
    values, vectors = np.linalg.eigh(within / np.outer(deviation, deviation))
    isotropic = max(float(values.mean()), 0.01)
    shrunk = (1 - SHRINKAGE) * np.maximum(values, 0) + SHRINKAGE * isotropic
    return np.asarray(vectors / np.sqrt(shrunk) / deviation[:, None])


def radius(subsets: Sequence[Subset], quantile: float, shaped: int | None = None) -> float:
    """Return the distance within which ``quantile`` of a task cluster's prompts will lie.

    Each client's rows are taken to lie evenly between its own quantiles; bisection on the pooled share. Then
    for what the rows made themselves. They made the centroid: a new prompt lies farther from it, by
    √((n + 1) / (n - 1)) for n rows. They shaped the metric, which shrinks the directions that these very rows
    vary in: a row at distance r has a leverage in r² / N of all N rows.

    Parameters
    ----------
    shaped : N, the rows that the metric was made of; None where it was there before them, or is none.
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
    """Return all groups behind each other, with the sum of the scatter matrices."""
    counts, centroids, scatter = [], [], np.zeros((0, 0))
    for c in clients:
        counts.append(c.counts)
        centroids.append(c.centroids)
        scatter = scatter + c.scatter if len(scatter) else c.scatter
    return LocalClusters(np.concatenate(counts), np.concatenate(centroids), scatter)


def _alike(client: LocalClusters) -> LocalClusters:
    """Weigh all clients alike: a task that one small client holds is a task all the same."""
    rows = client.counts.sum()
    return LocalClusters(client.counts / rows, client.centroids, client.scatter / rows)


def _closest(groups: LocalClusters) -> Labels:
    """Return (m,) numbers of at most ``MAX_JOINED`` groups, by k-means."""
    z = groups.centroids @ metric(groups)
    fitted = np.arange(len(z))
    if len(z) > MAX_FITTED:
        fitted = np.random.default_rng(0).choice(len(z), MAX_FITTED, replace=False)
    found = KMeans(MAX_JOINED, n_init=1, random_state=0).fit(z[fitted], sample_weight=groups.counts[fitted])
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
