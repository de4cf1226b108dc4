"""The round loop; reaches clients only through the ``Federation`` interface."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from fedrouter.config import AggregateSettings, Config, TrainSettings
from fedrouter.train.federation import Federation, num_validation
from fedrouter.train.lora import clip, cut, distance, rank_of
from fedrouter.train.server.aggregate import aggregate
from fedrouter.train.server.optimizer import server_step
from fedrouter.train.server.screen import refusals
from fedrouter.train.state import (
    Best,
    ClusterRound,
    RoundResult,
    RunState,
    Validation,
    exhausted,
    mean_loss,
)
from fedrouter.types import (
    AdapterState,
    Assignment,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)


class Planned(NamedTuple):
    """A client's training of one task cluster's adapter in one round."""

    client: str
    cluster: int
    steps: int


@dataclass(frozen=True, slots=True)
class Combined:
    """A task cluster's adapter and metrics after one round."""

    adapter: AdapterState
    moments: AdapterState  # of the server optimizer
    result: ClusterRound


def run_rounds(
    federation: Federation,
    assignments: Sequence[Assignment],
    state: RunState,
    config: Config,
    on_reply: Callable[[TrainReply | TrainFailure, int], None] = lambda _reply, _steps: None,
) -> Iterator[RoundResult]:
    """Run the remaining rounds and yield the result of each (paper algorithm 1).

    In every round each client trains the adapters of the task clusters to which its rows belong, and the
    server aggregates within each task cluster. Unusable updates are dropped; a task cluster without a usable
    update keeps its adapter. With ``train.patience`` the rounds may end early.
    """
    for number in range(state.number, config.train.rounds):
        if exhausted(state, config.train.patience):
            return
        requests = requests_of(assignments, state.adapters, config, number)
        replies = collect(federation, requests, on_reply)
        adapters, moments, losses = list(state.adapters), list(state.moments), list(state.losses)
        results = []
        for k in sorted({request.cluster for request in requests}):
            group = [(request, replies[request.client, k]) for request in requests if request.cluster == k]
            group.sort(key=lambda pair: pair[0].client)  # the order of arrival must not change the sum
            combined = combine(group, adapters[k], moments[k], config)
            adapters[k], moments[k] = combined.adapter, combined.moments
            losses[k] = losses[k] if combined.result.loss is None else combined.result.loss
            results.append(combined.result)
        best = state.best
        if config.train.validation:
            found = validate(federation, assignments, adapters)
            best = tuple(_better(*pair, number) for pair in zip(best, found, adapters, strict=True))
            means = [mean_loss(by_client, by_client) if by_client else None for by_client in found]
            results = [replace(result, validation=means[result.cluster]) for result in results]
        state = RunState(number + 1, tuple(adapters), tuple(moments), tuple(losses), best)
        yield RoundResult(state, tuple(results))


def validate(
    federation: Federation, assignments: Sequence[Assignment], adapters: Sequence[AdapterState]
) -> list[dict[str, Validation]]:
    """Return each adapter's losses on its clients' validation rows, by client."""
    requests = [
        ValidationRequest(a.client, s.cluster, adapters[s.cluster]) for a in assignments for s in a.subsets
    ]
    asked = {(request.client, request.cluster) for request in requests}
    replies = {
        (reply.client, reply.cluster): reply
        for reply in federation.validate(requests)
        if isinstance(reply, ValidationReply) and (reply.client, reply.cluster) in asked
    }
    found: list[dict[str, Validation]] = [{} for _ in adapters]
    for (client, k), reply in replies.items():
        if reply.num_tokens > 0 and math.isfinite(reply.loss):
            found[k][client] = Validation(reply.loss, reply.num_tokens)
    return found


def _better(
    best: Best | None, found: Mapping[str, Validation], adapter: AdapterState, number: int
) -> Best | None:
    """Return the better of the best round and this one, judged by the clients that validated both.

    A round in which the clients with the hardest rows are missing would otherwise look like the best.
    """
    if not found:
        return best
    if best is not None:
        both = best.validation.keys() & found.keys()
        if both and mean_loss(found, both) >= mean_loss(best.validation, both):
            return best
    return Best(number, found, adapter)


