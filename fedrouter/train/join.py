"""Add new or changed clients to a finished run: write a new run in which only new task clusters are trained.

1. Each joining client embeds its rows and compares them with the bundle's task clusters, in the bundle's
   routing space, which stays unchanged. If rows lie within a task cluster's radius, the client is listed
   there and nothing is trained. A moved client is removed from task clusters in which it has no rows now.
2. Task discovery (discover.py) runs on the joining clients' rows beyond every radius. A new task cluster
   needs ``MIN_TASK_ROWS`` rows, and more than the radii's quantile leaves outside by chance.
3. The mean of a new task cluster becomes a centroid in the same space and its rows give its radius. Its
   adapter starts from the generalist and is trained for the configured rounds by the clients with such rows.
4. The old bundle stays in place. The new bundle belongs to the new run; old adapters keep their exact bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedrouter.bundle import (
    CONFIG,
    PROBES,
    Bundle,
    check_base,
    check_embedder,
    load_bundle,
    read_weights,
    write_bundle,
)
from fedrouter.config import ClusterSettings, Config
from fedrouter.config_file import read_resolved
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.files import check_directory, read_json
from fedrouter.layout import number_of, print_line
from fedrouter.models import resolve_base
from fedrouter.train.check import check_settings, tokenised
from fedrouter.train.client.sources import load_sources
from fedrouter.train.disk.checkpoint import clustering_digest, latest_checkpoint
from fedrouter.train.federation import Beyond, Federation
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.train.rounds import train_rounds
from fedrouter.train.run import with_loss
from fedrouter.train.server.aggregate import mean
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import explained_by_a_task, find_tasks
from fedrouter.train.session import Session, versions
from fedrouter.train.space import narrowed, widened
from fedrouter.train.state import Clustering, Start, fresh_state
from fedrouter.types import AdapterState, Assignment, RoutingSpace, TaskCluster

MIN_TASK_ROWS = 30  # over all joining clients; with fewer, the radius is a guess
CHANCE = 3.0  # standard deviations above the number of rows expected beyond the radii


@dataclass(frozen=True, slots=True)
class Joiners:
    """The joining clients: name → source."""

    late: Mapping[str, str]  # clients new to the run
    moved: Mapping[str, str]  # clients of the run whose data has changed

    @property
    def sources(self) -> dict[str, str]:
        """The sources of late and moved clients."""
        return {**self.late, **self.moved}

    def entry(self, run: Path) -> dict[str, Any]:
        """Return the entry for ``joined.json``."""
        moved = {"moved": dict(self.moved)} if self.moved else {}
        return {"run": str(run.resolve()), "clients": dict(self.late), **moved}


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the joiners' rows belong."""

    space: RoutingSpace  # the bundle's, with the centroids of new task clusters appended
    assignments: list[Assignment]  # over old and new task clusters
    members: Mapping[int, Sequence[str]]  # task cluster → joiners with rows within its radius


def default_out(run: Path, sources: Mapping[str, str], moved: Mapping[str, str]) -> Path:
    """Return the directory of the new run: beside ``run``, named after it and the clients."""
    return run.with_name("-".join([run.name, *sources, *moved]).replace("/", "-"))


