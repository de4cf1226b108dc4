"""Cluster the clients again every ``cluster.every`` rounds, with their current rows.

1. Clients read their files again, and the exchanges of discover.py are repeated.
2. The server projects the means of the new task clusters into the old space (``overlap``) and matches new
   with old task clusters so that as many rows as possible stay where they were (``matched``). A matched task
   cluster keeps its name, adapter and optimizer state. The name is the stable id in metrics and bundle.
3. An unmatched new task cluster starts from the adapter that most of its rows were trained with, if they lie
   within the old radii (an old task cluster was split), and otherwise from the generalist (a new task).
4. An unmatched old task cluster ends: its rows are gone or now belong to other task clusters.

A client whose data has drifted thus moves to the task clusters in which its rows now lie.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from fedrouter.config import Config
from fedrouter.errors import TrainingError
from fedrouter.train.federation import Federation
from fedrouter.train.server.aggregate import mean
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import discover, pool
from fedrouter.train.space import nearest, renumbered
from fedrouter.train.state import Clustering, RunState
from fedrouter.types import Float64s, LocalClusters, RoutingSpace


def recluster(
    federation: Federation, config: Config, old: Clustering, state: RunState
) -> tuple[Clustering, RunState]:
    """Cluster the clients again; return the new clustering, with names kept, and the state to continue from.

    If discovery fails (for example, with too few rows), keep the old space and only assign the rows again.
    """
    try:
        space = discover(federation, config.cluster, config.seed)
        components = pool(federation.regroup(space), len(space.centroids))
        shared = overlap(components, space, old)
        continued, start = matched(shared, rows_by_cluster(components, space))
    except TrainingError:
        space, num = old.space, len(old.clusters)
        continued = start = list(range(num))
    order = sorted(
        range(len(continued)),
        key=lambda k: (continued[k] is None, continued[k] if continued[k] is not None else k),
    )
    space = renumbered(space, order)
    continued, start = [continued[k] for k in order], [start[k] for k in order]

    assignments = list(federation.assign(space))
    kept = [None if o is None else old.clusters[o].name for o in continued]
    ended = (*old.ended, *(c.name for c in old.clusters if c.name not in kept))
    whitened = config.cluster.method == "tree"
    clusters = describe(assignments, len(continued), config.routing, kept, taken=ended, whitened=whitened)
    general, _ = mean(state.adapters, [c.num_examples for c in old.clusters], config.aggregate.method)
    return Clustering(space, assignments, clusters, ended), RunState(
        number=state.number,
        adapters=tuple(general if s is None else state.adapters[s] for s in start),
        moments=tuple({} if o is None else state.moments[o] for o in continued),
        losses=tuple(None if o is None else state.losses[o] for o in continued),
        best=(None,) * len(continued),  # earlier validation losses were on other rows
    )


def overlap(components: LocalClusters, space: RoutingSpace, old: Clustering) -> Float64s:
    """Count rows within old radii, by old and new task cluster: (k_old, k_new).

    Each component counts as a whole for the old centroid nearest to its mean. The mean squared distance of
    its rows to that centroid is the squared distance of the mean plus the rows' spread around the mean.

    Parameters
    ----------
    components : the clients' rows grouped by nearest centroid of ``space``.
    """
    means = components.centroids.astype(np.float32)
    centroid, distance = nearest(means, old.space)
    transform = old.space.transform.astype(np.float64)
    spread = np.trace(transform.T @ components.scatter @ transform) / max(components.counts.sum(), 1)
    old_cluster = np.asarray(old.space.cluster_of)[centroid]
    radii = np.array([c.radius for c in old.clusters])
    inside = distance**2 + spread <= radii[old_cluster] ** 2
    shared = np.zeros((len(old.clusters), space.num_clusters))
    np.add.at(shared, (old_cluster, np.asarray(space.cluster_of)), components.counts * inside)
    return shared


def matched(shared: Float64s, rows: Float64s) -> tuple[list[int | None], list[int | None]]:
    """Match new task clusters with old ones.

    Parameters
    ----------
    shared : (k_old, k_new) numbers of rows that an old and a new task cluster share; rows beyond the old
        radii are not counted.
    rows : (k_new,) numbers of rows of the new task clusters.

    Returns
    -------
    continued : for each new task cluster, the old one that it continues, or None.
    start : for each new task cluster, the old one whose adapter it starts from; None: the generalist.
    """
    continued: list[int | None] = [None] * len(rows)
    inside = shared.sum(0)
    known = (inside > 0) & (2 * inside >= rows)  # a new task has most rows beyond all old task clusters
    for o, k in zip(*linear_sum_assignment(-shared * known), strict=True):
        if known[k] and shared[o, k] > 0:
            continued[k] = int(o)
    parents = [int(shared[:, k].argmax()) if known[k] else None for k in range(len(rows))]
    return continued, [parents[k] if o is None else o for k, o in enumerate(continued)]


def rows_by_cluster(components: LocalClusters, space: RoutingSpace) -> Float64s:
    """Return the number of rows of each task cluster: (k,)."""
    return np.asarray(np.bincount(np.asarray(space.cluster_of), weights=components.counts), dtype=np.float64)


def changes(old: Clustering, new: Clustering) -> str:
    """Describe the changes from ``old`` to ``new``: new and ended task clusters, and moved clients."""
    before, after = ([c.name for c in clustering.clusters] for clustering in (old, new))
    started = [name for name in after if name not in before]
    ended = [name for name in before if name not in after]
    moved = sorted(
        client
        for client in {a.client for a in new.assignments}
        if _cluster_names(old, client) != _cluster_names(new, client)
    )
    parts = [("new", started), ("ended", ended), ("moved", moved)]
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in parts if names) or "nothing has changed"


def _cluster_names(clustering: Clustering, client: str) -> set[str]:
    return {c.name for c in clustering.clusters if client in c.clients}
