"""What the server computes: from what clients reveal to the space in which prompts are routed.

The exchanges, in order; no row leaves its client in any of them:

1. Each client sets a third of its rows aside (many small clients: all or none, ``cluster.crowd``), cuts the
   rest into many small local clusters by prompts and completions, unites those that are too small to be told
   of, and reveals centroids, counts and one pooled scatter matrix (``cluster.summarise``): of prompts, each
   beside its completion in brief (``cluster.beside``).
2. The server joins local clusters, always the two whose union raises log det of the pooled within-cluster
   covariance least, until ``NUM_COMPONENTS`` are left (``condense``). The criterion does not depend on the
   embedder's scale or axes: large dimensions do not dominate.
3. Each client gives its rows to the nearest component, in units of that covariance, and reveals what came
   together (``cluster.regroup``); the server pools (``pool``). It mends what k-means mixed.
4. Each client reveals moments of the prompts set aside, within the few dimensions that the components span,
   and the sum of each component's embedded completions (``cluster.moments``). The server joins components
   until every two task clusters differ by ``SEPARATION`` in prompts and completions (``separate``): that is
   their number. Prompts are judged on rows that nothing was fitted to.
5. The routing space knows prompts only: whitened by their covariance within task clusters, the directions
   between these stretched so that abstention sees them, all components kept as centroids of their task
   cluster (``routing_space``).
6. Each client reveals quantiles of its set-aside rows' distances (``cluster.assign``); their pooled quantile
   is a task cluster's ``radius``.

The paper's way (section 3) is ``kmeans``: k-means on each client, k-means over the centroids, plain Euclid.

What clients reveal is summed as it comes: the server holds one client's matrices at a time, and of each
only counts and centroids.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.cluster import KMeans

from fedrouter.config import ClusterSettings, Count
from fedrouter.errors import TrainingError
from fedrouter.train.cluster import BRIEF, QUANTILES, Labels
from fedrouter.train.server import Federation
from fedrouter.types import Float64s, LocalClusters, Moments, RoutingSpace, Subset

MAX_JOINED = 512  # local clusters that the server joins one by one
MAX_FITTED = 8192  # centroids that k-means sees in full; of more, so many drawn at random, or fewer attempts
NUM_COMPONENTS = 32  # what local clusters are condensed to before tasks are looked for
MIN_COMPONENT = 5  # rows; a smaller component is dropped, its rows go to the next nearest
SHRINKAGE = 0.1  # weight of the isotropic part in the pooled covariance
PASSES = 1  # of regrouping; each sends a scatter matrix
SEPARATION = 5.5  # between two task clusters, as ``separate`` measures it
MAX_SEPARATION = 14.0  # standard deviations; prompts farther apart are no more different
POWER = 6  # of the chord between ways from prompt to completion
MIN_UNJUDGED = 30  # rows; a smaller group without a set-aside row is no task cluster
PRIOR_MEAN = 2.0  # pseudo-rows at a component's own centroid: it may have no row set aside
PRIOR_ROWS = 5.0  # pseudo-rows that pull a component's variance to the pooled one
PRIOR_SHARE = 10.0  # pseudo-rows that damp the shares of very small clients
RIDGE = 0.05  # isotropic part of the covariance within the components' span


def discover(federation: Federation, settings: ClusterSettings, seed: int) -> RoutingSpace:
    """Find the task clusters of a federation.

    Raises
    ------
    TrainingError
        If more task clusters are asked for than can be told apart.
    """
    if settings.method == "kmeans":
        return kmeans_space(federation.summarise(settings.local), settings.global_, seed)
    return routing_space(*find_components(federation, settings))


def find_components(federation: Federation, settings: ClusterSettings) -> tuple[LocalClusters, Labels]:
    """Return the components' prompts, and the task cluster of each: exchanges 1 to 4."""
    clients = federation.summarise(settings.local, completions=True)
    components = condense(clients, max(NUM_COMPONENTS, 0 if settings.global_ == "auto" else settings.global_))
    for _ in range(PASSES):
        components, support = pool(federation.regroup(component_space(components)))
    prompts = prompts_of(components)
    space = component_space(prompts)
    basis = span(space)
    directions = np.concatenate([space.transform @ basis, np.zeros((BRIEF, basis.shape[1]))])
    told = federation.moments(component_space(components), directions)
    return prompts, separate(told, prompts, basis, support, settings.global_)


