"""The federation over a wire: clients on other machines, asked and answered in bytes.

The engine below is a ``Transport``: it moves bytes to and from nodes, and knows nothing of what they mean.
Who a node is, its own signature says: a reply counts if it is signed with the key that the roster holds for
the name, and answers what was asked just now.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from fedrouter.config import Count
from fedrouter.errors import ClientError, TrainingError, WireError
from fedrouter.train.server.summing import secure_sums
from fedrouter.train.wire.format import MAX_BYTES
from fedrouter.train.wire.keys import PublicKey, claimed, public_text, verify
from fedrouter.train.wire.messages import (
    REPLIES,
    Assign,
    Behind,
    Compare,
    Envelope,
    Failed,
    Goodbye,
    Hello,
    ReadAgain,
    Refused,
    Regroup,
    Summarise,
    rounding,
    seal,
    unseal,
)
from fedrouter.types import (
    Assignment,
    Comparison,
    LocalClusters,
    Member,
    Membership,
    Reread,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

PAUSE_S = 0.5  # between looks at who is there
STRANGER_S = 10.0  # until a node that takes no part is asked again
MAX_LABELS = 10_000  # task labels of one subset

Kind = TypeVar("Kind")
Request = TypeVar("Request", TrainRequest, ValidationRequest)


@dataclass(frozen=True, slots=True)
class Arrived:
    """What came back from a node."""

    node: str
    body: bytes
    error: str = ""  # instead of a body: what the engine says went wrong


OnAnswer = Callable[[str, int, str], None]
"""Gets a client that has answered, its rows and what it was asked."""


class Transport(Protocol):
    """Moves bytes to nodes and back. Each node answers one message at a time."""

    def nodes(self) -> Collection[str]:
        """Return the nodes that can be reached now."""
        ...

    def send(self, node: str, body: bytes) -> None:
        """Send a message; it does not wait."""
        ...

    def receive(self, timeout_s: float) -> Arrived | None:
        """Return the next reply, or None where none came in time."""
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """How long the server waits, and for how many."""

    start_s: float = 600.0  # for the clients of the roster to come
    least_clients: int = 2  # that start without the others
    exchange_s: float = 600.0  # for an answer before the rounds
    round_s: float = 3600.0  # for a round's updates
    absent_s: float = 30.0  # for a client whose machine cannot be reached to come back
    least_replies: int = 1  # clients of a round whose updates came, or the run stops


@dataclass(slots=True)
class Traffic:
    """What one exchange cost."""

    down: int = 0  # bytes
    up: int = 0
    seconds: float = 0.0
    rounding: float = 0.0  # largest relative error of an adapter that travelled as float16
    missing: dict[str, str] = field(default_factory=dict)  # client → why it did not answer


@dataclass(slots=True)
class _Asked:
    client: str
    exchange: int
    digest: str
    messages: tuple[Any, ...]
    retried: bool = False


class RemoteFederation:
    """Clients that a transport reaches.

    Parameters
    ----------
    roster : public key by client name: who may take part.
    run : the run's id; it stays the same when a run is resumed.
    hello : the plan, sent to every node that is new.
    say : gets a line on everything that a person should see.
    """

    def __init__(
        self,
        transport: Transport,
        roster: Mapping[str, PublicKey],
        run: str,
        hello: Hello,
        waiting: Waiting,
        say: Callable[[str], None],
        on_answer: OnAnswer = lambda _client, _rows, _what: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._on_answer = on_answer
        self._transport, self._roster, self._run, self._hello = transport, roster, run, hello
        self._waiting, self._say = waiting, say
        self._names = sorted(roster)
        self._nodes: dict[str, str] = {}  # client → node
        self._greeted: dict[str, _Asked] = {}  # nodes that have been asked who they are
        self._strangers: dict[str, tuple[float, str]] = {}  # node → when and why it was sent away
        self._said: dict[str, str] = {}  # node → what was last said of it
        self._members: dict[str, Member] = {}
        self._assign: Assign | None = None  # what a client that was restarted is told first
        self._comparisons: dict[str, Comparison] = {}
        self._last = 0
        self.traffic: list[Traffic] = []

    # Before the rounds: all answer, or the run goes on without those that do not.

    def members(self) -> list[Member]:
        """Wait until the clients of the roster are there, or enough of them and long enough."""
        if missing := [name for name in self._names if name not in self._members]:
            self._gather(missing)
        return [self._members[name] for name in self._names]

    def reread(self) -> list[Reread]:
        """Have every client read its rows again."""
        found = []
        for name, replies in self._all(ReadAgain()):
            found.append(_only(Reread, replies[:1], name))
            self._members[name] = _only(Member, replies[1:], name)
        return found

    def summarise(self, num: Count) -> Iterator[LocalClusters]:
        """Have every client cluster its own rows."""
        yield from self._summaries(Summarise(None if num == "auto" else num), self._names)

    def summarise_beyond(self, num: Count) -> Iterator[LocalClusters]:
        """Have clients cluster their rows beyond every radius, where these are enough."""
        able = [name for name in self._names if self._comparisons[name].may_summarise]
        yield from self._summaries(Summarise(None if num == "auto" else num, beyond=True), able)

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> Iterator[LocalClusters]:
        """Have every client give its rows to the nearest centroid, or where it is told."""
        yield from self._summaries(Regroup(space, told), self._names)

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        """Tell every client the task clusters."""
        self._assign = Assign(space, told)
        most = space.num_clusters if told is None else max([*_numbers(told), told.num - 1]) + 1
        answers = list(self._all(self._assign))
        return [
            _checked_assignment(_only(Assignment, replies, name), name, most) for name, replies in answers
        ]

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> list[Comparison]:
        """Have every client compare its rows with task clusters that already exist."""
        asked = Compare(space, tuple(float(radius) for radius in radii))
        self._comparisons = {name: _only(Comparison, replies, name) for name, replies in self._all(asked)}
        return list(self._comparisons.values())

    def leave(self, names: Collection[str]) -> None:
        """Go on without these clients."""
        self._names = [name for name in self._names if name not in names]

    # The rounds: who does not answer in time is left out of the round.

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train.

        Raises
        ------
        TrainingError
            If fewer clients than ``Waiting.least_replies`` sent an update.
        """
        came: set[str] = set()
        before = len(self.traffic)
        for answer in self._summed(requests) if self._hello.secure else self._answers(requests, TrainReply):
            if isinstance(answer, TrainReply):
                came.add(answer.client)
            yield answer
        traffic = _together(self.traffic[before:])
        number = requests[0].round + 1 if requests else 0
        half = f", float16 costs {traffic.rounding:.1e}" if self._hello.half else ""
        self._say(
            f"round {number}: {traffic.down / 2**20:.2f} MiB down, {traffic.up / 2**20:.2f} MiB up, "
            f"{traffic.seconds:.1f} s{half}"
        )
        least = min(self._waiting.least_replies, len({request.client for request in requests}))
        if len(came) < least:
            reasons = "; ".join(f"client {name}: {reason}" for name, reason in traffic.missing.items())
            raise TrainingError(
                f"round {number}: {len(came)} clients sent an update, and it takes {least} ({reasons}); "
                "the same command goes on from the last finished round"
            )

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have the named clients judge adapters."""
        return self._answers(requests, ValidationReply)

    def goodbye(self, reason: str) -> None:
        """Tell every client that the run is over; nobody waits for an answer."""
        for name in self._names:
            if name in self._nodes:
                self._post(name, (Goodbye(reason),))

    def _summed(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        def ask(asked: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
            messages = {name: tuple(own) for name, own in asked.items()}
            return dict(self._exchange(messages, self._waiting.round_s))

        keys = {name: public_text(key) for name, key in self._roster.items()}
        return secure_sums(self._run, requests, keys, ask)

    def _answers(self, requests: Sequence[Request], kind: type[Kind]) -> Iterator[Kind | TrainFailure]:
        """Yield an answer to each request: what the client sent, or that it did not."""
        asked: dict[str, list[Request]] = {}
        for request in requests:
            asked.setdefault(request.client, []).append(request)
        exchange = self._exchange({name: tuple(own) for name, own in asked.items()}, self._waiting.round_s)
        for name, replies in exchange:
            for i, request in enumerate(asked[name]):
                reply = replies[i] if i < len(replies) else replies[-1] if replies else None
                if isinstance(reply, kind | TrainFailure) and _answers_to(reply, request):
                    if self._hello.half and isinstance(request, TrainRequest):
                        self.traffic[-1].rounding = max(self.traffic[-1].rounding, rounding(request))
                    yield reply
                elif isinstance(reply, Failed | Refused):
                    yield TrainFailure(name, request.cluster, _line(reply.reason))
                else:
                    yield TrainFailure(name, request.cluster, "it sent something else than was asked for")
        for name, reason in self.traffic[-1].missing.items():
            for request in asked[name]:
                yield TrainFailure(name, request.cluster, reason)

    def _summaries(self, message: Summarise | Regroup, names: Sequence[str]) -> Iterator[LocalClusters]:
        dim = self._hello.probe.shape[1]
        if isinstance(message, Summarise) and message.beyond:
            assert self._assign is not None
            dim = self._assign.space.transform.shape[1]
        for name, replies in self._all(message, names):
            yield _checked_summary(_only(LocalClusters, replies, name), name, dim)

    def _all(self, message: Any, names: Sequence[str] | None = None) -> Iterator[tuple[str, Sequence[Any]]]:
        """Ask clients the same, and yield their replies in the order of their names.

        Raises
        ------
        ClientError
            At the end, if some could not answer.
        TrainingError
            If the settings are to blame.
        """
        names = self._names if names is None else names
        found = dict(self._exchange(dict.fromkeys(names, (message,)), self._waiting.exchange_s))
        failed = dict(self.traffic[-1].missing)
        for name in names:
            replies = found.get(name, ())
            for reply in replies:
                if isinstance(reply, Failed | Refused):
                    if isinstance(reply, Failed) and reply.settings:
                        raise TrainingError(f"client {name}: {_line(reply.reason)}")
                    failed[name] = _line(reply.reason)
            if name not in failed:
                try:
                    yield name, replies
                except WireError as error:
                    failed[name] = str(error)
        if failed:
            raise ClientError(failed)

    def _exchange(
        self, asked: Mapping[str, tuple[Any, ...]], patience_s: float
    ) -> Iterator[tuple[str, Sequence[Any]]]:
        """Send each client its messages; yield replies as they come, for so long as we are patient."""
        began, traffic = self._clock(), Traffic()
        self.traffic.append(traffic)
        waiting: dict[str, _Asked] = {}
        unreached = dict(asked)
        while unreached or waiting:
            self._look(traffic)
            for name in [name for name in unreached if name in self._nodes]:
                waiting[name] = self._post(name, unreached.pop(name), traffic)
            waited = self._clock() - began
            if waited >= patience_s or (not waiting and waited >= self._waiting.absent_s):
                break
            arrived = self._transport.receive(min(patience_s - waited, PAUSE_S))
            if arrived is not None and not self._greets(arrived):
                answer = self._opened(arrived, waiting, traffic)
                if answer is not None:
                    name, replies = answer
                    if any(isinstance(reply, Behind) for reply in replies) and not waiting[name].retried:
                        waiting[name] = self._again(name, waiting[name], traffic)
                        continue
                    del waiting[name]
                    traffic.seconds = self._clock() - began
                    self._compare_rows(name, replies)
                    yield name, replies[-len(asked[name]) :] if len(replies) > len(asked[name]) else replies
            for name in [name for name in waiting if name not in self._nodes]:
                traffic.missing[name] = "its machine could not be reached any more"
                del waiting[name]
        for name in waiting:
            traffic.missing[name] = f"it did not answer within {patience_s:.0f} s"
        for name in unreached:
            traffic.missing[name] = "it was not there"
        traffic.seconds = self._clock() - began
        for name, reason in traffic.missing.items():
            self._say(f"client {name}: {reason}")

    def _again(self, name: str, asked: _Asked, traffic: Traffic) -> _Asked:
        """Bring a client that was restarted up to date, and ask once more."""
        first: tuple[Any, ...] = (self._hello,)
        if self._assign is not None and not isinstance(asked.messages[0], Assign):
            first = (*first, self._assign)
        self._say(f"client {name} was restarted: it is told the plan again")
        posted = self._post(name, (*first, *asked.messages), traffic)
        posted.retried = True
        return posted

    def _post(self, name: str, messages: tuple[Any, ...], traffic: Traffic | None = None) -> _Asked:
        return self._post_to(self._nodes[name], name, messages, traffic)

    def _post_to(
        self, node: str, name: str, messages: tuple[Any, ...], traffic: Traffic | None = None
    ) -> _Asked:
        # Later than all before, in this process and in those before it that a resumed run follows.
        self._last = max(self._last + 1, time.time_ns() // 1000)
        body = seal(Envelope(self._run, name, self._last, messages), self._hello.half)
        if len(body) > MAX_BYTES:
            raise TrainingError(f"a message of {len(body)} bytes to client {name}; at most {MAX_BYTES}")
        if traffic is not None:
            traffic.down += len(body)
        self._transport.send(node, body)
        return _Asked(name, self._last, hashlib.sha256(body).hexdigest(), messages)

    def _opened(
        self, arrived: Arrived, waiting: Mapping[str, _Asked], traffic: Traffic
    ) -> tuple[str, Sequence[Any]] | None:
        """Return whose reply this is and what it holds; None: nobody's that is waited for."""
        by_node = {self._nodes[name]: name for name in waiting if name in self._nodes}
        expected = by_node.get(arrived.node)
        try:
            if arrived.error:
                raise WireError(arrived.error)
            name, envelope = self._verified(arrived.body)
            if name not in waiting or name != expected:
                raise WireError(f"client {name}: a reply that nobody waits for")
            if envelope.exchange != waiting[name].exchange or envelope.asked != waiting[name].digest:
                self._say(f"client {name}: a reply to another question, or a late one; refused")
                return None
        except WireError as error:
            self._say(f"node {arrived.node}: refused: {error}")
            if expected is None or not arrived.error:
                return None
            return expected, (Failed(_line(arrived.error)),)
        traffic.up += len(arrived.body)
        last = waiting[name].messages[-1]
        self._on_answer(name, self._members[name].num_rows, type(last).__name__)
        return name, envelope.messages

    def _verified(self, body: bytes) -> tuple[str, Envelope]:
        name, signature, inner = claimed(body)
        if name not in self._roster:
            raise WireError(f"client {name!r} is not in the roster")
        verify(self._roster[name], name, signature, inner)
        envelope = unseal(inner, REPLIES, MAX_BYTES)
        if envelope.run != self._run or envelope.client != name:
            raise WireError(f"client {name}: a reply of another run or name")
        return name, envelope

    # Who is there.

    def _gather(self, missing: Sequence[str]) -> None:
        began, told = self._clock(), -1
        while missing:
            self._look(Traffic())
            missing = [name for name in self._names if name not in self._members]
            if len(missing) != told and missing:
                told = len(missing)
                here = ", ".join(name for name in self._names if name in self._members) or "nobody"
                self._say(f"waiting for clients: {here} of {len(self._names)} there")
            waited = self._clock() - began
            if missing and waited > self._waiting.start_s:
                if len(self._names) - len(missing) < self._waiting.least_clients:
                    num = len(self._names) - len(missing)
                    raise TrainingError(
                        f"{num} clients came within {waited:.0f} s, and it takes "
                        f"{self._waiting.least_clients}: {', '.join(missing)} did not; "
                        "the same command waits again"
                    )
                raise ClientError(dict.fromkeys(missing, f"it did not come within {waited:.0f} s"))
            if missing and (arrived := self._transport.receive(PAUSE_S)) is not None:
                self._greets(arrived)

    def _look(self, traffic: Traffic) -> None:
        """See who is there; ask new nodes who they are."""
        reachable = set(self._transport.nodes())
        for name in [name for name, node in self._nodes.items() if node not in reachable]:
            del self._nodes[name]
        for known in (self._greeted, self._strangers):
            for node in [node for node in known if node not in reachable]:
                known.pop(node)
        now = self._clock()
        for node in [node for node, (when, _) in self._strangers.items() if now - when > STRANGER_S]:
            del self._strangers[node]
        for node in sorted(
            reachable - set(self._nodes.values()) - self._greeted.keys() - self._strangers.keys()
        ):
            self._greeted[node] = self._post_to(node, "", (self._hello,), traffic)

    def _greets(self, arrived: Arrived) -> bool:
        """Take the reply of a node that was asked who it is; False: it was not."""
        asked = self._greeted.pop(arrived.node, None)
        if asked is not None:
            self._greet(arrived, asked)
        return asked is not None

    def _greet(self, arrived: Arrived, asked: _Asked) -> None:
        try:
            if arrived.error:
                raise WireError(arrived.error)
            name, envelope = self._verified(arrived.body)
            if (envelope.exchange, envelope.asked) != (asked.exchange, asked.digest):
                raise WireError(f"client {name}: a reply to another question: a replay")
            member = envelope.messages[0] if envelope.messages else None
            if isinstance(member, Failed | Refused):
                raise WireError(f"client {name}: {_line(member.reason)}")
            if not isinstance(member, Member) or member.client != name:
                raise WireError(f"client {name}: it does not say who it is")
        except WireError as error:
            self._strange(arrived.node, str(error))
            return
        if name in self._members and name in self._names:
            self._say(f"client {name} is back")
        elif name not in self._names:
            self._say(f"client {name} comes too late for this run; fedrouter join adds it to the bundle")
        self._nodes[name] = arrived.node
        self._members.setdefault(name, member)

    def _strange(self, node: str, why: str) -> None:
        self._strangers[node] = self._clock(), why
        if self._said.get(node) != why:
            self._said[node] = why
            self._say(f"node {node} takes no part: {why}")

    def _compare_rows(self, name: str, replies: Sequence[Any]) -> None:
        """Say that a client which was restarted holds other rows than before."""
        for reply in replies:
            if isinstance(reply, Member) and reply.digest != self._members[name].digest:
                self._say(f"client {name} holds other rows than at the start; its task clusters stay")


