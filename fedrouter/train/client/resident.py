"""A client on its own machine, which answers requests in bytes with signed replies; models stay loaded."""

import hashlib
import json
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from fedrouter.config import Config
from fedrouter.errors import ClientError, DataError, FedRouterError, WireError
from fedrouter.files import read_map, read_secret, write_atomically
from fedrouter.layout import number_of, print_line
from fedrouter.models import resolve_base
from fedrouter.train.client.audit import Audit
from fedrouter.train.client.client import reason_of
from fedrouter.train.client.site import Site, against_plan, against_request, plan_of
from fedrouter.train.client.summing import Summing
from fedrouter.train.federation import Federation
from fedrouter.train.wire.format import MAX_BYTES
from fedrouter.train.wire.keys import load_private, sign
from fedrouter.train.wire.messages import (
    REQUESTS,
    Assign,
    Behind,
    Compare,
    Done,
    Envelope,
    Failed,
    Goodbye,
    Hello,
    ReadAgain,
    Refused,
    Regroup,
    SumKeys,
    Summarise,
    SumOpen,
    SumShares,
    SumTrain,
    seal,
    unseal,
)
from fedrouter.types import TrainFailure, TrainReply, TrainRequest, ValidationRequest

PROBE_TOLERANCE = 0.02  # maximum relative difference between this site's probe vectors and the server's

Opened = Callable[[Config, bytes], tuple[Federation, str, Any]]
"""(plan, site's secret) → (federation with this client only, base's fingerprint, probe vectors)."""