def collect(
    federation: Federation,
    requests: Sequence[TrainRequest],
    on_reply: Callable[[TrainReply | TrainFailure, int], None],
) -> dict[tuple[str, int], TrainReply | TrainFailure]:
    """Return one reply or failure for every request; ignore duplicates and unrequested replies."""
    steps = {(r.client, r.cluster): r.steps for r in requests}
    replies: dict[tuple[str, int], TrainReply | TrainFailure] = {}
    for reply in federation.train(requests):
        key = reply.client, reply.cluster
        if key in steps and key not in replies:
            replies[key] = reply
            on_reply(reply, steps[key])
    missing = {key: TrainFailure(*key, "it did not answer") for key in steps.keys() - replies.keys()}
    return {**replies, **missing}


def combine(
    group: Sequence[tuple[TrainRequest, TrainReply | TrainFailure]],
    old: AdapterState,
    moments: AdapterState,
    config: Config,
) -> Combined:
    """Aggregate the replies of one task cluster."""
    cluster = group[0][0].cluster
    refused = {request.client: reply.reason for request, reply in group if isinstance(reply, TrainFailure)}
    transferred = [
        message.adapter for pair in group for message in pair if not isinstance(message, TrainFailure)
    ]
    num_bytes = sum(tensor.nbytes for adapter in transferred for tensor in adapter.values())
    answered = [(request, reply) for request, reply in group if isinstance(reply, TrainReply)]
    settings = config.aggregate
    reasons = refusals(
        [request for request, _ in answered],
        [reply for _, reply in answered],
        config.train.step_size,
        settings.outlier,
        noisy=bool(config.privacy.update_noise),
    )
    pairs = []
    for (request, reply), reason in zip(answered, reasons, strict=True):
        if reason is None:
            pairs.append((request, reply))
        else:
            refused[reply.client] = reason
    if not pairs:
        return Combined(old, moments, ClusterRound(cluster, None, 0, 0, 0.0, 0.0, None, refused, num_bytes))
    accepted = [reply for _, reply in pairs]
    weights = [reply.num_examples for reply in accepted]
    target, residual = aggregate(_clipped(pairs, settings), weights, settings, old)
    new, moments = server_step(old, target, moments, settings)
    result = ClusterRound(
        cluster=cluster,
        loss=_mean([reply.loss for reply in accepted], weights),
        num_examples=sum(weights),
        num_clients=len(accepted),
        drift=distance(old, new)
        / math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in old.values())),
        norm=max(distance(request.adapter, reply.adapter) for request, reply in pairs),
        residual=residual,
        refused=refused,
        num_bytes=num_bytes,
    )
    return Combined(new, moments, result)


def requests_of(
    assignments: Sequence[Assignment], adapters: Sequence[AdapterState], config: Config, number: int
) -> list[TrainRequest]:
    """Return the training requests of one round."""
    rate = cosine(number, config.train)

    def sent(client: str, adapter: AdapterState) -> AdapterState:
        rank = config.lora.ranks.get(client)
        return adapter if rank is None or rank >= rank_of(adapter) else cut(adapter, rank)

    return [
        TrainRequest(client, cluster, number, sent(client, adapters[cluster]), steps, rate)
        for client, cluster, steps in plan(
            assignments, config.train, config.seed, number, config.cluster.every
        )
    ]


def plan(
    assignments: Sequence[Assignment],
    settings: TrainSettings,
    seed: int,
    number: int,
    every: int | None = None,
) -> list[Planned]:
    """Return which client trains which adapter in a round, and for how many steps; deterministic.

    Parameters
    ----------
    every : rounds between clusterings (``cluster.every``), within which each subset has its turns.
    """
    start = 0 if every is None else number // every * every
    period = range(start, settings.rounds if every is None else min(start + every, settings.rounds))
    if not settings.takes_turns:
        period = range(number, number + 1)
    drawn = {
        i: {a.client for a in participants(assignments, settings.participation, seed, i)} for i in period
    }
    first = first_turns(assignments) if settings.takes_turns else {}
    planned: list[Planned] = []
    for assignment in assignments:
        name, subsets = assignment.client, assignment.subsets
        if name not in drawn[number]:
            continue
        sizes = tuple(s.num_examples for s in subsets)
        if settings.epochs is not None:
            trained = [n - num_validation(n, settings.validation) for n in sizes]
            steps = {i: settings.epochs * math.ceil(n / settings.step_size) for i, n in enumerate(trained)}
        elif settings.takes_turns and len(subsets) > 1:
            own = [i for i, names in drawn.items() if name in names]
            steps = turns(sizes, len(own), settings.num_steps, first[name])[own.index(number)]
        else:
            steps = dict(enumerate(share(sizes, settings.num_steps)))
        planned += [Planned(name, subsets[i].cluster, n) for i, n in sorted(steps.items())]
    return planned