def kmeans_space(clients: Iterable[LocalClusters], num: Count, seed: int) -> RoutingSpace:
    """Cluster all centroids by k-means, weighted by counts; distances are Euclidean (paper section 3)."""
    counts, centroids, _ = _collected(clients)
    assert num != "auto", "the configuration refuses this"
    if num > len(counts):
        raise TrainingError(
            f"{num} task clusters but only {len(counts)} local clusters; "
            "lower cluster.global or raise cluster.local"
        )
    attempts = 50 if len(counts) <= MAX_FITTED else 10
    found = KMeans(num, n_init=attempts, random_state=seed).fit(centroids, sample_weight=counts)
    d = centroids.shape[1]
    return _space(np.zeros(d), np.eye(d), found.cluster_centers_, np.arange(num))


def condense(clients: Iterable[LocalClusters], num: int) -> LocalClusters:
    """Join all clients' local clusters into ``num`` components.

    Always the pair whose union raises log det of the pooled within-cluster covariance least (Friedman and
    Rubin 1967), kept up to date by rank-one updates of its inverse: O(m² + m d + d²) a union.
    """
    counts, centroids, scatter = _collected(clients)
    total = counts.sum()
    if len(counts) > MAX_JOINED:  # joining is quadratic: what lies closest goes together first
        counts, centroids, scatter = _prejoin(counts, centroids, scatter)
    inverse = np.linalg.inv(_shrink(scatter / max(total - len(counts), 1))).astype(np.float64)
    squared = _squared_distances(centroids, inverse)
    alive = np.ones(len(counts), bool)
    for _ in range(len(counts) - num):
        cost = squared * counts[:, None] * counts / np.maximum(counts[:, None] + counts, 1)
        cost[~alive] = cost[:, ~alive] = np.inf
        np.fill_diagonal(cost, np.inf)
        a, b = np.unravel_index(cost.argmin(), cost.shape)
        difference = centroids[a] - centroids[b]
        weight = counts[a] * counts[b] / (counts[a] + counts[b])
        scatter = scatter + weight * np.outer(difference, difference)
        # Sherman and Morrison: the union adds one rank to the covariance.
        step = inverse @ difference
        gain = (1 - SHRINKAGE) * weight / total
        gain /= 1 + gain * (difference @ step)
        inverse -= gain * np.outer(step, step)
        along = centroids @ step
        squared -= gain * (along[:, None] - along) ** 2
        centroids[a] = (counts[a] * centroids[a] + counts[b] * centroids[b]) / (counts[a] + counts[b])
        counts[a] += counts[b]
        alive[b] = False
        from_a = centroids - centroids[a]
        squared[a] = squared[:, a] = np.einsum("md,md->m", from_a @ inverse, from_a)
    return LocalClusters(counts[alive], centroids[alive], scatter)


def pool(clients: Iterable[LocalClusters], least: int = MIN_COMPONENT) -> tuple[LocalClusters, Float64s]:
    """Pool the clients' components; drop those with fewer than ``least`` rows.

    Returns
    -------
    components : over all clients, scatter about the pooled centroids.
    support : (clients, m) rows of each client in each component.
    """
    revealed, sums, scatter = [], _Sum(), _Sum()
    for c in clients:
        sums.add(c.counts[:, None] * c.centroids)
        scatter.add(c.scatter)
        held = np.flatnonzero(c.counts)
        revealed.append((c.counts, held, c.centroids[held]))
    support = np.stack([own for own, _, _ in revealed])
    counts = support.sum(0)
    centroids = sums.value / np.maximum(counts, 1)[:, None]
    for own, held, means in revealed:
        offset = (means - centroids[held]) * np.sqrt(own[held])[:, None]
        scatter.add(offset.T @ offset)
    kept = counts >= min(least, counts.max())
    return LocalClusters(counts[kept], centroids[kept], scatter.value), support[:, kept]