class Resident:
    """Answers a server's messages, one at a time.

    Parameters
    ----------
    opened : loads the base model, the embedder and the rows for a plan.
    """

    def __init__(self, site: Site, opened: Opened, console: Console):
        self._site, self._open_client, self._console = site, opened, console
        self._name, self._policy = site.settings.name, site.settings.policy
        self._key = load_private(site.key)
        self._secret = _secret(site)
        self._audit = Audit(site.audit)
        self._last_exchanges_file = site.directory / "exchanges.json"
        self._last_exchanges = read_map(self._last_exchanges_file, int)
        self._lock = threading.Lock()
        self._hello: Hello | None = None
        self._federation: Federation | None = None
        self._summing: Summing | None = None
        self._assigned, self._run = False, ""
        self._told: set[str] = set()  # reasons that the operator was told in this run

    def answer(self, body: bytes) -> bytes:
        """Return the signed reply to a request; errors are replies too."""
        with self._lock:
            digest = hashlib.sha256(body).hexdigest()
            try:
                envelope = unseal(body, REQUESTS, MAX_BYTES)
            except WireError as error:
                self._audit.write("in", ["unreadable"], body, "")
                return self._seal(Envelope("", self._name, 0, (Refused(str(error)),), digest))
            asked = f"{envelope.run}/{envelope.exchange}"
            kinds = [type(message).__name__ for message in envelope.messages]
            self._audit.write("in", kinds, body, asked)
            refused = self._refusal(envelope)
            replies = [Refused(refused)] if refused else list(self._replies(envelope))
            return self._seal(replace(envelope, client=self._name, messages=tuple(replies), asked=digest))

    def _seal(self, envelope: Envelope) -> bytes:
        half = self._hello is not None and self._hello.half
        signed = sign(self._key, self._name, seal(envelope, half))
        kinds = [type(message).__name__ for message in envelope.messages]
        denials = [m for m in envelope.messages if isinstance(m, Refused | Failed | TrainFailure)]
        reason = "; ".join(denial.reason for denial in denials)
        self._audit.write("out", kinds, signed, f"{envelope.run}/{envelope.exchange}", reason)
        for denial in denials:
            if denial.reason not in self._told:  # the server may repeat its request in every round
                self._told.add(denial.reason)
                self._say(f"{'refused' if isinstance(denial, Refused) else 'failed'}: {denial.reason}")
        return signed

    def _refusal(self, envelope: Envelope) -> str | None:
        """Return why a whole envelope is refused, or None after recording its number as used."""
        if envelope.client not in ("", self._name):
            return f"this is client {self._name}, not {envelope.client[:80]!r}"
        if envelope.exchange <= self._last_exchanges.get(envelope.run, 0):
            return f"exchange {envelope.exchange} is not newer than the last one: a replay"
        if self._audit.num_requests > self._policy.max_requests_per_day:
            return (
                "its policy refuses more than "
                f"{number_of(self._policy.max_requests_per_day, 'request')} a day"
            )
        if self._audit.num_bytes > self._policy.max_mib_per_day * 2**20:
            return f"its policy refuses to send more than {self._policy.max_mib_per_day} MiB a day"
        self._last_exchanges[envelope.run] = envelope.exchange
        write_atomically(self._last_exchanges_file, json.dumps(self._last_exchanges))
        return None

    def _replies(self, envelope: Envelope) -> Iterator[Any]:
        """Yield one reply per message, up to the first one that fails."""
        for message in envelope.messages:
            reason = against_request(self._policy, message)
            if reason:
                yield Refused(reason)
                return
            known = self._federation is not None and self._run == envelope.run
            no_plan = not known and not isinstance(message, Hello | Goodbye)
            needs_rows = isinstance(message, TrainRequest | SumTrain | ValidationRequest)
            if no_plan or (needs_rows and not self._assigned):
                yield Behind()
                return
            if isinstance(message, TrainRequest) and self._summing is not None:
                yield Refused("the plan is to sum updates, but this requests a single one")
                return
            try:
                yield from self._handle(message, envelope.run)
            except WireError as error:
                yield Refused(str(error))
            except ClientError as error:
                yield Failed(error.reasons.get(self._name, "it failed; its own log says more"))
                return
            except DataError as error:  # its text may quote rows, so it stays on the site
                self._say(f"error: {error}")
                yield Failed(reason_of(self._name, error))
                return
            except FedRouterError as error:
                yield Failed(str(error), settings=True)
                return
            except Exception as error:
                yield Failed(reason_of(self._name, error))
                return

    def _handle(self, message: Any, run: str) -> Iterator[Any]:
        match message:
            case Hello():
                yield self._begin(message, run)
                return
            case Goodbye():
                self._say(f"the server says: {message.reason}")
                yield Done()
                return
        federation = self._federation
        assert federation is not None, "the caller checks this"
        match message:
            case Summarise(num=num, beyond=beyond):
                ask = federation.summarise_beyond if beyond else federation.summarise
                yield from ask("auto" if num is None else num)
            case Regroup(space=space, told=membership):
                yield from federation.regroup(space, membership)
            case Assign(space=space, told=membership):
                (assignment,) = federation.assign(space, membership)
                self._assigned = True
                if not self._policy.labels:  # rows should have no labels by now; this is a second safeguard
                    unlabelled = tuple(replace(s, task_counts={}) for s in assignment.subsets)
                    assignment = replace(assignment, subsets=unlabelled)
                yield assignment
            case Compare(space=space, radii=radii):
                yield from federation.compare(space, radii)
            case ReadAgain():
                (reread,) = federation.reread()
                if reread.problem:
                    self._say(f"keeps the rows that it had: {reread.problem}")
                    reread = replace(reread, problem="its rows could not be read; its own log says more")
                yield reread
                yield from federation.members()
            case TrainRequest():
                self._say(
                    f"round {message.round + 1}: trains task cluster {message.cluster}, "
                    f"{number_of(message.steps, 'step')}"
                )
                yield from map(_with_finite_loss, federation.train([message]))
            case ValidationRequest():
                yield from federation.validate([message])
            case SumKeys() | SumShares() | SumTrain() | SumOpen():
                yield self._summed(message, federation)

    def _summed(self, message: Any, federation: Federation) -> Any:
        """Handle a message of the secure sum."""
        if self._summing is None:
            return Refused("the plan does not include secure sums")
        match message:
            case SumKeys():
                return self._summing.keys(message)
            case SumShares():
                return self._summing.shares(message)
            case SumOpen():
                return self._summing.opened(message)
        request = message.request
        self._summing.take(request, message.shares)
        self._say(f"round {request.round + 1}: trains task cluster {request.cluster} for a secure sum")
        (reply,) = map(_with_finite_loss, federation.train([request]))
        return self._summing.masked(request, reply) if isinstance(reply, TrainReply) else reply

    def _begin(self, hello: Hello, run: str) -> Any:
        """Accept a plan if the policy allows it, and load its models and rows unless already loaded."""
        if self._federation is not None and self._run == run and _equal(self._hello, hello):
            (member,) = self._federation.members()
            return member
        if self._run != run:
            self._told.clear()
        self._federation, self._assigned, self._run = None, False, run
        config = plan_of(hello, self._site)
        if reason := against_plan(self._policy, config, hello.secure):
            return Refused(reason)
        resolve_base(config.base.model, config.base.revision)
        federation, fingerprint, probe = self._open_client(config, self._secret)
        if fingerprint != hello.base:
            return Failed("its base does not match the server's: config or tokenizer differ")
        if probe.shape != hello.probe.shape:
            return Failed(
                f"its embedder gives vectors of {probe.shape[1]} dimensions, the server's "
                f"{hello.probe.shape[1]}"
            )
        error = float(np.linalg.norm(probe - hello.probe) / np.linalg.norm(hello.probe))
        if not error <= PROBE_TOLERANCE:
            return Failed(f"its embedder does not match the server's: vectors differ by {error:.1%}")
        self._hello, self._federation = hello, federation
        pins = self._site.directory / "peers.json"
        least = self._policy.min_sum
        self._summing = Summing(run, self._name, self._key, pins, least) if hello.secure else None
        (member,) = federation.members()
        self._say(
            f"takes part with {number_of(member.num_rows, 'row')}: method {config.method}, "
            f"{number_of(config.train.rounds, 'round')}"
        )
        return member

    def _say(self, line: str) -> None:
        print_line(self._console, f"client {self._name}: {line}")


def _with_finite_loss(reply: Any) -> Any:
    """Replace a reply whose loss is not finite by a failure, because messages hold only finite numbers."""
    if isinstance(reply, TrainReply) and reply.loss is not None and not math.isfinite(reply.loss):
        return TrainFailure(reply.client, reply.cluster, "its loss is not finite; lower train.learning_rate")
    return reply


def _equal(one: Hello | None, other: Hello) -> bool:
    return one is not None and seal(Envelope("", "", 0, (one,))) == seal(Envelope("", "", 0, (other,)))


def _secret(site: Site) -> bytes:
    """Return the site's secret; create it on first use."""
    if not site.secret.exists():
        write_atomically(site.secret, secrets.token_hex(32), mode=0o600)
    return read_secret(site.secret)