@cache
def turns(sizes: tuple[int, ...], rounds: int, steps: int, first: int) -> list[dict[int, int]]:
    """Deal a client's steps to few subsets per round, so that each update goes far.

    The mean of several clients' updates goes no further than each of them went: if four clients give each of
    their two subsets ten steps, both adapters move by ten steps; if they take turns, by twenty. Each subset
    gets its share of all steps, by size, in few rounds, evenly spaced, but in at least two, since the
    learning rate falls from round to round.

    Parameters
    ----------
    sizes : rows of each subset.
    rounds : number of the client's rounds.
    steps : steps per round.
    first : the subset that begins.

    Returns
    -------
    steps by subset, for each round.
    """
    visits = [min(rounds, max(2, n)) for n in share(sizes, rounds, least=0)]
    length = [size / sum(sizes) * rounds / n for size, n in zip(sizes, visits, strict=True)]  # in rounds
    order = sorted(
        ((j + 0.5) / n, (i - first) % len(sizes), i) for i, n in enumerate(visits) for j in range(n)
    )
    queue = [i for *_, i in order]
    ends = np.cumsum([length[i] for i in queue])
    dealt: list[dict[int, float]] = [defaultdict(float) for _ in range(rounds)]
    for i, end in zip(queue, ends, strict=True):
        dealt[int(end - length[i] / 2)][i] += length[i]
    for number, now in enumerate(dealt):
        if not now:  # between the middles of two visits longer than a round
            now[queue[int(np.searchsorted(ends, number + 0.5))]] = 1.0
    return [dict(zip(now, share(list(now.values()), steps), strict=True)) for now in dealt]


def first_turns(assignments: Sequence[Assignment]) -> dict[str, int]:
    """Choose the subset that each client trains first, so that a round's clients spread over task clusters.

    Clients with the fewest subsets choose first.
    """
    taken: Counter[int] = Counter()
    first = {}
    for assignment in sorted(assignments, key=lambda a: len(a.subsets)):
        subsets = assignment.subsets
        turn = min(range(len(subsets)), key=lambda i: taken[subsets[i].cluster])
        first[assignment.client] = turn
        taken[subsets[turn].cluster] += 1
    return first


def participants(assignments: Sequence[Assignment], part: float, seed: int, number: int) -> list[Assignment]:
    """Draw the clients of a round; keep their order."""
    num = max(1, round(part * len(assignments)))
    if num == len(assignments):
        return list(assignments)
    drawn = np.random.default_rng((seed, number)).choice(len(assignments), num, replace=False)
    return [assignments[i] for i in sorted(drawn)]


def cosine(number: int, settings: TrainSettings) -> float:
    """Return a round's learning rate: cosine from ``learning_rate`` to ``learning_rate_end``."""
    progress = number / max(1, settings.rounds - 1)
    end = settings.learning_rate_end
    return end + (settings.learning_rate - end) * (1 + math.cos(math.pi * progress)) / 2


def share(sizes: Sequence[float], total: int, least: int = 1) -> list[int]:
    """Split ``total`` steps in proportion to ``sizes``, by the largest-remainder method.

    Nobody gets fewer than ``least`` steps, even if there are then more than ``total``.
    """
    exact = np.asarray(sizes) / sum(sizes) * total
    steps = np.floor(exact).astype(int)
    for i in np.argsort(steps - exact, kind="stable")[: total - steps.sum()]:
        steps[i] += 1
    for i in np.flatnonzero(steps < least):
        largest = np.argmax(steps)
        taken = max(0, min(least - steps[i], steps[largest] - least))
        steps[i], steps[largest] = least, steps[largest] - taken
    return [int(n) for n in steps]


def _mean(losses: Sequence[float | None], weights: Sequence[int]) -> float | None:
    reported = [loss for loss in losses if loss is not None]
    return float(np.average(reported, weights=weights)) if len(reported) == len(losses) else None


def _clipped(
    pairs: Sequence[tuple[TrainRequest, TrainReply]], settings: AggregateSettings
) -> list[AdapterState]:
    if settings.clip is None:
        return [reply.adapter for _, reply in pairs]
    return [clip(request.adapter, reply.adapter, settings.clip) for request, reply in pairs]
