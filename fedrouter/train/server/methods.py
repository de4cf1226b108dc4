"""Who trains which adapter: the paper's method, and the baselines that it is compared with.

All of them go through the same rounds with the same data, steps and seeds, and end in a bundle:

- ``fedrouter``: task clusters are found; a row belongs to the nearest one (discover.py).
- ``fedavg``, ``fedprox``: one task cluster for everything; FedProx pulls clients back (``train.proximal``).
- ``local``: one task cluster a client; nothing is averaged.
- ``clustered``: FedAvg for ``cluster.warmup`` rounds, then clients are grouped by the direction of their
  updates of B; one task cluster a group.
- ``feddpa``: every row trains a global adapter and its client's own; the bundle mixes the two half and half.
- ``oracle``: one task cluster a task label, told.

Where clients or tasks are told their task cluster, a prompt goes to the task cluster whose mean row is
nearest: to the client, group or task whose rows look most like it.
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

GLOBAL_SHARE = 0.5  # of the global adapter in FedDPA's mix, as in the paper's experiments


@dataclass(frozen=True, slots=True)
class Grouping:
    """What the rounds start from."""

    space: RoutingSpace
    assignments: list[Assignment]
    names: tuple[str, ...] | None  # of the task clusters; None: after the labels of their rows
    state: RunState


@dataclass(frozen=True, slots=True)
class Finished:
    """What goes into the bundle."""

    adapters: Sequence[AdapterState]  # one a task cluster
    generalist: AdapterState | None
    adapter_config: Mapping[str, object]


def group(federation: Federation, config: Config, fresh: AdapterState, dim: int) -> Grouping:
    """Return who trains what, by ``config.method``; every adapter starts as ``fresh``.

    Parameters
    ----------
    dim : of the embedder.

    Raises
    ------
    TrainingError
        If rows have no label and ``oracle`` needs one, or too few clients for ``clustered``.
    ClientError
        If clients could not do their part.
    """
    if config.method == "fedrouter":
        space = discover(federation, config.cluster, config.seed)
        return Grouping(space, federation.assign(space), None, fresh_state([fresh] * space.num_clusters))
    point = _point(dim)
    known = federation.assign(point)  # they say who they are and what labels they hold
    clients = [assignment.client for assignment in known]
    everything = Membership(dict.fromkeys(clients, (0,)), {}, 1)
    state, num = None, len(clients)
    names = tuple(clients)
    if config.method in ("fedavg", "fedprox"):
        told, names = everything, ("all",)
    elif config.method == "local":
        told = Membership({client: (i,) for i, client in enumerate(clients)}, {}, num)
    elif config.method == "feddpa":
        told = Membership({client: (i, num) for i, client in enumerate(clients)}, {}, num)
    elif config.method == "oracle":
        names = tuple(_labels(known))
        told = Membership({}, {task: k for k, task in enumerate(names)}, len(names))
    else:
        state, updates = _warm_up(federation, federation.assign(point, everything), config, fresh)
        of = group_clients([updates[client] for client in clients], config.cluster.global_)
        told = Membership({c: (int(k),) for c, k in zip(clients, of, strict=True)}, {}, int(of.max()) + 1)
        names = tuple(f"group-{k}" for k in range(told.num))
        state = replace(fresh_state([state.adapters[0]] * told.num), number=state.number)
    space = _told_space(federation, point, told)
    num_adapters = told.num + (config.method == "feddpa")
    return Grouping(
        space, federation.assign(space, told), names, state or fresh_state([fresh] * num_adapters)
    )


def finish(
    config: Config, state: RunState, clusters: Sequence[TaskCluster], adapter_config: Mapping[str, object]
) -> Finished:
    """Return what goes into the bundle.

    ``local``, ``fedavg`` and ``fedprox`` have no generalist: nothing is shared, or everything is. FedDPA's is
    its global adapter; its mixes are exact, of twice the rank.
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

    Between these, squared Euclidean distance is twice the cosine distance. "auto" takes the number from two
    up with the best mean silhouette (FedLEASE), which cannot find that one group is right.

    Parameters
    ----------
    updates : one (n,) vector a client, not zero.

    Raises
    ------
    TrainingError
        If more groups are asked for than there are clients.
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
        return np.asarray(np.argsort(np.argsort(first))[number])  # numbered in the order of the clients

    if num != "auto":
        return cut(num) if num > 1 else np.zeros(len(unit), dtype=np.int64)
    return max(
        (cut(count) for count in range(2, len(unit))), key=lambda labels: silhouette_score(unit, labels)
    )


def _warm_up(
    federation: Federation, assignments: Sequence[Assignment], config: Config, fresh: AdapterState
) -> tuple[RunState, dict[str, Float64s]]:
    """Train one adapter for all; return it and what each client's last round changed in B."""
    trained: dict[str, AdapterState] = {}

    def keep(reply: TrainReply | TrainFailure, _steps: int) -> None:
        if isinstance(reply, TrainReply):
            trained[reply.client] = reply.adapter  # of the client's rank

    before = state = fresh_state([fresh])
    for result in run_rounds(federation, assignments, state, config, keep):
        before, state = state, result.state
        if result.clusters[0].refused:  # a client without an update belongs to no group
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
    """Return a space with one centroid, so that nothing is told apart."""
    zeros = np.zeros(dim, dtype=np.float32)
    return RoutingSpace(zeros, np.eye(dim, dtype=np.float32), zeros[None], (0,))


def _told_space(federation: Federation, point: RoutingSpace, told: Membership) -> RoutingSpace:
    """Return a space with one centroid a task cluster: the mean of the rows that were told."""
    return routing_space(pool(federation.regroup(point, told), told.num))


def _labels(known: Sequence[Assignment]) -> list[str]:
    """Return all task labels.

    Raises
    ------
    TrainingError
        If a row has none.
    """
    for assignment in known:
        unlabelled = sum(s.num_examples - sum(s.task_counts.values()) for s in assignment.subsets)
        if unlabelled:
            raise TrainingError(
                f"method oracle needs a task label on every row; {unlabelled} rows of client "
                f"{assignment.client} have none"
            )
    return sorted({task for a in known for s in a.subsets for task in s.task_counts} - {FEW})
