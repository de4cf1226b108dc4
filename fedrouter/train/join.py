"""Clients that come late or move: from a finished run to another one, in which only what is new was trained.

1. Each such client embeds its rows and compares them with the bundle's task clusters, in the bundle's
   space, which stays as it is. Rows within a radius belong there: the client is listed, nothing is trained.
   A client that was there before is no longer listed where it has no rows now: it has moved.
2. Rows beyond every radius are looked for new tasks as discover.py does, among the clients that join. A new
   task cluster needs ``MIN_TASK_ROWS`` rows, and more than the radius's quantile leaves outside by chance.
3. Its mean becomes a centroid in the same space; rows set aside give its radius; its adapter starts from
   the generalist and is trained for the configured rounds by the clients that hold such rows.
4. The bundle of before stays where it is. The new one, old adapters byte for byte, is a run of its own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedrouter.bundle import (
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
from fedrouter.embed import Embedder, HiddenStateEmbedder, load_embedder
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.models import resolve_base
from fedrouter.train.aggregate import mean
from fedrouter.train.cache import CachedEmbedder
from fedrouter.train.check import tokenised
from fedrouter.train.checkpoint import clustering_digest, latest_checkpoint
from fedrouter.train.client import Client
from fedrouter.train.describe import describe
from fedrouter.train.discover import explained_by_a_task, find_tasks
from fedrouter.train.files import write_atomically
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.machine import check_machine
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.train.recluster import Clustering
from fedrouter.train.rounds import train_rounds
from fedrouter.train.run import load_model, quantised, unclaimed, versions
from fedrouter.train.server import Federation, fresh_state
from fedrouter.train.sft import AdapterTrainer
from fedrouter.train.sources import load_sources
from fedrouter.train.workers import start_workers
from fedrouter.types import AdapterState, Array, Assignment, RoutingSpace

MIN_TASK_ROWS = 30  # over all clients that join: a third is set aside, and ten distances make a radius
CHANCE = 3.0  # standard deviations above what a radius's quantile leaves outside


@explained_out_of_memory()
def join(
    run: Path,
    sources: Mapping[str, str],
    moved: Mapping[str, str],
    out: Path | None,
    console: Console,
    processes: int = 1,
) -> Bundle:
    """Add clients to the finished ``run``; write another run, with a bundle that knows them, and return that.

    Parameters
    ----------
    sources : file or data set by the name of the client.
    moved : the same of clients that ``run`` knows and whose data has changed: they leave the task clusters in
        which they have no rows any more.
    out : where to; without it ``run``'s name and the clients'. The same command goes on, or says it is done.
    processes : train so many adapters at a time.

    Raises
    ------
    ConfigError, TrainingError, DataError, BundleError, ClientError
        If ``run`` is no finished run of method fedrouter, a name is taken, or a client has too few rows.
    """
    config = _finished(run)
    out = out or run.with_name("-".join([run.name, *sources, *moved]))
    if both := sources.keys() & moved.keys():
        raise ConfigError(f"client {min(both)}: given with --client and with --moved")
    sources, moved = (
        {name: _absolute(source) for name, source in sorted(given.items())} for given in (sources, moved)
    )
    entry = {"run": str(run.resolve()), "clients": sources, **({"moved": moved} if moved else {})}
    joins = [*_joins(run), entry]
    begun = out.exists() and any(path.name != "embeddings" for path in out.iterdir())
    if begun and (not (out / "joined.json").exists() or _joins(out) != joins):
        raise TrainingError(f"{out} holds something else already; choose another --out")
    if (out / "bundle").exists():
        names = ", ".join([*sources, *moved])
        console.print(f"{names}: joined already in {out}", highlight=False, soft_wrap=True)
        return load_bundle(out / "bundle")

    bundle = load_bundle(run / "bundle")
    known = {*_names(config, run), *(client for c in bundle.clusters for client in c.clients)}
    for name in sources:
        if name in known:
            raise TrainingError(
                f"client {name}: {run} has a client of that name; choose another, or give it with --moved "
                "if its data has changed"
            )
    for name in moved:
        if name not in known:
            raise TrainingError(f"client {name}: {run} has none of that name that could move; use --client")
    records = load_sources({**sources, **moved}, config)

    path = resolve_base(bundle.base.model, bundle.base.revision)
    check_base(bundle, path)
    check_machine(config)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if bundle.chat_template:  # the adapters' own, whatever the base's has become
        base_settings = config.base.model_copy(update={"chat_template": str(bundle.chat_template)})
        config = config.model_copy(update={"base": base_settings})
    tokenizer, tokeniser = tokenised(config, path, records, say)
    model, _ = load_model(config, path, processes)
    found: Embedder
    if bundle.embedder.kind == "base":
        found = HiddenStateEmbedder(model.base_model, tokenizer, bundle.embedder)
    else:
        found = load_embedder(bundle.embedder, bundle.base, url=config.embedder.url)
    embedder = CachedEmbedder(found, Path(config.embedder.cache or out / "embeddings"))
    check_embedder(bundle, embedder)
    with unclaimed(out):
        clients = list(each(records, lambda n: Client(n, records[n], embedder, config.seed, config.privacy)))
        model = quantised(config, path, model)
        trainer = AdapterTrainer(model, tokenizer, config.lora, config.train, config.seed, tokeniser)
        trainer.rehearse([r for rows in records.values() for r in rows], config.train.learning_rate)
        federation = LocalFederation(clients, trainer, start_workers(trainer, config, path, processes))
        space, assignments, members = placed(bundle, clients, federation, trainer, config.routing.quantile)
    first = len(bundle.clusters)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "joined.json", json.dumps(joins, indent=2) + "\n")
    write_atomically(out / "config.json", (run / "config.json").read_text(encoding="utf-8"))
    added = describe(assignments, max(space.cluster_of) + 1, config.routing, standing=bundle.clusters)
    clusters = []
    for k, c in enumerate(bundle.clusters):
        here = members.get(k, [])
        stay = tuple(name for name in c.clients if name not in moved)
        clusters.append(replace(c, clients=(*stay, *here)))
        for what, who in (
            ("also", [name for name in here if name not in c.clients]),
            ("no longer", [name for name in c.clients if name in moved and name not in here]),
        ):
            if who:
                console.print(f"task cluster {c.name}: {what} {', '.join(who)}", highlight=False)
    for c in added:
        console.print(f"new task cluster {c.name}: {c.num_examples} rows of {', '.join(c.clients)}",
                      highlight=False)  # fmt: skip

    adapters: list[AdapterState] = [read_weights(bundle.adapter_path(c)) for c in bundle.clusters]
    sizes = [c.num_examples for c in [*clusters, *added]]
    general = (
        read_weights(bundle.adapter_paths[bundle.generalist])
        if bundle.generalist
        else mean(adapters, sizes[:first], config.aggregate.method)[0]
    )
    if added:
        digest = clustering_digest(space, assignments, records)
        state = latest_checkpoint(out / "checkpoints", digest)
        state = state or fresh_state([*adapters, *[general] * len(added)])
        fresh = [_only(a, range(first, first + len(added))) for a in assignments]
        clustering = Clustering(space, [a for a in fresh if a.subsets], [*clusters, *added])
        _, state = train_rounds(federation, clustering, state, digest, config, out, console)
        adapters += state.best_adapters[first:]
        added = [c if loss is None else replace(c, training={"loss": round(loss, 5)})
                 for c, loss in zip(added, state.losses[first:], strict=True)]  # fmt: skip
        general, _ = mean(adapters, sizes, config.aggregate.method)
    return write_bundle(
        out / "bundle",
        base=bundle.base,
        embedder=bundle.embedder,
        clusters=[*clusters, *added],
        adapters=adapters,
        adapter_config=_adapter_config(bundle),
        space=space,
        probe_vectors=bundle.probe,
        fallback=bundle.fallback,
        versions=versions(),
        chat_template=tokenizer.chat_template,
        generalist=general,
        probes=(bundle.path / PROBES).read_bytes() if bundle.probes else None,
    )


def placed(
    bundle: Bundle,
    clients: Sequence[Client],
    federation: Federation,
    trainer: AdapterTrainer,
    quantile: float,
) -> tuple[RoutingSpace, list[Assignment], dict[int, list[str]]]:
    """Place the clients' rows among a bundle's task clusters and, where these do not reach, in new ones.

    Returns
    -------
    space : the bundle's, with the centroids of new task clusters behind the others.
    assignments : how the clients' rows fall on all of them.
    members : the clients with rows within the radius, by the number of the task cluster.

    Raises
    ------
    TrainingError
        If most rows of a client have a place in none of them.
    """
    first = len(bundle.clusters)
    found = {c.name: c.compare(bundle.space, [k.radius for k in bundle.clusters]) for c in clients}
    outside = {name: rest for name, (_, rest) in found.items() if rest.num_rows}
    num_outside = sum(rest.num_rows for rest in outside.values())
    num = num_outside + sum(sum(within.values()) for within, _ in found.values())
    chance = num * (1 - quantile) + CHANCE * math.sqrt(num * quantile * (1 - quantile))
    least = max(MIN_TASK_ROWS, math.floor(chance) + 1)
    space = bundle.space
    assignments = list(federation.assign(space))
    settings = ClusterSettings()
    able = [client for client in outside.values() if client.may_summarise]
    # Of few rows discovery makes too many tasks: join until all are large enough.
    while able and num_outside >= least:
        among = LocalFederation(able, trainer)
        tasks = find_tasks(among, settings, explained_by_a_task(bundle.space))
        space = widened(bundle.space, tasks.centroids.astype(np.float32))
        assignments = list(federation.assign(space))
        rows = _rows(assignments)
        num_new = len(tasks.centroids)
        if num_new == 1 or all(rows.get(first + k, 0) >= least for k in range(num_new)):
            break
        settings = ClusterSettings.model_validate({"global": num_new - 1})
    kept = [k for k, size in _rows(assignments).items() if k >= first and size >= least]
    if len(kept) < max(space.cluster_of) + 1 - first:  # the others' rows go to the nearest that is left
        space = narrowed(space, [*range(first), *sorted(kept)])
        assignments = list(federation.assign(space))
    members: dict[int, list[str]] = {}
    for assignment in assignments:
        within, rest = found[assignment.client]
        new = sum(s.num_examples for s in assignment.subsets if s.cluster >= first)
        nowhere = rest.num_rows - new
        own = [s.cluster for s in assignment.subsets if s.cluster >= first or within.get(s.cluster)]
        if not own or 2 * nowhere > rest.num_rows + sum(within.values()):
            raise TrainingError(
                f"client {assignment.client}: {nowhere} rows lie beyond every task cluster, too few for "
                f"one of their own; give more rows, it takes {least} over all clients that join"
            )
        for k in own:
            members.setdefault(k, []).append(assignment.client)
    return space, assignments, members


def widened(space: RoutingSpace, centroids: Array) -> RoutingSpace:
    """Return the space with new task clusters, a centroid each: (n, m)."""
    first = max(space.cluster_of) + 1
    return replace(
        space,
        centroids=np.concatenate([space.centroids, centroids]),
        cluster_of=(*space.cluster_of, *range(first, first + len(centroids))),
    )


def narrowed(space: RoutingSpace, kept: Sequence[int]) -> RoutingSpace:
    """Return the space with the task clusters ``kept`` alone, numbered anew in that order."""
    rows = [i for i, k in enumerate(space.cluster_of) if k in kept]
    number = {k: i for i, k in enumerate(kept)}
    return replace(
        space,
        centroids=space.centroids[rows],
        cluster_of=tuple(number[space.cluster_of[i]] for i in rows),
    )


def _finished(run: Path) -> Config:
    """Return the configuration of a finished run of method fedrouter."""
    config = read_resolved(run / "config.json")
    if not (run / "bundle").exists():
        raise TrainingError(f"{run} is not finished: it has no bundle; give its command again first")
    if config.method != "fedrouter":
        raise ConfigError(f"{run} is of method {config.method}; clients join runs of method fedrouter")
    if config.privacy.noisy:
        raise ConfigError(f"{run} was trained with noise, and joining has none: train anew with all clients")
    return config


def _names(config: Config, run: Path) -> set[str]:
    return {*config.data.clients, *(name for one in _joins(run) for name in one["clients"])}


def _joins(run: Path) -> list[dict[str, Any]]:
    file = run / "joined.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


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
    file = bundle.adapter_path(bundle.clusters[0]) / "adapter_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))
