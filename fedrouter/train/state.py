"""The state of a run: what one round hands to the next, and what a checkpoint holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedrouter.types import AdapterState, Assignment, RoutingSpace, TaskCluster


@dataclass(frozen=True, slots=True)
class Clustering:
    """Who trains what, until clients are clustered anew."""

    space: RoutingSpace
    assignments: Sequence[Assignment]
    clusters: Sequence[TaskCluster]
    ended: tuple[str, ...] = ()  # names of task clusters that are no more; not given again


@dataclass(frozen=True, slots=True)
class Best:
    """The round in which a task cluster's adapter did best on validation rows."""

    round: int  # from 0
    loss: float
    adapter: AdapterState


@dataclass(frozen=True, slots=True)
class RunState:
    """What one round hands to the next, and all that a checkpoint holds. Sequences run over task clusters."""

    number: int  # rounds done
    adapters: tuple[AdapterState, ...]
    moments: tuple[AdapterState, ...]  # of the server optimizer; empty without one
    losses: tuple[float | None, ...]  # of the last round in which each trained
    best: tuple[Best | None, ...]  # None: not validated

    @property
    def best_adapters(self) -> tuple[AdapterState, ...]:
        """What goes into the bundle: each task cluster's best adapter, or its last one."""
        return tuple(
            best.adapter if best else last for best, last in zip(self.best, self.adapters, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Start:
    """What the rounds start from, or go on from."""

    clustering: Clustering
    state: RunState
    digest: str  # of the clustering and of all clients' rows; checkpoints belong to it


@dataclass(frozen=True, slots=True)
class ClusterRound:
    """One task cluster's part in one round."""

    cluster: int
    loss: float | None  # mean over clients, weighted by examples, nats a token; None: nobody told one
    num_examples: int
    num_clients: int
    drift: float  # relative L2 distance of the new adapter from the old one
    norm: float  # L2, of the longest update that was taken
    residual: float | None  # of the exact mean: what the rank leaves out
    refused: Mapping[str, str]  # client → why its update was not taken, or why it could not train
    num_bytes: int = 0  # of adapters that went to clients and came back
    validation: float | None = None  # mean loss of the new adapter on rows held back, nats a token


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
    num = len(adapters)
    return RunState(0, tuple(adapters), ({},) * num, (None,) * num, (None,) * num)


def exhausted(state: RunState, patience: int | None) -> bool:
    """Tell whether no task cluster's validation loss fell in the last ``patience`` rounds."""
    rounds = [best.round for best in state.best if best]
    return patience is not None and bool(rounds) and state.number - 1 - max(rounds) >= patience
