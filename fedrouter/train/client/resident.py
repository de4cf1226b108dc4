"""A client on its own machine: the base stays loaded, requests come in as bytes, signed replies go out."""

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
from fedrouter.files import write_atomically
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

PROBE_TOLERANCE = 0.02  # relative, between this site's embedder and the server's

Opened = Callable[[Config, bytes], tuple[Federation, str, Any]]
"""From a plan and the site's secret to the client, alone in a federation; base's fingerprint; probe."""


class Resident:
    """Answers a server's messages, one at a time.

    Parameters
    ----------
    opened : loads what a plan asks for: the base, the embedder, the rows.
    """

    def __init__(self, site: Site, opened: Opened, console: Console):
        self._site, self._opened, self._console = site, opened, console
        self._name, self._policy = site.settings.name, site.settings.policy
        self._key = load_private(site.key)
        self._secret = _secret(site)
        self._audit = Audit(site.audit)
        self._seen_file = site.directory / "exchanges.json"
        self._seen: dict[str, int] = (
            json.loads(self._seen_file.read_text(encoding="utf-8")) if self._seen_file.exists() else {}
        )
        self._one_at_a_time = threading.Lock()
        self._hello: Hello | None = None
        self._federation: Federation | None = None
        self._summing: Summing | None = None
        self._assigned, self._run = False, ""

    def answer(self, body: bytes) -> bytes:
        """Return the signed reply to a request; whatever happens is a reply."""
        with self._one_at_a_time:
            digest = hashlib.sha256(body).hexdigest()
            try:
                envelope = unseal(body, REQUESTS, MAX_BYTES)
            except WireError as error:
                self._audit.write("in", ["unreadable"], body, "")
                return self._sealed(Envelope("", self._name, 0, (Refused(str(error)),), digest))
            asked = f"{envelope.run}/{envelope.exchange}"
            kinds = [type(message).__name__ for message in envelope.messages]
            self._audit.write("in", kinds, body, asked)
            refused = self._refusal(envelope)
            replies = [Refused(refused)] if refused else list(self._replies(envelope))
            return self._sealed(replace(envelope, client=self._name, messages=tuple(replies), asked=digest))

    def _sealed(self, envelope: Envelope) -> bytes:
        half = self._hello is not None and self._hello.half
        signed = sign(self._key, self._name, seal(envelope, half))
        kinds = [type(message).__name__ for message in envelope.messages]
        self._audit.write("out", kinds, signed, f"{envelope.run}/{envelope.exchange}")
        return signed

    def _refusal(self, envelope: Envelope) -> str | None:
        """Return why nothing in an envelope is done; None: go on, and never take its number again."""
        if envelope.client not in ("", self._name):
            return f"this is client {self._name}, not {envelope.client[:80]}"
        if envelope.exchange <= self._seen.get(envelope.run, 0):
            return f"exchange {envelope.exchange} is not newer than the last one: a replay"
        if self._audit.num_requests > self._policy.max_requests_per_day:
            return f"its policy refuses more than {self._policy.max_requests_per_day} requests a day"
        if self._audit.num_bytes > self._policy.max_mib_per_day * 2**20:
            return f"its policy refuses to send more than {self._policy.max_mib_per_day} MiB a day"
        self._seen[envelope.run] = envelope.exchange
        write_atomically(self._seen_file, json.dumps(self._seen))
        return None

    def _replies(self, envelope: Envelope) -> Iterator[Any]:
        """Yield one reply a message; after one that failed, none."""
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
                yield Refused("the plan was to sum updates, and this asks for one alone")
                return
            try:
                yield from self._done(message, envelope.run)
            except WireError as error:
                yield Refused(str(error))
            except ClientError as error:
                yield Failed(error.reasons.get(self._name, "it failed; its own log says more"))
                return
            except DataError as error:  # it may quote rows
                self._say(f"error: {error}")
                yield Failed(reason_of(self._name, error))
                return
            except FedRouterError as error:
                yield Failed(str(error), settings=True)
                return
            except Exception as error:
                yield Failed(reason_of(self._name, error))
                return

    def _done(self, message: Any, run: str) -> Iterator[Any]:
        match message:
            case Hello():
                yield self._begin(message, run)
                return
            case Goodbye():
                self._say(f"the server says: {message.reason}")
                yield Done()
                return
        federation = self._federation
        assert federation is not None, "the caller has seen to it"
        match message:
            case Summarise(num=num, beyond=beyond):
                ask = federation.summarise_beyond if beyond else federation.summarise
                yield from ask("auto" if num is None else num)
            case Regroup(space=space, told=told):
                yield from federation.regroup(space, told)
            case Assign(space=space, told=told):
                (assignment,) = federation.assign(space, told)
                self._assigned = True
                if not self._policy.labels:  # rows have none by now; this is the last door
                    unlabelled = tuple(replace(s, task_counts={}) for s in assignment.subsets)
                    assignment = replace(assignment, subsets=unlabelled)
                yield assignment
            case Compare(space=space, radii=radii):
                yield from federation.compare(space, radii)
            case ReadAgain():
                (answer,) = federation.reread()
                if answer.problem:
                    self._say(f"goes on with the rows that it had: {answer.problem}")
                    answer = replace(answer, problem="its rows could not be read; its own log says more")
                yield answer
                yield from federation.members()
            case TrainRequest():
                self._say(
                    f"round {message.round + 1}: trains task cluster {message.cluster}, {message.steps} steps"
                )
                yield from map(_finite, federation.train([message]))
            case ValidationRequest():
                yield from federation.validate([message])
            case SumKeys() | SumShares() | SumTrain() | SumOpen():
                yield self._summed(message, federation)

    def _summed(self, message: Any, federation: Federation) -> Any:
        """Do this site's part of a secure sum."""
        if self._summing is None:
            return Refused("the plan was not to sum updates")
        match message:
            case SumKeys():
                return self._summing.keys(message)
            case SumShares():
                return self._summing.shares(message)
            case SumOpen():
                return self._summing.opened(message)
        request = message.request
        self._summing.take(request, message.shares)
        self._say(f"round {request.round + 1}: trains task cluster {request.cluster}, to be summed")
        (answer,) = map(_finite, federation.train([request]))
        return self._summing.masked(request, answer) if isinstance(answer, TrainReply) else answer

    def _begin(self, hello: Hello, run: str) -> Any:
        """Take a plan on, if the policy allows it; load what it needs, unless it is loaded."""
        if self._federation is not None and self._run == run and _same(self._hello, hello):
            (member,) = self._federation.members()
            return member
        self._federation, self._assigned, self._run = None, False, run
        config = plan_of(hello, self._site)
        if reason := against_plan(self._policy, config, hello.secure):
            return Refused(reason)
        resolve_base(config.base.model, config.base.revision)
        federation, fingerprint, probe = self._opened(config, self._secret)
        if fingerprint != hello.base:
            return Failed("its base is another one than the server's: config or tokenizer differ")
        if probe.shape != hello.probe.shape:
            return Failed(f"its embedder gives {probe.shape[1]} numbers, the server's {hello.probe.shape[1]}")
        error = float(np.linalg.norm(probe - hello.probe) / np.linalg.norm(hello.probe))
        if not error <= PROBE_TOLERANCE:
            return Failed(f"its embedder is another one than the server's: vectors differ by {error:.1%}")
        self._hello, self._federation = hello, federation
        pins = self._site.directory / "peers.json"
        least = self._policy.min_sum
        self._summing = Summing(run, self._name, self._key, pins, least) if hello.secure else None
        (member,) = federation.members()
        self._say(
            f"takes part with {member.num_rows} rows: method {config.method}, {config.train.rounds} rounds"
        )
        return member

    def _say(self, line: str) -> None:
        self._console.print(f"client {self._name}: {line}", highlight=False, soft_wrap=True, markup=False)


def _finite(answer: Any) -> Any:
    """Return an answer that the wire takes: no number on it is infinite or none."""
    if isinstance(answer, TrainReply) and answer.loss is not None and not math.isfinite(answer.loss):
        return TrainFailure(
            answer.client, answer.cluster, "its loss is not finite; lower train.learning_rate"
        )
    return answer


def _same(one: Hello | None, other: Hello) -> bool:
    return one is not None and seal(Envelope("", "", 0, (one,))) == seal(Envelope("", "", 0, (other,)))


def _secret(site: Site) -> bytes:
    """Return the site's secret; draw it the first time."""
    if not site.secret.exists():
        write_atomically(site.secret, secrets.token_hex(32), mode=0o600)
    return bytes.fromhex(site.secret.read_text(encoding="utf-8"))