@explained_out_of_memory()
def join(
    run: Path,
    sources: Mapping[str, str],
    moved: Mapping[str, str],
    out: Path | None,
    console: Console,
    processes: int = 1,
) -> Bundle:
    """Add clients to the finished ``run``; write a new run whose bundle includes them, and return the bundle.

    A client that fails ends the join. The others lose nothing: run the same command without that client.

    Parameters
    ----------
    sources : client name → file or data set.
    moved : the same for clients of ``run`` whose data has changed; they leave the task clusters in which they
        no longer have rows.
    out : directory of the new run; by default ``default_out``. The same command resumes an interrupted join.
    processes : number of adapters trained at a time.

    Raises
    ------
    ConfigError, TrainingError, DataError, BundleError, ClientError
        If ``run`` is not a finished run of method fedrouter, a name is taken, or a client has too few rows.
    """
    config = _finished(run)
    out = out or default_out(run, sources, moved)
    if both := sources.keys() & moved.keys():
        raise ConfigError(f"client {min(both)}: given with both --client and --moved; choose one")
    joiners = Joiners(*({n: _absolute(s) for n, s in sorted(given.items())} for given in (sources, moved)))
    joins = [*_joins(run), joiners.entry(run)]
    check_directory(out, "--out")
    in_use = out.exists() and any(path.name != "embeddings" for path in out.iterdir())
    if in_use and (not (out / "joined.json").exists() or _joins(out) != joins):
        raise TrainingError(f"{out} is not empty and holds no such join; choose another --out")
    if (out / "bundle").exists():
        names = ", ".join(joiners.sources)
        print_line(console, f"{names}: joined already in {out}")
        return load_bundle(out / "bundle")

    bundle = load_bundle(run / "bundle")
    _check_names(config, run, bundle, joiners)
    records = load_sources(joiners.sources, config)
    path = resolve_base(bundle.base.model, bundle.base.revision)
    check_base(bundle, path)
    check_settings(config)
    if bundle.chat_template:  # the adapters were trained with it; the base's may have changed since
        base_settings = config.base.model_copy(update={"chat_template": str(bundle.chat_template)})
        config = config.model_copy(update={"base": base_settings})
    session = Session(config, out, console, processes)
    session.load(tokenised(config, path, records, session.say), bundle.embedder)
    check_embedder(bundle, session.embedder)
    with session.unclaimed():
        clients = list(each(records, lambda name: session.client(name, records[name])))
        session.load_trainer([row for rows in records.values() for row in rows])
        federation = LocalFederation(clients, session.trainer, session.workers)
        found = placed(bundle, federation, config.routing.quantile)
    session.claim(
        {
            "joined.json": json.dumps(joins, indent=2) + "\n",
            "config.json": (run / "config.json").read_text(encoding="utf-8"),
        }
    )
    return _grown(session, federation, bundle, found, joiners)


def _grown(
    session: Session, federation: Federation, bundle: Bundle, found: Placed, joiners: Joiners
) -> Bundle:
    """Train the new task clusters, if any, and write the bundle with the joining clients."""
    config, first = session.config, len(bundle.clusters)
    clusters = [_with_members(c, found.members.get(k, ()), joiners) for k, c in enumerate(bundle.clusters)]
    added = describe(found.assignments, found.space.num_clusters, config.routing, standing=bundle.clusters)
    for before, now in zip(bundle.clusters, clusters, strict=True):
        _say_changes(session, before, now, joiners)
    for c in added:
        session.say(
            f"new task cluster {c.name}: {number_of(c.num_examples, 'row')} of {', '.join(c.clients)}"
        )

    adapters: list[AdapterState] = [read_weights(bundle.adapter_path(c)) for c in bundle.clusters]
    sizes = [c.num_examples for c in [*clusters, *added]]
    general = (
        read_weights(bundle.adapter_paths[bundle.generalist])
        if bundle.generalist
        else mean(adapters, sizes[:first], config.aggregate.method)[0]
    )
    if added:
        digest = clustering_digest(found.space, found.assignments, federation.members())
        state = latest_checkpoint(session.out / "checkpoints", digest)
        state = state or fresh_state([*adapters, *[general] * len(added)])
        fresh = [_only(a, range(first, first + len(added))) for a in found.assignments]
        clustering = Clustering(found.space, [a for a in fresh if a.subsets], [*clusters, *added])
        state = train_rounds(session, federation, Start(clustering, state, digest)).state
        adapters += state.best_adapters[first:]
        added = [with_loss(c, loss) for c, loss in zip(added, state.losses[first:], strict=True)]
        general, _ = mean(adapters, sizes, config.aggregate.method)
    return write_bundle(
        session.out / "bundle",
        base=bundle.base,
        embedder=bundle.embedder,
        clusters=[*clusters, *added],
        adapters=adapters,
        adapter_config=_adapter_config(bundle),
        space=found.space,
        probe_vectors=bundle.probe,
        fallback=bundle.fallback,
        versions=versions(),
        chat_template=session.chat_template,
        generalist=general,
        probes=(bundle.path / PROBES).read_bytes() if bundle.probes else None,
    )


