"""Which client trains which adapter, for the paper's method and the baselines.

All methods run the same rounds with the same data, steps and seeds, and produce a bundle:

- ``fedrouter``: task clusters are discovered; a row belongs to the nearest one (discover.py).
- ``fedavg``, ``fedprox``: one task cluster for all rows; FedProx adds a proximal term (``train.proximal``).
- ``local``: one task cluster per client; nothing is averaged.
- ``clustered``: FedAvg for ``cluster.warmup`` rounds; then clients are grouped by the direction of their
  updates of B, with one task cluster per group.
- ``feddpa``: every row trains a global adapter and its client's own adapter; the bundle mixes them equally.
- ``oracle``: one task cluster per task label.

The baselines assign clients or task labels to task clusters in advance. They route a prompt to the task
cluster whose mean row is nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score

from fedrouter.config import Config, Count
from fedrouter.errors import ClientError, TrainingError
from fedrouter.train.federation import FEW, Federation
from fedrouter.train.lora import completed, stack
from fedrouter.train.server.aggregate import mean
from fedrouter.train.server.discover import discover, pool, routing_space
from fedrouter.train.server.loop import run_rounds
from fedrouter.train.space import Labels
from fedrouter.train.state import RunState, fresh_state
from fedrouter.types import (
    AdapterState,
    Assignment,
    Float64s,
    Membership,
    RoutingSpace,
    TaskCluster,
    TrainFailure,
    TrainReply,
)

GLOBAL_SHARE = 0.5  # weight of the global adapter in FedDPA's mix, as in the paper's experiments


@dataclass(frozen=True, slots=True)
class Grouping:
    """The task clusters, assignments and adapters that the rounds start from."""

    space: RoutingSpace
    assignments: list[Assignment]
    names: tuple[str, ...] | None  # of the task clusters; None: named after task labels
    state: RunState


@dataclass(frozen=True, slots=True)
class Finished:
    """The adapters for the bundle."""

    adapters: Sequence[AdapterState]  # one per task cluster
    generalist: AdapterState | None
    adapter_config: Mapping[str, object]


def group(federation: Federation, config: Config, fresh: AdapterState, dim: int) -> Grouping:
    """Form task clusters and assign clients to them by ``config.method``; every adapter starts as ``fresh``.

    Parameters
    ----------
    dim : dimension of the embedder's vectors.

    Raises
    ------
    TrainingError
        If rows without a label meet ``oracle``, or there are too few clients for ``clustered``.
    ClientError
        If clients failed.
    """
    if config.method == "fedrouter":
        space = discover(federation, config.cluster, config.seed)
        return Grouping(space, federation.assign(space), None, fresh_state([fresh] * space.num_clusters))
    point = _point(dim)
    known = federation.assign(point)  # to learn the clients' names and task labels
    clients = [assignment.client for assignment in known]
    all_together = Membership(dict.fromkeys(clients, (0,)), {}, 1)
    state, num = None, len(clients)
    names = tuple(clients)
    if config.method in ("fedavg", "fedprox"):
        membership, names = all_together, ("all",)
    elif config.method == "local":
        membership = Membership({client: (i,) for i, client in enumerate(clients)}, {}, num)
    elif config.method == "feddpa":
        membership = Membership({client: (i, num) for i, client in enumerate(clients)}, {}, num)
    elif config.method == "oracle":
        names = tuple(_labels(known))
        membership = Membership({}, {task: k for k, task in enumerate(names)}, len(names))
    else:
        state, updates = _warm_up(federation, federation.assign(point, all_together), config, fresh)
        labels = group_clients([updates[client] for client in clients], config.cluster.global_)
        membership = Membership(
            {c: (int(k),) for c, k in zip(clients, labels, strict=True)}, {}, int(labels.max()) + 1
        )
        names = tuple(f"group-{k}" for k in range(membership.num))
        state = replace(fresh_state([state.adapters[0]] * membership.num), number=state.number)
    space = _space_of_members(federation, point, membership)
    num_adapters = membership.num + (config.method == "feddpa")
    return Grouping(
        space, federation.assign(space, membership), names, state or fresh_state([fresh] * num_adapters)
    )


def finish(
    config: Config, state: RunState, clusters: Sequence[TaskCluster], adapter_config: Mapping[str, object]
) -> Finished:
    """Return the adapters for the bundle.

    ``local``, ``fedavg`` and ``fedprox`` have no generalist, because nothing or everything is shared.
    FedDPA's generalist is its global adapter; its mixed adapters are exact and have twice the rank.
    """
    adapters = state.best_adapters
    if config.method == "feddpa":
        shared, shares = adapters[-1], (GLOBAL_SHARE, 1 - GLOBAL_SHARE)
        double = {"r": 2 * config.lora.rank, "lora_alpha": 2 * config.lora.alpha}
        mixed = [stack([shared, own], shares) for own in adapters[:-1]]
        return Finished(mixed, stack([shared, shared], shares), {**adapter_config, **double})
    if config.method in ("local", "fedavg", "fedprox"):
        return Finished(adapters, None, adapter_config)
    general, _ = mean(adapters, [c.num_examples for c in clusters], config.aggregate.method)
    return Finished(adapters, general, adapter_config)


def group_clients(updates: Sequence[Float64s], num: Count) -> Labels:
    """Group clients by the direction of their updates: Ward linkage on vectors of unit length.

    Between unit vectors, squared Euclidean distance is twice the cosine distance. "auto" takes the number of
    groups, at least two, with the best mean silhouette (FedLEASE); it cannot detect a single group.

    Parameters
    ----------
    updates : one nonzero vector (n,) per client.

    Raises
    ------
    TrainingError
        If ``num`` exceeds the number of clients.
    """
    vectors = np.stack(updates)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if num != "auto" and num > len(unit):
        raise TrainingError(f"{num} groups but only {len(unit)} clients; lower cluster.global")
    if len(unit) < 3 and num == "auto":
        return np.arange(len(unit))

    def cut(count: int) -> Labels:
        found = AgglomerativeClustering(count, linkage="ward").fit_predict(unit)
        _, first, number = np.unique(found, return_index=True, return_inverse=True)
        return np.asarray(np.argsort(np.argsort(first))[number])  # number groups by their first client

    if num != "auto":
        return cut(num) if num > 1 else np.zeros(len(unit), dtype=np.int64)
    return max(
        (cut(count) for count in range(2, len(unit))), key=lambda labels: silhouette_score(unit, labels)
    )


def _warm_up(
    federation: Federation, assignments: Sequence[Assignment], config: Config, fresh: AdapterState
) -> tuple[RunState, dict[str, Float64s]]:
    """Train one adapter for all clients; return the state and each client's last update of B."""
    trained: dict[str, AdapterState] = {}

    def keep(reply: TrainReply | TrainFailure, _steps: int) -> None:
        if isinstance(reply, TrainReply):
            trained[reply.client] = reply.adapter  # may have a lower rank

    before = state = fresh_state([fresh])
    for result in run_rounds(federation, assignments, state, config, keep):
        before, state = state, result.state
        if result.clusters[0].refused:  # a client without an update cannot be grouped
            raise ClientError(result.clusters[0].refused)
        if state.number == config.cluster.warmup:
            break
    sent = before.adapters[0]
    return state, {
        client: np.concatenate(
            [(new[n] - sent[n]).astype(np.float64).ravel() for n in sorted(new) if ".lora_B." in n]
        )
        for client, reply in trained.items()
        for new in [completed(reply, sent)]
    }


def _point(dim: int) -> RoutingSpace:
    """Return a space with a single centroid, to which all rows belong."""
    zeros = np.zeros(dim, dtype=np.float32)
    return RoutingSpace(zeros, np.eye(dim, dtype=np.float32), zeros[None], (0,))


def _space_of_members(federation: Federation, point: RoutingSpace, membership: Membership) -> RoutingSpace:
    """Return a space with one centroid per task cluster: the mean of its rows by ``membership``."""
    return routing_space(pool(federation.regroup(point, membership), membership.num))


def _labels(known: Sequence[Assignment]) -> list[str]:
    """Return all task labels.

    Raises
    ------
    TrainingError
        If a row has no label.
    """
    for assignment in known:
        unlabelled = sum(s.num_examples - sum(s.task_counts.values()) for s in assignment.subsets)
        if unlabelled:
            raise TrainingError(
                f"method oracle needs a task label on every row; {unlabelled} rows of client "
                f"{assignment.client} have none"
            )
    return sorted({task for a in known for s in a.subsets for task in s.task_counts} - {FEW})
