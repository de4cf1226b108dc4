"""The state of a run: what each round passes to the next, and what a checkpoint holds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedrouter.types import AdapterState, Assignment, RoutingSpace, TaskCluster


@dataclass(frozen=True, slots=True)
class Clustering:
    """The task clusters and their clients, until the clients are clustered again."""

    space: RoutingSpace
    assignments: Sequence[Assignment]
    clusters: Sequence[TaskCluster]
    ended: tuple[str, ...] = ()  # names of former task clusters, never reused


class Validation(NamedTuple):
    """An adapter's loss on a client's validation rows."""

    loss: float  # nats per token
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Best:
    """The round in which a task cluster's adapter had its lowest validation loss."""

    round: int  # from 0
    validation: Mapping[str, Validation]  # by client
    adapter: AdapterState


@dataclass(frozen=True, slots=True)
class RunState:
    """What each round passes to the next, and what a checkpoint holds; tuples have one entry per adapter."""

    number: int  # rounds done
    adapters: tuple[AdapterState, ...]
    moments: tuple[AdapterState, ...]  # of the server optimizer; empty mappings without one
    losses: tuple[float | None, ...]  # of the last round in which the adapter was trained
    best: tuple[Best | None, ...]  # None: never validated

    @property
    def best_adapters(self) -> tuple[AdapterState, ...]:
        """The adapters for the bundle: of each, the best one by validation loss, or else the last."""
        return tuple(
            best.adapter if best else last for best, last in zip(self.best, self.adapters, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Start:
    """What the rounds start from or resume from."""

    clustering: Clustering
    state: RunState
    digest: str  # of the clustering and all clients' rows; a checkpoint is used only if its digest is equal


@dataclass(frozen=True, slots=True)
class ClusterRound:
    """One task cluster's results in one round."""

    cluster: int
    loss: float | None  # mean over clients, weighted by examples, nats per token; None: not reported
    num_examples: int
    num_clients: int
    drift: float  # relative L2 distance of the new adapter from the old one
    norm: float  # L2, of the longest accepted update
    residual: float | None  # of the exact mean: relative error from reducing it to the rank; else None
    refused: Mapping[str, str]  # client → why its update was refused, or why it could not train
    num_bytes: int = 0  # of adapters sent to clients and received from them
    validation: float | None = None  # mean loss of the new adapter on validation rows, nats per token


@dataclass(frozen=True, slots=True)
class RoundResult:
    """The state after one round, and the results of each task cluster."""

    state: RunState
    clusters: tuple[ClusterRound, ...]  # only task clusters trained in this round

    @property
    def number(self) -> int:
        """The round's number, from 0."""
        return self.state.number - 1


def fresh_state(adapters: Sequence[AdapterState]) -> RunState:
    """Return the state before the first round."""
    num = len(adapters)
    return RunState(0, tuple(adapters), ({},) * num, (None,) * num, (None,) * num)


def mean_loss(validation: Mapping[str, Validation], clients: Collection[str]) -> float:
    """Return the mean loss over the tokens of ``clients``, of which there is at least one."""
    losses, weights = zip(*(validation[client] for client in sorted(clients)), strict=True)
    return float(np.average(losses, weights=weights))


def exhausted(state: RunState, patience: int | None) -> bool:
    """Return whether no task cluster's validation loss fell in the last ``patience`` rounds."""
    rounds = [best.round for best in state.best if best]
    return patience is not None and bool(rounds) and state.number - 1 - max(rounds) >= patience
