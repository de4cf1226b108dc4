"""The federation over a network: messages to clients on other machines.

The ``Transport`` below it moves bytes to and from nodes without interpreting them. A node is identified by
its signature: a reply is accepted only if it is signed with the client's key from the roster and answers the
latest request.
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

POLL_S = 0.5  # between checks of which nodes are connected
STRANGER_S = 10.0  # before a rejected node is asked again
MAX_LABELS = 10_000  # task labels of one subset

Kind = TypeVar("Kind")
Request = TypeVar("Request", TrainRequest, ValidationRequest)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A reply, or an error in its place."""

    node: str
    body: bytes
    error: str = ""  # the transport's error message, if there is no body


OnAnswer = Callable[[str, int, str], None]
"""Called with each client that replies, its number of rows and the kind of request."""


class Transport(Protocol):
    """Moves bytes to nodes and back. Each node handles one message at a time."""

    def nodes(self) -> Collection[str]:
        """Return the nodes that are connected now."""
        ...

    def send(self, node: str, body: bytes) -> None:
        """Send a message without waiting for a reply."""
        ...

    def receive(self, timeout_s: float) -> Arrived | None:
        """Return the next reply, or None after the timeout."""
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """The server's timeouts and minimum numbers of clients."""

    start_s: float = 600.0  # for all clients of the roster to connect
    least_clients: int = 2  # minimum number of clients to start without the others
    exchange_s: float = 600.0  # for replies before the rounds
    round_s: float = 3600.0  # for the updates of a round
    absent_s: float = 30.0  # for a disconnected client to come back
    least_replies: int = 1  # minimum number of clients that send updates in a round, or the run stops


@dataclass(slots=True)
class Traffic:
    """Bytes, time and failures of one exchange."""

    down: int = 0  # bytes
    up: int = 0
    seconds: float = 0.0
    rounding: float = 0.0  # largest relative error of an adapter sent as float16
    missing: dict[str, str] = field(default_factory=dict)  # client → why it did not reply


@dataclass(slots=True)
class _Request:
    client: str
    exchange: int
    digest: str
    messages: tuple[Any, ...]
    retried: bool = False


