"""The round loop. Knows clients only through the small ``Federation`` interface."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedrouter.config import Count, TrainSettings
from fedrouter.train.aggregate import average
from fedrouter.types import (
    AdapterState,
    Assignment,
    Float64s,
    LocalClusters,
    Moments,
    RoutingSpace,
    TrainReply,
    TrainRequest,
)


class Federation(Protocol):
    """The clients, wherever they run: in this process (local.py) or on other machines."""

    def summarise(self, num: Count) -> list[LocalClusters]:
        """Have every client cluster its own rows."""
        ...

    def regroup(self, space: RoutingSpace) -> list[LocalClusters]:
        """Have every client give its rows to the nearest centroid."""
        ...

    def moments(self, space: RoutingSpace, basis: Float64s) -> list[Moments]:
        """Have every client reveal moments of its set-aside rows, in coordinates ``basis``."""
        ...

    def assign(self, space: RoutingSpace) -> list[Assignment]:
        """Tell every client the task clusters."""
        ...

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply]:
        """Have the named clients train; yield replies as they come."""
        ...


@dataclass(frozen=True, slots=True)
class ClusterRound:
    """One task cluster's part in one round."""

    cluster: int
    loss: float  # mean over clients, weighted by examples, nats a token
    num_examples: int
    num_clients: int
    drift: float  # relative L2 distance of the new adapter from the old one


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round leaves behind: enough to go on from."""

    number: int  # from 0
    adapters: tuple[AdapterState, ...]  # one a task cluster
    clusters: tuple[ClusterRound, ...]  # those that trained


def run_rounds(
    federation: Federation,
    assignments: Sequence[Assignment],
    adapters: Sequence[AdapterState],
    settings: TrainSettings,
    start: int = 0,
    on_reply: Callable[[TrainReply, int], None] = lambda _reply, _steps: None,
) -> Iterator[RoundResult]:
    """Run rounds ``start`` … and yield each one's result (paper algorithm 1).

    In every round each client trains, for each task cluster that its rows fall on, that cluster's adapter;
    the server averages within the cluster, weighted by the examples really trained.
    """
    adapters = list(adapters)
    for number in range(start, settings.rounds):
        requests = requests_of(assignments, adapters, settings, number)
        steps = {(r.client, r.cluster): r.steps for r in requests}
        replies: dict[int, list[TrainReply]] = {}
        for reply in federation.train(requests):
            replies.setdefault(reply.cluster, []).append(reply)
            on_reply(reply, steps[reply.client, reply.cluster])
        results = []
        for cluster, group in sorted(replies.items()):
            group.sort(key=lambda reply: reply.client)  # the order of arrival must not change the sum
            weights = [reply.num_examples for reply in group]
            new = average([reply.adapter for reply in group], weights)
            results.append(
                ClusterRound(
                    cluster=cluster,
                    loss=float(np.average([reply.loss for reply in group], weights=weights)),
                    num_examples=sum(weights),
                    num_clients=len(group),
                    drift=_drift(adapters[cluster], new),
                )
            )
            adapters[cluster] = new
        yield RoundResult(number, tuple(adapters), tuple(results))


def requests_of(
    assignments: Sequence[Assignment], adapters: Sequence[AdapterState], settings: TrainSettings, number: int
) -> list[TrainRequest]:
    """Return what the server asks for in one round."""
    rate = cosine(number, settings)
    return [
        TrainRequest(assignment.client, subset.cluster, number, adapters[subset.cluster], steps, rate)
        for assignment in assignments
        for subset, steps in zip(
            assignment.subsets,
            share([s.num_examples for s in assignment.subsets], settings.steps),
            strict=True,
        )
        if steps
    ]


def cosine(number: int, settings: TrainSettings) -> float:
    """Return a round's learning rate: cosine from ``learning_rate`` to ``learning_rate_end``."""
    progress = number / max(1, settings.rounds - 1)
    end = settings.learning_rate_end
    return end + (settings.learning_rate - end) * (1 + math.cos(math.pi * progress)) / 2


def share(sizes: Sequence[int], total: int) -> list[int]:
    """Split ``total`` whole steps in proportion to ``sizes``; largest remainders get what rounding leaves."""
    exact = np.asarray(sizes) / sum(sizes) * total
    steps = np.floor(exact).astype(int)
    for i in np.argsort(steps - exact, kind="stable")[: total - steps.sum()]:
        steps[i] += 1
    return [int(n) for n in steps]


def _drift(old: AdapterState, new: AdapterState) -> float:
    moved = math.sqrt(sum(float(((new[n] - old[n]).astype(np.float64) ** 2).sum()) for n in old))
    return moved / math.sqrt(sum(float((old[n].astype(np.float64) ** 2).sum()) for n in old))
