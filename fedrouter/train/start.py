"""The state that the rounds start from: newly found task clusters, or those of a checkpoint."""

from collections.abc import Callable
from dataclasses import replace

from fedrouter.train.disk.checkpoint import clustering_digest, latest_checkpoint, latest_clustering
from fedrouter.train.federation import Federation
from fedrouter.train.server.describe import describe
from fedrouter.train.server.left_out import LeftOut
from fedrouter.train.server.methods import group
from fedrouter.train.server.recluster import changes, recluster
from fedrouter.train.session import Session
from fedrouter.train.state import Clustering, RunState, Start

Reclusterer = Callable[[Clustering, RunState], Start]


def start(session: Session, federation: Federation, reclusterer: Reclusterer) -> Start:
    """Return the task clusters and the run state that the rounds start from.

    A checkpoint is used only if it belongs to the same rows. With ``cluster.every``, discovery would not find
    a checkpoint's task clusters again, so they are read from it; if the rows have changed since, the clients
    are clustered again.
    """
    config, checkpoints = session.config, session.out / "checkpoints"
    members = federation.members()
    if config.cluster.every and (stored := latest_clustering(checkpoints)):
        space = stored.clustering.space
        clustering = replace(stored.clustering, assignments=list(federation.assign(space)))
        digest = clustering_digest(space, clustering.assignments, members)
        if digest == stored.digest:
            return replace(stored, clustering=clustering)
        return reclusterer(clustering, stored.state)
    grouping = group(federation, config, session.trainer.state(), session.embedder.spec.dim)
    num = grouping.space.num_clusters
    whitened = config.cluster.method == "tree"
    clusters = describe(grouping.assignments, num, config.routing, grouping.names, whitened=whitened)
    clustering = Clustering(grouping.space, grouping.assignments, clusters)
    digest = clustering_digest(clustering.space, clustering.assignments, members)
    return Start(clustering, latest_checkpoint(checkpoints, digest) or grouping.state, digest)


def cluster_anew(session: Session, federation: Federation, left_out: LeftOut) -> Reclusterer:
    """Return a function that has the clients read their rows again and then clusters them again."""

    def reclusterer(old: Clustering, state: RunState) -> Start:
        for reply in federation.reread():
            if reply.problem:
                session.say(f"client {reply.client} keeps the rows that it had: {reply.problem}")
        new, state = left_out.without(federation, lambda: recluster(federation, session.config, old, state))
        session.say(f"clustered anew before round {state.number + 1}: {changes(old, new)}")
        return Start(new, state, clustering_digest(new.space, new.assignments, federation.members()))

    return reclusterer