def prompts_of(components: LocalClusters) -> LocalClusters:
    """Leave the completions' part out."""
    scatter = components.scatter[:-BRIEF, :-BRIEF]
    return LocalClusters(components.counts, components.centroids[:, :-BRIEF], scatter)


def component_space(components: LocalClusters) -> RoutingSpace:
    """Whiten by the covariance within components; every component is its own cluster."""
    mean = np.average(components.centroids, axis=0, weights=components.counts)
    dof = max(components.counts.sum() - len(components.counts), 1)
    transform = whitening(components.scatter / dof)
    return _space(
        mean, transform, (components.centroids - mean) @ transform, np.arange(len(components.counts))
    )


def span(space: RoutingSpace) -> Float64s:
    """Return an orthonormal basis (m, r) of the space that the centroids span."""
    centroids = space.centroids.astype(np.float64)
    _, values, vectors = np.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    return np.asarray(vectors[: max(1, int((values > 1e-4 * max(values[0], 1e-12)).sum()))].T)


def separate(
    clients: Iterable[Moments],
    components: LocalClusters,
    basis: Float64s,
    support: Float64s,
    num: Count = "auto",
) -> Labels:
    """Join each component with its nearest, the closest two first; return (m,) the task cluster of each.

    Two components are as far apart as their prompts (``_separations``, at most ``MAX_SEPARATION``) times a
    ``POWER`` of the chord between the ways from mean prompt to mean completion (``_chords``): a task is where
    prompts look different and, above all, the answers go another way. A topic inside a task moves both ends
    alike; answers that prompts do not foretell, Yes and No, come from the same prompts. "auto" stops when all
    stand ``SEPARATION`` apart times 2√(p(1-p)), where p : 1-p are the shares that the two hold of the client
    which is richest in them. So a topic inside a task, far but small, is not taken for a task, while a task
    that few clients hold counts in full. A group of a few rows, none of them set aside, or one whose
    completions nobody told, cannot be judged: it joins the nearest, by prompts alone if need be.
    """
    space = component_space(components)
    totals = [_Sum() for _ in range(5)]
    for m in clients:
        for total, part in zip(totals, (m.counts, m.sums, m.squares, m.answers, m.num_rows), strict=True):
            total.add(part)
    n, s, q, answers, rows = (total.value for total in totals)
    centres = space.centroids @ basis
    n, s = PRIOR_MEAN + n, PRIOR_MEAN * centres + s
    q = PRIOR_MEAN * centres[:, :, None] * centres[:, None, :] + q
    unit = _deviations(components)  # no few dimensions decide alone
    ways = (answers - rows[:, None] * components.centroids) / unit  # sums over rows
    held = support.sum(1, keepdims=True)
    groups = [[i] for i in range(len(n))]
    if num != "auto" and num > len(groups):
        raise TrainingError(
            f"{num} task clusters but only {len(groups)} groups of rows; lower cluster.global"
        )
    while len(groups) > (1 if num == "auto" else num):
        share = (support / (held + PRIOR_SHARE)).max(0)
        separations = _separations(n, s, q)
        apart = np.minimum(separations, MAX_SEPARATION) * _chords(ways) ** POWER
        pseudo = PRIOR_MEAN * np.array([len(group) for group in groups])
        unjudged = (n == pseudo) & (support.sum(0) < MIN_UNJUDGED) | (rows == 0)
        apart[rows == 0] = separations[rows == 0]
        np.fill_diagonal(apart, np.inf)
        # Balance says only whether two join, never which two come first.
        closest = apart.argmin(1)
        p = share / np.maximum(share + share[closest], 1e-12)
        balanced = apart[np.arange(len(p)), closest] * 2 * np.sqrt(p * (1 - p))
        balanced[unjudged] = 0
        if num == "auto" and balanced.min() >= SEPARATION:
            break
        joins = balanced < SEPARATION if balanced.min() < SEPARATION else balanced <= balanced.min()
        a = int(np.where(joins, apart.min(1), np.inf).argmin())
        i, j = sorted((a, int(closest[a])))
        for array in (n, s, q, ways, rows):
            array[i] += array[j]
        n, s, q, ways, rows = (np.delete(array, j, 0) for array in (n, s, q, ways, rows))
        support[:, i] += support[:, j]
        support = np.delete(support, j, 1)
        groups[i] += groups.pop(j)
    labels = np.empty(sum(map(len, groups)), dtype=np.int64)
    for k, group in enumerate(groups):
        labels[group] = k
    return labels


