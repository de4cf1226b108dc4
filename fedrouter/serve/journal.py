"""Recent routing decisions: for the console, for feedback and for the decision log."""

import asyncio
import logging
import math
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from fedrouter import conversation
from fedrouter.decide import difference
from fedrouter.errors import FedRouterError
from fedrouter.serve import metrics
from fedrouter.serve.access import Caller
from fedrouter.serve.asgi import Refusal
from fedrouter.serve.batch import Overloaded
from fedrouter.serve.decision_log import DecisionLog, packed
from fedrouter.serve.routing import OVERLOAD, Routing
from fedrouter.types import Array, Decision, LoggedDecision, OtherDecision

NUM_RECENT = 500  # decisions that the console can list, without their prompts
NUM_NOTED = 16_384  # decisions that can get feedback
OUTCOMES = ("good", "bad")
logger = logging.getLogger("vllm.fedrouter.journal")
Vectors = Mapping[str, Array]


class Journal:
    """Records the decisions of one server process.

    Parameters
    ----------
    log : decision log; None: recent decisions are kept in memory only.
    """

    def __init__(self, log: DecisionLog | None = None):
        self._log = log
        self._recent: deque[dict[str, Any]] = deque(maxlen=NUM_RECENT)
        self._noted: OrderedDict[str, tuple[str | None, list[dict[str, Any]]]] = OrderedDict()
        self._num_noted = 0
        self._comparing: set[asyncio.Task[None]] = set()

    def note(
        self,
        caller: Caller,
        routing: Routing,
        user_turns: Sequence[Sequence[str]],
        decisions: Sequence[Decision],
        vectors: dict[str, Array],
        routing_ms: float,
        other: Routing | None = None,
    ) -> str:
        """Record the decisions for one request; return the request's id.

        Parameters
        ----------
        user_turns : for each conversation, the texts of its user turns.
        vectors : text → embedding.
        other : the bundle that does not answer; it routes the request too, afterwards, for comparison.
        """
        key, now = uuid.uuid4().hex, round(time.time(), 3)
        entries = [
            _entry(key, number, now, caller, routing, turns, decision, vectors, routing_ms)
            for number, (turns, decision) in enumerate(zip(user_turns, decisions, strict=True))
        ]
        self._recent.extend(entries)
        self._noted[key] = caller.tenant_name, entries
        self._num_noted += len(entries)
        while self._num_noted > NUM_NOTED:
            self._num_noted -= len(self._noted.popitem(last=False)[1][1])
        if other is not None:
            task = asyncio.create_task(self._compare(caller, other, user_turns, decisions, vectors, entries))
            self._comparing.add(task)
            task.add_done_callback(self._comparing.discard)
        elif self._log is not None:
            self._write(entries, user_turns, vectors)
        return key

    def answered(self, key: str, status: int | None) -> None:
        """Record a request's HTTP status; None: the client left before the response."""
        for entry in self._noted.get(key, (None, ()))[1]:
            entry["outcome"] = metrics.outcome(status)

    def recent(self, caller: Caller, limit: int) -> list[dict[str, Any]]:
        """Return the latest decisions that a caller may see, newest first; a tenant sees its own."""
        return [
            entry
            for entry in reversed(self._recent)
            if (not caller.tenant or entry["tenant"]) and caller.client in (None, entry["caller"])
        ][:limit]

    async def feedback(self, caller: Caller, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Attach an outcome to a request; return the request's id and adapters.

        Only a request's first outcome is counted. Another one later replaces it in the console and is logged.

        Raises
        ------
        Refusal
            400 for an invalid payload; 404 for an unknown request, or one of another tenant.
        """
        key, outcome = payload.get("id"), payload.get("outcome")
        if not isinstance(key, str) or outcome not in OUTCOMES:
            outcomes = " or ".join(OUTCOMES)
            raise Refusal(400, f'send {{"id": "x-fedrouter-id of a response", "outcome": "{outcomes}"}}')
        tenant, entries = self._noted.get(key, (None, []))
        if not entries or (caller.tenant and tenant != caller.tenant_name):
            raise Refusal(404, f"no request {key} among the latest ones of this server process", "id")
        adapters = list(dict.fromkeys(entry["adapter"] for entry in entries))
        counted = entries[0]["feedback"] is None
        for entry in entries:
            entry["feedback"] = outcome
        for adapter in adapters if counted else ():
            metrics.FEEDBACK.labels(adapter, outcome).inc()
        logged = False
        if self._log is not None:
            line = {
                "time": round(time.time(), 3),
                "feedback": key,
                "outcome": outcome,
                "caller": caller.client,
            }
            written: Future[bool] = Future()
            written.set_running_or_notify_cancel()  # a client that leaves must not cancel it
            self._log.write(lambda: line, written)
            logged = await asyncio.wrap_future(written)
        return {"id": key, "outcome": outcome, "adapters": adapters, "counted": counted, "logged": logged}

    def close(self) -> None:
        """Stop the comparisons and close the decision log."""
        for task in self._comparing:
            task.cancel()
        if self._log is not None:
            self._log.close()

    async def _compare(
        self,
        caller: Caller,
        other: Routing,
        user_turns: Sequence[Sequence[str]],
        decisions: Sequence[Decision],
        vectors: dict[str, Array],
        entries: Sequence[dict[str, Any]],
    ) -> None:
        """Route a request by the other bundle too; the vectors are the same, so it costs next to nothing."""
        others: Sequence[Decision] = ()
        if decisions[0] is not OVERLOAD and caller.client in (None, *other.clients):
            try:
                others = await conversation.route_by_turns(
                    user_turns, lambda texts: other.route(texts, caller.client, caller.tenant_name, vectors)
                )
            except (Overloaded, FedRouterError):
                others = ()
            except Exception:  # such as a bundle that was replaced meanwhile; the log line is still written
                logger.exception("the other bundle could not route a request")
        if not others:
            metrics.SHADOW.labels("", "unknown").inc(len(decisions))
        for entry, first, second in zip(entries, decisions, others or decisions, strict=True):
            if others:
                how = difference(first, second)
                metrics.SHADOW.labels(first.cluster, how).inc()
                entry["other"] = asdict(
                    OtherDecision(other.digest[:12], second.model, second.cluster, second.fallback, how)
                )
        if self._log is not None:
            self._write(entries, user_turns, vectors)

    def _write(
        self, entries: Sequence[Mapping[str, Any]], user_turns: Sequence[Sequence[str]], vectors: Vectors
    ) -> None:
        assert self._log is not None
        options = self._log.options
        for entry, turns in zip(entries, user_turns, strict=True):
            texts = []
            if options.prompts or options.vectors:
                texts = [text for _, text in conversation.candidates(turns)]
            line = _line(
                entry,
                texts if options.prompts else None,
                [vectors.get(text) for text in texts] if options.vectors else None,
            )
            self._log.write(line)


def _entry(
    key: str,
    number: int,
    now: float,
    caller: Caller,
    routing: Routing,
    turns: Sequence[str],
    decision: Decision,
    vectors: Vectors,
    routing_ms: float,
) -> dict[str, Any]:
    """Return a decision as the console shows it; the log adds texts and vectors."""
    vector = vectors.get(turns[decision.turn]) if turns and decision is not OVERLOAD else None
    return {
        "time": now,
        "id": key,
        "prompt": number,
        "bundle": routing.digest[:12],
        "embedder": routing.embedder_digest,
        "caller": caller.client,
        "tenant": caller.tenant,
        "adapter": decision.model,
        "cluster": decision.cluster,
        "distance": _finite(decision.distance),
        "radius": decision.radius,
        "margin": _finite(decision.margin),
        "fallback": decision.fallback,
        "reason": "overload" if decision is OVERLOAD else metrics.reason(decision),
        "turn": decision.turn,
        "turns": len(turns),
        "routing_ms": routing_ms,
        "at": None if vector is None else routing.place(vector),
        "outcome": None,
        "feedback": None,
        "other": None,
    }


def _line(
    entry: Mapping[str, Any], texts: Sequence[str] | None, vectors: Sequence[Array | None] | None
) -> Callable[[], Mapping[str, Any]]:
    # A copy: feedback may change the entry before the line is written.
    kept = {name: entry[name] for name in LoggedDecision.__slots__ if name in entry}

    def line() -> Mapping[str, Any]:
        more: dict[str, Any] = {} if texts is None else {"texts": texts}
        if vectors is not None:
            more["vectors"] = [packed(vector) for vector in vectors]
        return kept | more

    return line


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
