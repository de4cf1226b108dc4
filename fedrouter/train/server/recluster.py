"""Task clusters over time: every ``cluster.every`` rounds clients are clustered anew, with the rows of then.

1. Clients read their files again, and the exchanges of discover.py are repeated.
2. The server puts the means of the new task clusters into the old space (``overlap``) and matches new
   with old so that as many rows as possible stay where they were (``matched``). A matched task cluster keeps
   its name, adapter and optimizer; the name is the stable id, in metrics and in the bundle.
3. One that is not matched starts from the adapter that most of its rows were trained with if they lie within
   the old radii (a task cluster fell apart), and from the generalist otherwise (a new task).
4. An old one that nothing is matched with ends: no row of it is left, or another has taken them over.

A client whose data has drifted thus moves: its rows belong where they now lie.
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
    """Cluster the clients anew; return task clusters that keep their names, and the state to go on from.

    Where no clustering is found (too few rows, say), the old space stays and only the rows are placed anew.
    """
    try:
        space = discover(federation, config.cluster, config.seed)
        components = pool(federation.regroup(space), len(space.centroids))
        shared = overlap(components, space, old)
        of, start = matched(shared, rows_by_cluster(components, space))
    except TrainingError:
        space, num = old.space, len(old.clusters)
        of = start = list(range(num))
    order = sorted(range(len(of)), key=lambda k: (of[k] is None, of[k] if of[k] is not None else k))
    space = renumbered(space, order)
    of, start = [of[k] for k in order], [start[k] for k in order]

    assignments = list(federation.assign(space))
    kept = [None if o is None else old.clusters[o].name for o in of]
    ended = (*old.ended, *(c.name for c in old.clusters if c.name not in kept))
    whitened = config.cluster.method == "tree"
    clusters = describe(assignments, len(of), config.routing, kept, taken=ended, whitened=whitened)
    general, _ = mean(state.adapters, [c.num_examples for c in old.clusters], config.aggregate.method)
    return Clustering(space, assignments, clusters, ended), RunState(
        number=state.number,
        adapters=tuple(general if s is None else state.adapters[s] for s in start),
        moments=tuple({} if o is None else state.moments[o] for o in of),
        losses=tuple(None if o is None else state.losses[o] for o in of),
        best=(None,) * len(of),  # judged on other rows
    )


def overlap(components: LocalClusters, space: RoutingSpace, old: Clustering) -> Float64s:
    """Return rows within an old task cluster's radius, by old and by new task cluster: (k_old, k_new).

    A component goes as a whole to the nearest old centroid. Its rows lie about its mean, so their mean
    squared distance from there is that of the mean plus their own spread.

    Parameters
    ----------
    components : what clients reveal of their rows by nearest centroid of ``space``.
    """
    means = components.centroids.astype(np.float32)
    centroid, distance = nearest(means, old.space)
    transform = old.space.transform.astype(np.float64)
    spread = np.trace(transform.T @ components.scatter @ transform) / max(components.counts.sum(), 1)
    was = np.asarray(old.space.cluster_of)[centroid]
    radii = np.array([c.radius for c in old.clusters])
    inside = distance**2 + spread <= radii[was] ** 2
    shared = np.zeros((len(old.clusters), space.num_clusters))
    np.add.at(shared, (was, np.asarray(space.cluster_of)), components.counts * inside)
    return shared


def matched(shared: Float64s, rows: Float64s) -> tuple[list[int | None], list[int | None]]:
    """Match new task clusters with old ones.

    Parameters
    ----------
    shared : (k_old, k_new) rows that they share; rows beyond the old radii are in none.
    rows : (k_new,) rows of each new task cluster.

    Returns
    -------
    of : by new task cluster, the old one that it continues; None: it is new.
    start : the old one whose adapter it starts from; None: from the generalist.
    """
    of: list[int | None] = [None] * len(rows)
    inside = shared.sum(0)
    known = (inside > 0) & (2 * inside >= rows)  # most of a new task's rows lie beyond all old task clusters
    for o, k in zip(*linear_sum_assignment(-shared * known), strict=True):
        if known[k] and shared[o, k] > 0:
            of[k] = int(o)
    parents = [int(shared[:, k].argmax()) if known[k] else None for k in range(len(rows))]
    return of, [parents[k] if o is None else o for k, o in enumerate(of)]


def rows_by_cluster(components: LocalClusters, space: RoutingSpace) -> Float64s:
    """Return the rows of each task cluster: (k,)."""
    return np.asarray(np.bincount(np.asarray(space.cluster_of), weights=components.counts), dtype=np.float64)


def changes(old: Clustering, new: Clustering) -> str:
    """Say what clustering anew has changed, for people."""
    before, after = ([c.name for c in clustering.clusters] for clustering in (old, new))
    started = [name for name in after if name not in before]
    ended = [name for name in before if name not in after]
    moved = sorted(
        client
        for client in {a.client for a in new.assignments}
        if _places(old, client) != _places(new, client)
    )
    parts = [("new", started), ("ended", ended), ("moved", moved)]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or "nothing has changed"


def _places(clustering: Clustering, client: str) -> set[str]:
    return {c.name for c in clustering.clusters if client in c.clients}
