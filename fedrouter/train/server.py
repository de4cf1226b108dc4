"""The round loop. Knows clients only through the small ``Federation`` interface."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedrouter.config import AggregateSettings, Config, Count, TrainSettings
from fedrouter.train.aggregate import aggregate, clip, distance
from fedrouter.train.optimizer import server_step
from fedrouter.train.screen import refusals
from fedrouter.types import (
    AdapterState,
    Assignment,
    Float64s,
    LocalClusters,
    Moments,
    RoutingSpace,
    TrainFailure,
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

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train; yield replies as they come, or that a client could not."""
        ...


@dataclass(frozen=True, slots=True)
class RunState:
    """What one round hands to the next, and all that a checkpoint holds. Sequences run over task clusters."""

    number: int  # rounds done
    adapters: tuple[AdapterState, ...]
    moments: tuple[AdapterState, ...]  # of the server optimizer; empty without one
    losses: tuple[float | None, ...]  # of the last round in which each trained


@dataclass(frozen=True, slots=True)
class ClusterRound:
    """One task cluster's part in one round."""

    cluster: int
    loss: float | None  # mean over clients, weighted by examples, nats a token; None: no update was usable
    num_examples: int
    num_clients: int
    drift: float  # relative L2 distance of the new adapter from the old one
    norm: float  # L2, of the longest update that was taken
    residual: float | None  # of the exact mean: what the rank leaves out
    refused: Mapping[str, str]  # client → why its update was not taken, or why it could not train


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round leaves behind."""

    state: RunState
    clusters: tuple[ClusterRound, ...]  # those that were asked to train

    @property
    def number(self) -> int:
        """The round's number, from 0."""
        return self.state.number - 1


def fresh_state(adapters: Sequence[AdapterState]) -> RunState:
    """Return the state before the first round."""
    return RunState(0, tuple(adapters), ({},) * len(adapters), (None,) * len(adapters))


def run_rounds(
    federation: Federation,
    assignments: Sequence[Assignment],
    state: RunState,
    config: Config,
    on_reply: Callable[[TrainReply | TrainFailure, int], None] = lambda _reply, _steps: None,
) -> Iterator[RoundResult]:
    """Run the rounds that ``state`` has not seen and yield each one's result (paper algorithm 1).

    In every round each client trains, for each task cluster that its rows fall on, that cluster's adapter;
    the server aggregates within the cluster. An update that cannot be used costs its client the round; a
    task cluster without a usable one keeps its adapter.
    """
    for number in range(state.number, config.train.rounds):
        requests = requests_of(assignments, state.adapters, config.train, number)
        replies = collect(federation, requests, on_reply)
        adapters, moments, losses = list(state.adapters), list(state.moments), list(state.losses)
        results = []
        for k in sorted({request.cluster for request in requests}):
            group = [(request, replies[request.client, k]) for request in requests if request.cluster == k]
            group.sort(key=lambda pair: pair[0].client)  # the order of clients must not change the sum
            adapters[k], moments[k], result = combine(group, moments[k], config)
            losses[k] = losses[k] if result.loss is None else result.loss
            results.append(result)
        state = RunState(number + 1, tuple(adapters), tuple(moments), tuple(losses))
        yield RoundResult(state, tuple(results))


def collect(
    federation: Federation,
    requests: Sequence[TrainRequest],
    on_reply: Callable[[TrainReply | TrainFailure, int], None],
) -> dict[tuple[str, int], TrainReply | TrainFailure]:
    """Return one answer to every request; what nobody asked for is not looked at."""
    steps = {(r.client, r.cluster): r.steps for r in requests}
    answers: dict[tuple[str, int], TrainReply | TrainFailure] = {}
    for reply in federation.train(requests):
        key = reply.client, reply.cluster
        if key in steps and key not in answers:
            answers[key] = reply
            on_reply(reply, steps[key])
    missing = {key: TrainFailure(*key, "it did not answer") for key in steps.keys() - answers.keys()}
    return {**answers, **missing}


def combine(
    group: Sequence[tuple[TrainRequest, TrainReply | TrainFailure]], moments: AdapterState, config: Config
) -> tuple[AdapterState, AdapterState, ClusterRound]:
    """Make one adapter of a task cluster's replies; return it, the optimizer's moments and what happened."""
    old, cluster = group[0][0].adapter, group[0][0].cluster
    refused = {request.client: reply.reason for request, reply in group if isinstance(reply, TrainFailure)}
    answered = [(request, reply) for request, reply in group if isinstance(reply, TrainReply)]
    settings = config.aggregate
    reasons = refusals(
        [request for request, _ in answered],
        [reply for _, reply in answered],
        config.train.batch_size,
        settings.outlier,
    )
    taken = []
    for (_, reply), reason in zip(answered, reasons, strict=True):
        if reason is None:
            taken.append(reply)
        else:
            refused[reply.client] = reason
    if not taken:
        return old, moments, ClusterRound(cluster, None, 0, 0, 0.0, 0.0, None, refused)
    weights = [reply.num_examples for reply in taken]
    wanted, residual = aggregate(_clipped(old, taken, settings), weights, settings)
    new, moments = server_step(old, wanted, moments, settings)
    result = ClusterRound(
        cluster=cluster,
        loss=float(np.average([reply.loss for reply in taken], weights=weights)),
        num_examples=sum(weights),
        num_clients=len(taken),
        drift=distance(old, new)
        / math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in old.values())),
        norm=max(distance(old, reply.adapter) for reply in taken),
        residual=residual,
        refused=refused,
    )
    return new, moments, result


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


def _clipped(
    old: AdapterState, replies: Sequence[TrainReply], settings: AggregateSettings
) -> list[AdapterState]:
    if settings.clip is None:
        return [reply.adapter for reply in replies]
    return [clip(old, reply.adapter, settings.clip) for reply in replies]