def _together(exchanges: Sequence[Traffic]) -> Traffic:
    total = Traffic()
    for one in exchanges:
        total.down, total.up = total.down + one.down, total.up + one.up
        total.seconds += one.seconds
        total.rounding = max(total.rounding, one.rounding)
        total.missing |= one.missing
    return total


def _line(text: str) -> str:
    """Return what another machine says as one printable line."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def _only(kind: type[Kind], replies: Sequence[Any], name: str) -> Kind:
    """Return the one reply of a kind.

    Raises
    ------
    ClientError
        If there is none, or another's.
    """
    if len(replies) != 1 or not isinstance(replies[0], kind) or getattr(replies[0], "client", name) != name:
        raise ClientError({name: f"it sent something else than a {kind.__name__}"})
    return replies[0]


def _answers_to(reply: Any, request: TrainRequest | ValidationRequest) -> bool:
    return (reply.client, reply.cluster) == (request.client, request.cluster)


def _numbers(told: Membership) -> list[int]:
    return [*(k for own in told.clients.values() for k in own), *told.tasks.values()]


def _checked_summary(found: LocalClusters, name: str, dim: int) -> LocalClusters:
    num = found.counts.size
    shapes = (num,), (num, dim), (dim, dim)
    arrays = found.counts, found.centroids, found.scatter
    if tuple(array.shape for array in arrays) != shapes or not num:
        raise ClientError({name: "its local clusters have other shapes than the embedder's"})
    if not all(np.isfinite(array).all() for array in arrays) or (found.counts < 0).any():
        raise ClientError({name: "its local clusters hold numbers that no rows have"})
    return found


def _checked_assignment(found: Assignment, name: str, most: int) -> Assignment:
    clusters = [subset.cluster for subset in found.subsets]
    if len(set(clusters)) < len(clusters) or not all(0 <= k < most for k in clusters):
        raise ClientError({name: "it assigned rows to task clusters that there are not"})
    for subset in found.subsets:
        distances = subset.distances
        if distances.shape != (101,) or not np.isfinite(distances).all() or subset.num_examples < 1:
            raise ClientError({name: "it described a subset by numbers that no rows have"})
        if len(subset.task_counts) > MAX_LABELS:
            raise ClientError({name: "it told of more task labels than are taken"})
    return found
