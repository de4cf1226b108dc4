"""What the rounds start from: task clusters that are found, found anew, or that a checkpoint holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from fedrouter.config import Config
from fedrouter.embed import Embedder
from fedrouter.errors import FedRouterError
from fedrouter.train.client.client import Client
from fedrouter.train.client.rows import load_rows
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.client.sources import load_sources
from fedrouter.train.disk.checkpoint import clustering_digest, latest_checkpoint, latest_clustering
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.rounds import Anew
from fedrouter.train.server.describe import describe
from fedrouter.train.server.left_out import LeftOut
from fedrouter.train.server.loop import Federation, RunState
from fedrouter.train.server.methods import group
from fedrouter.train.server.recluster import Clustering, changes, recluster
from fedrouter.types import AdapterState, Record

Told = TypeVar("Told")


def start(
    federation: Federation,
    config: Config,
    fresh: AdapterState,
    records: Mapping[str, Sequence[Record]],
    out: Path,
    anew: Anew,
) -> tuple[Clustering, RunState, str]:
    """Return the task clusters, the state to go on from, and the digest that their checkpoints have.

    A checkpoint counts if it is of the same rows. With ``cluster.every`` its task clusters cannot be found
    again from the first ones: they are taken from it, and found anew if the rows are other ones by now.
    """
    checkpoints = out / "checkpoints"
    if config.cluster.every and (stored := latest_clustering(checkpoints)):
        clustering, state, recorded = stored
        clustering = replace(clustering, assignments=list(federation.assign(clustering.space)))
        digest = clustering_digest(clustering.space, clustering.assignments, records)
        return (clustering, state, digest) if digest == recorded else anew(clustering, state)
    grouping = group(federation, config, fresh)
    num = len(set(grouping.space.cluster_of))
    clusters = describe(grouping.assignments, num, config.routing, grouping.names)
    clustering = Clustering(grouping.space, grouping.assignments, clusters)
    digest = clustering_digest(clustering.space, clustering.assignments, records)
    return clustering, latest_checkpoint(checkpoints, digest) or grouping.state, digest


def rereading(
    config: Config,
    records: dict[str, list[Record]],
    embedder: Embedder,
    federation: LocalFederation,
    trainer: AdapterTrainer,
    left_out: LeftOut,
    console: Console,
) -> Anew:
    """Return what reads clients' files again, updates ``records`` and the federation, and clusters anew."""

    def anew(old: Clustering, state: RunState) -> tuple[Clustering, RunState, str]:
        trainer.take_out()

        def read(name: str) -> list[Record]:
            sources = {name: config.data.clients[name]}
            rows = load_sources(sources, config, config.data.max_per_client)
            load_rows(trainer.tokeniser, rows)
            return rows[name]

        def tried(name: str, what: Callable[[str], Told], before: Told) -> Told:
            try:
                (told,) = each([name], what)
            except FedRouterError as error:  # its file is being written, say
                text = f"client {name} goes on with the rows that it had: {error}"
                console.print(text, highlight=False, soft_wrap=True, markup=False)
                return before
            return told

        rows = {name: tried(name, read, records[name]) for name in federation.clients}

        def admit(name: str) -> Client:
            return Client(name, rows[name], embedder, config.seed, config.privacy)

        for name, client in list(federation.clients.items()):
            if rows[name] != records[name]:
                federation.clients[name] = tried(name, admit, client)
            if federation.clients[name] is not client:
                records[name] = rows[name]
        new, state = left_out.without(federation, lambda: recluster(federation, config, old, state))
        text = f"clustered anew before round {state.number + 1}: {changes(old, new)}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
        return new, state, clustering_digest(new.space, new.assignments, records)

    return anew