def routing_space(components: LocalClusters, labels: Labels) -> RoutingSpace:
    """Return the space that prompts are routed in: every component a centroid of its task cluster.

    Directions between task clusters are few among d; stretched by (d / (K-1))^¼ they add as much spread to an
    in-distribution row's squared distance as all others together. A prompt between the task clusters then
    lies far out; which centroid is nearest hardly changes.
    """
    counts, centroids = components.counts, components.centroids
    num = labels.max() + 1
    means = np.stack(
        [np.average(centroids[labels == k], axis=0, weights=counts[labels == k]) for k in range(num)]
    )
    offset = (centroids - means[labels]) * np.sqrt(counts)[:, None]
    mean = np.average(centroids, axis=0, weights=counts)
    dof = max(counts.sum() - num, 1)
    transform = whitening((components.scatter + offset.T @ offset) / dof)
    if num > 1:
        z = (means - mean) @ transform
        between = np.linalg.svd(z - z.mean(0), full_matrices=False)[2][: num - 1].T  # (d, K-1)
        stretch = (transform.shape[1] / between.shape[1]) ** 0.25
        transform = transform + (stretch - 1) * transform @ between @ between.T
    return _space(mean, transform, (centroids - mean) @ transform, labels)


def whitening(covariance: Float64s) -> Float64s:
    """Return W with Wᵀ Σ W = I for the shrunk covariance Σ: (d, d)."""
    values, vectors = np.linalg.eigh(_shrink(covariance))
    return np.asarray(vectors / np.sqrt(values))


def radius(subsets: Sequence[Subset], quantile: float) -> float:
    """Return the distance within which ``quantile`` of a task cluster's set-aside rows lie, over all clients.

    Each client's rows are taken to lie evenly between its own quantiles; bisection on the pooled share.
    """
    weights = (
        [s.num_set_aside for s in subsets] if any(s.num_set_aside for s in subsets) else [1] * len(subsets)
    )
    low, high = 0.0, float(max(s.distances[-1] for s in subsets))
    for _ in range(60):
        middle = (low + high) / 2
        within = np.average([np.interp(middle, s.distances, QUANTILES) for s in subsets], weights=weights)
        low, high = (middle, high) if within < quantile else (low, middle)
    return high


class _Sum:
    """A running sum of arrays, in the order in which they come."""

    value: Float64s

    def add(self, part: Float64s) -> None:
        """Add one client's; the first is copied, the others go into it in place."""
        if hasattr(self, "value"):
            self.value += part
        else:
            self.value = part.astype(np.float64)


def _collected(clients: Iterable[LocalClusters]) -> tuple[Float64s, Float64s, Float64s]:
    """Return all counts, all centroids and the sum of the scatter matrices."""
    counts, centroids, scatter = [], [], _Sum()
    for c in clients:
        counts.append(c.counts)
        centroids.append(c.centroids)
        scatter.add(c.scatter)
    return np.concatenate(counts), np.concatenate(centroids), scatter.value