def placed(bundle: Bundle, federation: Federation, quantile: float) -> Placed:
    """Assign the clients' rows to a bundle's task clusters, and rows beyond their radii to new ones.

    Raises
    ------
    TrainingError
        If most rows of a client belong to no task cluster.
    """
    first = len(bundle.clusters)
    comparisons = {c.client: c for c in federation.compare(bundle.space, [k.radius for k in bundle.clusters])}
    num_outside = sum(c.num_beyond for c in comparisons.values())
    num = num_outside + sum(sum(c.within.values()) for c in comparisons.values())
    chance = num * (1 - quantile) + CHANCE * math.sqrt(num * quantile * (1 - quantile))
    least = max(MIN_TASK_ROWS, math.floor(chance) + 1)
    space = bundle.space
    assignments = list(federation.assign(space))
    settings = ClusterSettings()
    # With few rows discovery finds too many tasks: reduce their number until each has enough rows.
    while num_outside >= least and any(c.may_summarise for c in comparisons.values()):
        tasks = find_tasks(Beyond(federation), settings, explained_by_a_task(bundle.space))
        space = widened(bundle.space, tasks.centroids.astype(np.float32))
        assignments = list(federation.assign(space))
        rows = _rows(assignments)
        num_new = len(tasks.centroids)
        if num_new == 1 or all(rows.get(first + k, 0) >= least for k in range(num_new)):
            break
        settings = ClusterSettings.model_validate({"global": num_new - 1})
    kept = [k for k, size in _rows(assignments).items() if k >= first and size >= least]
    if len(kept) < space.num_clusters - first:  # rows of dropped task clusters go to the nearest one kept
        space = narrowed(space, [*range(first), *sorted(kept)])
        assignments = list(federation.assign(space))
    members: dict[int, list[str]] = {}
    for assignment in assignments:
        comparison = comparisons[assignment.client]
        num_in_new = sum(s.num_examples for s in assignment.subsets if s.cluster >= first)
        num_unplaced = comparison.num_beyond - num_in_new
        own = [
            s.cluster for s in assignment.subsets if s.cluster >= first or comparison.within.get(s.cluster)
        ]
        if not own or 2 * num_unplaced > comparison.num_beyond + sum(comparison.within.values()):
            raise TrainingError(
                f"client {assignment.client}: {num_unplaced} rows lie beyond every task cluster, too few for "
                f"a new one, which needs {least} rows over all joining clients; give more rows"
            )
        for k in own:
            members.setdefault(k, []).append(assignment.client)
    return Placed(space, assignments, members)


def _with_members(cluster: TaskCluster, joined: Sequence[str], joiners: Joiners) -> TaskCluster:
    staying = tuple(name for name in cluster.clients if name not in joiners.moved)
    return replace(cluster, clients=(*staying, *joined))


def _say_changes(session: Session, before: TaskCluster, now: TaskCluster, joiners: Joiners) -> None:
    added = [name for name in now.clients if name in joiners.sources and name not in before.clients]
    removed = [name for name in before.clients if name not in now.clients]
    for change, names in (("also", added), ("no longer", removed)):
        if names:
            session.say(f"task cluster {before.name}: {change} {', '.join(names)}")


def _check_names(config: Config, run: Path, bundle: Bundle, joiners: Joiners) -> None:
    known = {*_names(config, run), *(client for c in bundle.clusters for client in c.clients)}
    for name in joiners.late:
        if name in known:
            raise TrainingError(
                f"client {name}: {run} has a client of that name; choose another name, or give it "
                "with --moved if its data has changed"
            )
    for name in joiners.moved:
        if name not in known:
            raise TrainingError(f"client {name}: {run} has no client of that name to move; use --client")


def _finished(run: Path) -> Config:
    """Return the configuration of ``run``; refuse an unfinished run, another method, or noise."""
    config = read_resolved(run / "config.json")
    if not (run / "bundle").exists():
        raise TrainingError(f"{run} is not finished: it has no bundle; resume it first with its own command")
    if config.method != "fedrouter":
        raise ConfigError(
            f"{run} uses method {config.method}; clients can join only runs of method fedrouter"
        )
    if config.privacy.noisy:
        raise ConfigError(
            f"{run} was trained with noise, and a join would add none: train a new run with all clients"
        )
    return config


def _names(config: Config, run: Path) -> set[str]:
    return {*config.data.clients, *(name for entry in _joins(run) for name in entry["clients"])}


def _joins(run: Path) -> list[dict[str, Any]]:
    file = run / "joined.json"
    return list(read_json(file)) if file.exists() else []


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _rows(assignments: Sequence[Assignment]) -> dict[int, int]:
    rows: dict[int, int] = {}
    for subset in (s for a in assignments for s in a.subsets):
        rows[subset.cluster] = rows.get(subset.cluster, 0) + subset.num_examples
    return rows


def _only(assignment: Assignment, clusters: range) -> Assignment:
    return replace(assignment, subsets=tuple(s for s in assignment.subsets if s.cluster in clusters))


def _adapter_config(bundle: Bundle) -> dict[str, Any]:
    file = bundle.adapter_path(bundle.clusters[0]) / CONFIG
    return dict(json.loads(file.read_text(encoding="utf-8")))