class RemoteFederation:
    """Clients reached through a transport.

    Parameters
    ----------
    roster : client name → public key, for all clients that may take part.
    run : the run's id; a resumed run keeps it.
    hello : the plan, sent to every new node.
    say : called with each line for the user.
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
        self._greeted: dict[str, _Request] = {}  # node → the request to identify itself
        self._strangers: dict[str, tuple[float, str]] = {}  # node → when and why it was rejected
        self._reported: dict[str, str] = {}  # node → last reason reported to the user
        self._members: dict[str, Member] = {}
        self._unwilling: dict[str, str] = {}  # client → why it refuses the plan
        self._assign: Assign | None = None  # the latest, sent again to a restarted client
        self._comparisons: dict[str, Comparison] = {}
        self._last_exchange = 0
        self.traffic: list[Traffic] = []

    # Before the rounds: a client that fails is left out of the run.

    def members(self) -> list[Member]:
        """Wait until all clients of the roster are connected, or refuse the plan; return them.

        Raises
        ------
        ClientError
            If clients refuse, or are missing after ``Waiting.start_s``, but enough others are connected.
        TrainingError
            If too few clients are connected by then.
        """
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
        """Have clients with enough rows beyond every radius cluster these rows."""
        able = [name for name in self._names if self._comparisons[name].may_summarise]
        yield from self._summaries(Summarise(None if num == "auto" else num, beyond=True), able)

    def regroup(self, space: RoutingSpace, membership: Membership | None = None) -> Iterator[LocalClusters]:
        """Have every client group its rows by nearest centroid, or by ``membership``."""
        yield from self._summaries(Regroup(space, membership), self._names)

    def assign(self, space: RoutingSpace, membership: Membership | None = None) -> list[Assignment]:
        """Have every client assign its rows to the nearest task clusters, or by ``membership``."""
        self._assign = Assign(space, membership)
        if membership is None:
            num = space.num_clusters
        else:
            num = max([*_cluster_numbers(membership), membership.num - 1]) + 1
        found = list(self._all(self._assign))
        return [_checked_assignment(_only(Assignment, replies, name), name, num) for name, replies in found]

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> list[Comparison]:
        """Have every client compare its rows with task clusters that already exist."""
        asked = Compare(space, tuple(float(radius) for radius in radii))
        self._comparisons = {name: _only(Comparison, replies, name) for name, replies in self._all(asked)}
        return list(self._comparisons.values())

    def leave(self, names: Collection[str]) -> None:
        """Drop these clients from the federation."""
        self._names = [name for name in self._names if name not in names]

    # The rounds: a client that does not reply in time is left out of the round.

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train.

        Raises
        ------
        TrainingError
            If fewer clients than ``Waiting.least_replies`` sent an update.
        """
        updated: set[str] = set()
        before = len(self.traffic)
        for reply in self._summed(requests) if self._hello.secure else self._replies(requests, TrainReply):
            if isinstance(reply, TrainReply):
                updated.add(reply.client)
            yield reply
        traffic = _total(self.traffic[before:])
        number = requests[0].round + 1 if requests else 0
        half = f", float16 error {traffic.rounding:.1e}" if self._hello.half else ""
        self._say(
            f"round {number}: {traffic.down / 2**20:.2f} MiB down, {traffic.up / 2**20:.2f} MiB up, "
            f"{traffic.seconds:.1f} s{half}"
        )
        least = min(self._waiting.least_replies, len({request.client for request in requests}))
        if len(updated) < least:
            reasons = "; ".join(f"client {name}: {reason}" for name, reason in traffic.missing.items())
            raise TrainingError(
                f"round {number}: {len(updated)} clients sent an update, but {least} are needed ({reasons}); "
                "run the same command to resume after the last finished round"
            )

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have the named clients compute validation losses."""
        return self._replies(requests, ValidationReply)

    def goodbye(self, reason: str) -> None:
        """Tell every client that the run is over, without waiting for replies."""
        for name in self._names:
            if name in self._nodes:
                self._post(name, (Goodbye(reason),))

    def _summed(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        def ask(messages: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
            by_client = {name: tuple(own) for name, own in messages.items()}
            return dict(self._exchange(by_client, self._waiting.round_s))

        keys = {name: public_text(key) for name, key in self._roster.items()}
        return secure_sums(self._run, requests, keys, ask)

    def _replies(self, requests: Sequence[Request], kind: type[Kind]) -> Iterator[Kind | TrainFailure]:
        """Yield for each request the client's reply or its failure."""
        by_client: dict[str, list[Request]] = {}
        for request in requests:
            by_client.setdefault(request.client, []).append(request)
        exchange = self._exchange({n: tuple(own) for n, own in by_client.items()}, self._waiting.round_s)
        for name, replies in exchange:
            for i, request in enumerate(by_client[name]):
                reply = replies[i] if i < len(replies) else replies[-1] if replies else None
                if isinstance(reply, kind | TrainFailure) and _answers_to(reply, request):
                    if self._hello.half and isinstance(request, TrainRequest):
                        self.traffic[-1].rounding = max(self.traffic[-1].rounding, rounding(request))
                    yield reply
                elif isinstance(reply, Failed | Refused):
                    yield TrainFailure(name, request.cluster, _line(reply.reason))
                else:
                    yield TrainFailure(name, request.cluster, "its reply does not match the request")
        for name, reason in self.traffic[-1].missing.items():
            for request in by_client[name]:
                yield TrainFailure(name, request.cluster, reason)

    def _summaries(self, message: Summarise | Regroup, names: Sequence[str]) -> Iterator[LocalClusters]:
        dim = self._hello.probe.shape[1]
        if isinstance(message, Summarise) and message.beyond:
            assert self._assign is not None
            dim = self._assign.space.transform.shape[1]
        for name, replies in self._all(message, names):
            yield _checked_summary(_only(LocalClusters, replies, name), name, dim)

    def _all(self, message: Any, names: Sequence[str] | None = None) -> Iterator[tuple[str, Sequence[Any]]]:
        """Send clients the same message and yield their replies in the order of ``names``.

        Raises
        ------
        ClientError
            At the end, if clients failed.
        TrainingError
            If a client reports that the settings are at fault.
        """
        names = self._names if names is None else names
        asked = dict.fromkeys(names, (message,))
        found = dict(self._exchange(asked, self._waiting.exchange_s, again=True))
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
        self, messages: Mapping[str, tuple[Any, ...]], timeout_s: float, again: bool = False
    ) -> Iterator[tuple[str, Sequence[Any]]]:
        """Send each client its messages; yield replies as they arrive, until the timeout.

        With ``again``, a request that the transport loses is sent once more: before the rounds, a client that
        fails is left out of the whole run.
        """
        began, traffic = self._clock(), Traffic()
        self.traffic.append(traffic)
        waiting: dict[str, _Request] = {}
        unreached, lost = dict(messages), set[str]()
        while unreached or waiting:
            self._update_nodes(traffic)
            for name in [name for name in unreached if name in self._nodes]:
                waiting[name] = self._post(name, unreached.pop(name), traffic)
            waited = self._clock() - began
            if waited >= timeout_s or (not waiting and waited >= self._waiting.absent_s):
                break
            arrived = self._transport.receive(min(timeout_s - waited, POLL_S))
            if arrived is not None and not self._is_greeting_reply(arrived):
                sender = next((n for n in waiting if self._nodes.get(n) == arrived.node), None)
                if again and arrived.error and sender is not None and sender not in lost:
                    self._say(f"client {sender}: asked again after {_line(arrived.error)}")
                    lost.add(sender)
                    unreached[sender] = waiting.pop(sender).messages
                    continue
                accepted = self._opened(arrived, waiting, traffic)
                if accepted is not None:
                    name, replies = accepted
                    if any(isinstance(reply, Behind) for reply in replies) and not waiting[name].retried:
                        waiting[name] = self._retry(name, waiting[name], traffic)
                        continue
                    del waiting[name]
                    traffic.seconds = self._clock() - began
                    self._compare_rows(name, replies)
                    num = len(messages[name])  # a restarted client has also answered the plan sent again
                    yield name, replies[-num:] if len(replies) > num else replies
            for name in [name for name in waiting if name not in self._nodes]:
                traffic.missing[name] = "the connection to it was lost"
                del waiting[name]
        for name in waiting:
            traffic.missing[name] = f"it did not answer within {timeout_s:.0f} s"
        for name in unreached:
            traffic.missing[name] = "it was not connected"
        traffic.seconds = self._clock() - began
        for name, reason in traffic.missing.items():
            self._say(f"client {name}: {reason}")

    def _retry(self, name: str, request: _Request, traffic: Traffic) -> _Request:
        """Send a restarted client the plan and the task clusters, and the request again."""
        first: tuple[Any, ...] = (self._hello,)
        if self._assign is not None and not isinstance(request.messages[0], Assign):
            first = (*first, self._assign)
        self._say(f"client {name} was restarted: sending it the plan again")
        retry = self._post(name, (*first, *request.messages), traffic)
        retry.retried = True
        return retry

    def _post(self, name: str, messages: tuple[Any, ...], traffic: Traffic | None = None) -> _Request:
        return self._post_to(self._nodes[name], name, messages, traffic)

    def _post_to(
        self, node: str, name: str, messages: tuple[Any, ...], traffic: Traffic | None = None
    ) -> _Request:
        # Greater than any earlier number, also of an interrupted process that this run resumes.
        self._last_exchange = max(self._last_exchange + 1, time.time_ns() // 1000)
        body = seal(Envelope(self._run, name, self._last_exchange, messages), self._hello.half)
        if len(body) > MAX_BYTES:
            raise TrainingError(
                f"a message to client {name} has {len(body)} bytes, but at most {MAX_BYTES} are allowed; "
                "lower lora.rank or set float16 = true"
            )
        if traffic is not None:
            traffic.down += len(body)
        self._transport.send(node, body)
        return _Request(name, self._last_exchange, hashlib.sha256(body).hexdigest(), messages)

    def _opened(
        self, arrived: Arrived, waiting: Mapping[str, _Request], traffic: Traffic
    ) -> tuple[str, Sequence[Any]] | None:
        """Return the client and its replies, or None if the message is not an expected reply."""
        by_node = {self._nodes[name]: name for name in waiting if name in self._nodes}
        expected = by_node.get(arrived.node)
        try:
            if arrived.error:
                raise WireError(arrived.error)
            name, envelope = self._verified(arrived.body)
            if name not in waiting or name != expected:
                raise WireError(f"client {name}: a reply that was not expected")
            if envelope.exchange != waiting[name].exchange or envelope.asked != waiting[name].digest:
                self._say(f"client {name}: ignored a reply that is late or answers another request")
                return None
        except WireError as error:
            self._say(f"node {arrived.node}: ignored: {error}")
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
            raise WireError(f"client {name}: a reply for another run or client")
        return name, envelope

    # Connected nodes and their clients.

    def _gather(self, missing: Sequence[str]) -> None:
        began, num_reported = self._clock(), -1
        while missing:
            self._update_nodes(Traffic())
            missing = [name for name in self._names if name not in self._members]
            if len(missing) != num_reported and missing:
                num_reported = len(missing)
                present = [name for name in self._names if name in self._members]
                names = f" ({', '.join(present)})" if present else ""
                self._say(f"waiting for clients: {len(present)} of {len(self._names)} connected{names}")
            waited = self._clock() - began
            num = len(self._names) - len(missing)
            decided = self._unwilling.keys() >= set(missing) and num >= self._waiting.least_clients
            if missing and (decided or waited > self._waiting.start_s):
                absent = f"it did not connect within {waited:.0f} s"
                reasons = {name: self._unwilling.get(name, absent) for name in missing}
                if num < self._waiting.least_clients:
                    raise TrainingError(
                        f"{num} clients connected within {waited:.0f} s, but "
                        f"{self._waiting.least_clients} are needed ("
                        + "; ".join(f"client {name}: {reason}" for name, reason in reasons.items())
                        + "); run the same command to wait again"
                    )
                raise ClientError(reasons)
            if missing and (arrived := self._transport.receive(POLL_S)) is not None:
                self._is_greeting_reply(arrived)

    def _update_nodes(self, traffic: Traffic) -> None:
        """Update which nodes are connected; ask new nodes to identify themselves."""
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

    def _is_greeting_reply(self, arrived: Arrived) -> bool:
        """Handle the reply of a node that was asked to identify itself; return whether it was one."""
        request = self._greeted.pop(arrived.node, None)
        if request is not None:
            self._identify(arrived, request)
        return request is not None

    def _identify(self, arrived: Arrived, request: _Request) -> None:
        try:
            if arrived.error:
                raise WireError(arrived.error)
            name, envelope = self._verified(arrived.body)
            if (envelope.exchange, envelope.asked) != (request.exchange, request.digest):
                raise WireError(f"client {name}: a replay: its reply answers another request")
            member = envelope.messages[0] if envelope.messages else None
            if isinstance(member, Failed | Refused):
                self._unwilling[name] = _line(member.reason)
                raise WireError(f"client {name}: {_line(member.reason)}")
            if not isinstance(member, Member) or member.client != name:
                raise WireError(f"client {name}: it did not identify itself")
        except WireError as error:
            self._reject(arrived.node, str(error))
            return
        if name in self._members and name in self._names:
            self._say(f"client {name} is back")
        elif name not in self._names:
            self._say(f"client {name} is too late for this run; add it to the bundle with fedrouter join")
        self._nodes[name] = arrived.node
        self._members.setdefault(name, member)
        self._unwilling.pop(name, None)

    def _reject(self, node: str, reason: str) -> None:
        self._strangers[node] = self._clock(), reason
        if self._reported.get(node) != reason:
            self._reported[node] = reason
            self._say(f"node {node} rejected: {reason}")

    def _compare_rows(self, name: str, replies: Sequence[Any]) -> None:
        """Report a restarted client whose rows have changed."""
        for reply in replies:
            if isinstance(reply, Member) and reply.digest != self._members[name].digest:
                self._say(f"client {name} has other rows than at the start; its task clusters do not change")


def _total(exchanges: Sequence[Traffic]) -> Traffic:
    total = Traffic()
    for traffic in exchanges:
        total.down, total.up = total.down + traffic.down, total.up + traffic.up
        total.seconds += traffic.seconds
        total.rounding = max(total.rounding, traffic.rounding)
        total.missing |= traffic.missing
    return total


def _line(text: str) -> str:
    """Return text from another machine as one printable line."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def _only(kind: type[Kind], replies: Sequence[Any], name: str) -> Kind:
    """Return the single reply, which must be a ``kind`` from this client.

    Raises
    ------
    ClientError
        If it is not.
    """
    if len(replies) != 1 or not isinstance(replies[0], kind) or getattr(replies[0], "client", name) != name:
        raise ClientError({name: f"its reply is not a {kind.__name__}"})
    return replies[0]


def _answers_to(reply: Any, request: TrainRequest | ValidationRequest) -> bool:
    return (reply.client, reply.cluster) == (request.client, request.cluster)


def _cluster_numbers(membership: Membership) -> list[int]:
    return [*(k for own in membership.clients.values() for k in own), *membership.tasks.values()]


def _checked_summary(found: LocalClusters, name: str, dim: int) -> LocalClusters:
    num = found.counts.size
    shapes = (num,), (num, dim), (dim, dim)
    arrays = found.counts, found.centroids, found.scatter
    if tuple(array.shape for array in arrays) != shapes or not num:
        raise ClientError({name: "its local clusters have shapes that do not match the embedder"})
    if not all(np.isfinite(array).all() for array in arrays) or (found.counts < 0).any():
        raise ClientError({name: "its local clusters contain impossible numbers"})
    return found


def _checked_assignment(found: Assignment, name: str, num_clusters: int) -> Assignment:
    clusters = [subset.cluster for subset in found.subsets]
    if len(set(clusters)) < len(clusters) or not all(0 <= k < num_clusters for k in clusters):
        raise ClientError({name: "it assigned rows to unknown or repeated task clusters"})
    for subset in found.subsets:
        distances = subset.distances
        if distances.shape != (101,) or not np.isfinite(distances).all() or subset.num_examples < 1:
            raise ClientError({name: "its description of a subset contains impossible numbers"})
        if len(subset.task_counts) > MAX_LABELS:
            raise ClientError({name: f"it reported more than {MAX_LABELS} task labels for a subset"})
    return found