def _space(mean: Float64s, transform: Float64s, centroids: Float64s, cluster_of: Labels) -> RoutingSpace:
    return RoutingSpace(
        mean=mean.astype(np.float32),
        transform=transform.astype(np.float32),
        centroids=centroids.astype(np.float32),
        cluster_of=tuple(int(k) for k in cluster_of),
    )


def _shrink(covariance: Float64s) -> Float64s:
    d = len(covariance)
    isotropic = max(float(np.trace(covariance)) / d, 1e-12)
    return np.asarray((1 - SHRINKAGE) * covariance + SHRINKAGE * isotropic * np.eye(d))


def _prejoin(counts: Float64s, centroids: Float64s, scatter: Float64s) -> tuple[Float64s, Float64s, Float64s]:
    z = centroids @ whitening(scatter / max(counts.sum() - len(counts), 1))
    fitted = np.arange(len(z))
    if len(z) > MAX_FITTED:
        fitted = np.random.default_rng(0).choice(len(z), MAX_FITTED, replace=False)
    found = KMeans(MAX_JOINED, n_init=1, random_state=0).fit(z[fitted], sample_weight=counts[fitted])
    labels = found.predict(z)
    _, labels = np.unique(labels, return_inverse=True)
    pooled = np.zeros((labels.max() + 1, centroids.shape[1]))
    np.add.at(pooled, labels, centroids * counts[:, None])
    joined = np.bincount(labels, weights=counts).astype(np.float64)
    pooled /= joined[:, None]
    offset = (centroids - pooled[labels]) * np.sqrt(counts)[:, None]
    return joined, pooled, np.asarray(scatter + offset.T @ offset)


def _squared_distances(x: Float64s, metric: Float64s) -> Float64s:
    gram = x @ metric @ x.T
    return np.asarray(np.diag(gram)[:, None] + np.diag(gram) - 2 * gram)


def _deviations(components: LocalClusters) -> Float64s:
    """(d,) standard deviations of all prompts, from what was pooled."""
    mean = np.average(components.centroids, axis=0, weights=components.counts)
    between = components.counts @ (components.centroids - mean) ** 2
    variance = (np.diag(components.scatter) + between) / components.counts.sum()
    return np.asarray(np.sqrt(np.maximum(variance, 1e-24)))


def _separations(n: Float64s, s: Float64s, q: Float64s) -> Float64s:
    """(m, m) distances of means along Fisher's direction, in units of the two's mean standard deviation."""
    mean = s / np.maximum(n, 1)[:, None]
    covariance = q / np.maximum(n, 1)[:, None, None] - mean[:, :, None] * mean[:, None, :]
    covariance *= (n / np.maximum(n - 1, 1))[:, None, None]
    pooled = np.tensordot(n, covariance, 1) / max(n.sum(), 1)
    isotropic = max(float(np.trace(pooled)) / len(pooled), 1e-12)
    pooled = (1 - RIDGE) * pooled + RIDGE * isotropic * np.eye(len(pooled))
    difference = mean[:, None] - mean  # (m, m, r)
    direction = difference @ np.linalg.inv(pooled)
    gap = (direction * difference).sum(-1)  # also the pooled variance along the direction
    own = (direction @ covariance * direction).sum(-1)  # of the first of the two
    own = (n[:, None] * own + PRIOR_ROWS * gap) / (n[:, None] + PRIOR_ROWS)
    deviation = np.sqrt(np.maximum(own, 0))
    return np.asarray(2 * gap / np.maximum(deviation + deviation.T, 1e-12))


def _chords(x: Float64s) -> Float64s:
    """(m, m) how different the directions of rows of ``x`` are: lengths of chords, 0 … 2."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return np.asarray(np.sqrt(np.maximum(2 - 2 * unit @ unit.T, 0)))
