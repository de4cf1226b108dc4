"""Local clustering on the clients, global clustering on the server, and the space both meet in.

A client reveals centroids, counts and one pooled scatter matrix; never a row. Distances are measured in units
of the pooled within-cluster covariance (``whiten``), or plainly (``none``, paper section 3).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples

from fedrouter.config import Count
from fedrouter.errors import TrainingError
from fedrouter.types import Array, ClientSummary, LocalCluster, RoutingSpace, Subset

AUTO_LOCAL = 8  # "auto" over-segments; the server merges
MIN_ROWS = 10  # a local cluster of "auto" holds at least so many rows on average
MAX_TASKS = 16  # the most task clusters that "auto" considers
SHRINKAGE = 0.1  # weight of the isotropic part in the pooled covariance
QUANTILES = np.linspace(0, 1, 101)


def summarise(client: str, x: Array, tasks: Sequence[str | None], num: Count, seed: int) -> ClientSummary:
    """Cluster a client's embeddings and return what the client reveals of them.

    Parameters
    ----------
    x : (n, d) float32, the client's embedded prompts.
    tasks : their task labels, for names and scores only.
    num : local clusters; "auto" cuts finer than tasks, the server puts together what belongs together.

    Raises
    ------
    TrainingError
        If more clusters are asked for than there are rows.
    """
    given = max(1, min(AUTO_LOCAL, len(x) // MIN_ROWS)) if num == "auto" else num
    if given > len(x):
        raise TrainingError(
            f"client {client}: {given} local clusters but only {len(x)} rows; lower cluster.local"
        )
    labels = KMeans(given, n_init=4, random_state=seed).fit_predict(x)
    clusters = []
    scatter = np.zeros((x.shape[1], x.shape[1]))
    for j in np.unique(labels):
        rows = np.flatnonzero(labels == j)
        centroid = x[rows].mean(axis=0, dtype=np.float64)
        centred = x[rows] - centroid
        scatter += centred.T @ centred
        clusters.append(LocalCluster(centroid.astype(np.float32), len(rows), count_tasks(tasks, rows)))
    return ClientSummary(client, tuple(clusters), scatter.astype(np.float32))


def discover(
    summaries: Sequence[ClientSummary],
    num: Count,
    transform: Literal["whiten", "none"],
    seed: int,
) -> RoutingSpace:
    """Cluster all clients' centroids, weighted by their counts, into task clusters.

    Raises
    ------
    TrainingError
        If more task clusters are asked for than there are local clusters.
    """
    clusters = [cluster for summary in summaries for cluster in summary.clusters]
    centroids = np.stack([c.centroid for c in clusters]).astype(np.float64)  # (n, d)
    counts = np.array([c.num_examples for c in clusters], dtype=np.float64)  # (n,)
    if num != "auto" and num > len(clusters):
        raise TrainingError(
            f"{num} task clusters but only {len(clusters)} local clusters; "
            "lower cluster.global or raise cluster.local"
        )
    mean = np.average(centroids, axis=0, weights=counts)
    scatter = np.asarray(np.sum([s.scatter for s in summaries], axis=0, dtype=np.float64))
    matrix = whitening(scatter, counts.sum()) if transform == "whiten" else np.eye(centroids.shape[1])
    z = (centroids - mean) @ matrix
    labels = _merge(z, counts, num, seed)
    return RoutingSpace(
        mean=mean.astype(np.float32),
        transform=matrix.astype(np.float32),
        centroids=np.stack(
            [np.average(z[labels == k], axis=0, weights=counts[labels == k]) for k in range(labels.max() + 1)]
        ).astype(np.float32),
        cluster_of=tuple(range(labels.max() + 1)),
    )


def whitening(scatter: np.ndarray, num_rows: float) -> np.ndarray:
    """Return W with W Σ Wᵀ = I for the shrunk pooled covariance Σ of ``scatter / num_rows``: (d, d)."""
    covariance = scatter / num_rows
    isotropic = max(np.trace(covariance) / len(covariance), 1e-12)
    values, vectors = np.linalg.eigh(
        (1 - SHRINKAGE) * covariance + SHRINKAGE * isotropic * np.eye(len(covariance))
    )
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def assign(
    space: RoutingSpace, x: Array, tasks: Sequence[str | None]
) -> tuple[np.ndarray, tuple[Subset, ...]]:
    """Give each row to its nearest centroid's task cluster.

    Returns
    -------
    labels : (n,) the task cluster of each row; stays with the client.
    subsets : what the client reveals: counts and quantiles of distances.
    """
    z = (x - space.mean) @ space.transform
    distances = np.sqrt(np.maximum(((z[:, None, :] - space.centroids[None]) ** 2).sum(axis=2), 0))  # (n, K)
    nearest = distances.argmin(axis=1)
    labels = np.asarray(space.cluster_of)[nearest]
    subsets = []
    for k in np.unique(labels):
        rows = np.flatnonzero(labels == k)
        quantiles = np.quantile(distances[rows].min(axis=1), QUANTILES).astype(np.float32)
        subsets.append(Subset(int(k), len(rows), quantiles, count_tasks(tasks, rows)))
    return labels, tuple(subsets)


def radius(subsets: Sequence[Subset], quantile: float) -> float:
    """Return the distance within which ``quantile`` of a task cluster's training rows lie, over all clients.

    Each client's rows are taken to lie evenly between its own quantiles; bisection on the pooled share.
    """
    total = sum(s.num_examples for s in subsets)
    low, high = 0.0, float(max(s.distances[-1] for s in subsets))
    for _ in range(60):
        middle = (low + high) / 2
        within = sum(s.num_examples * np.interp(middle, s.distances, QUANTILES) for s in subsets) / total
        low, high = (middle, high) if within < quantile else (low, middle)
    return high


def count_tasks(tasks: Sequence[str | None], rows: np.ndarray) -> Mapping[str, int]:
    """Count the task labels among ``rows``."""
    counts: dict[str, int] = {}
    for row in rows:
        if (task := tasks[row]) is not None:
            counts[task] = counts.get(task, 0) + 1
    return dict(sorted(counts.items()))


def _merge(z: np.ndarray, counts: np.ndarray, num: Count, seed: int) -> np.ndarray:
    if len(z) == 1 or num == 1:
        return np.zeros(len(z), dtype=int)
    if num != "auto":
        return np.asarray(KMeans(num, n_init=50, random_state=seed).fit_predict(z, sample_weight=counts))
    tree = linkage(z, method="ward")
    cuts = [fcluster(tree, k, criterion="maxclust") - 1 for k in range(2, min(MAX_TASKS, len(z) - 1) + 1)]
    scores = [np.average(silhouette_samples(z, labels), weights=counts) for labels in cuts]
    return np.asarray(cuts[int(np.argmax(scores))])
