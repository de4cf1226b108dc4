"""One request to a path where the virtual model may be asked for: decided, rewritten, marked, counted."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from fedrouter import conversation
from fedrouter.route import BASE_NAME, REJECT
from fedrouter.serve import metrics, split
from fedrouter.serve.access import CLIENT_HEADER, Caller
from fedrouter.serve.asgi import (
    Answer,
    App,
    Headers,
    Message,
    Receive,
    Refusal,
    Scope,
    Send,
    header_values,
    refused,
)
from fedrouter.serve.batch import Overloaded
from fedrouter.serve.bodies import Bodies, parse
from fedrouter.serve.cors import Replies
from fedrouter.serve.journal import Journal
from fedrouter.serve.paths import ADAPTER_HEADER, AS_BASE, INVOCATIONS, UNROUTED, VIRTUAL_NAME
from fedrouter.serve.prompts import conversations, model_of
from fedrouter.serve.routing import OVERLOAD, Routing
from fedrouter.serve.second import Second
from fedrouter.serve.shapes import check_shapes
from fedrouter.types import Array, Decision

NO_CLUSTER = "no_task_cluster"  # the error's code where the fallback is to reject
logger = logging.getLogger("vllm.fedrouter")  # below vLLM's logger, so that it appears in its output


class RoutedRequest:
    """One request to a path of ours: reads its body when vLLM does, marks its answer."""

    def __init__(
        self,
        app: App,
        routing: Routing,
        second: Second | None,
        bodies: Bodies,
        replies: Replies,
        journal: Journal,
        path: str,
        caller: Caller,
    ):
        self._app, self._routing, self._path, self._caller = app, routing, path, caller
        self._second = second
        self._bodies, self._replies, self._journal = bodies, replies, journal
        self._id = ""  # once it is decided
        self._read = self._answered = False
        self._headers: Headers = ()
        self._answer: Answer | None = None  # ours, in the place of vLLM's
        self._adapters: tuple[str, ...] = ()  # what answers, once that is decided; "" if refused before
        self._status: int | None = None  # None as long as nobody got an answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = dict(scope)  # as no application has seen it yet

        async def rewriting_receive() -> Message:
            return await receive() if self._read else await self._receive(receive)

        async def marking_send(message: Message) -> None:
            if self._answer is not None:  # what vLLM says of the body that it did not get is of no interest
                await self._send(send, self._answer)
            elif message["type"] == "http.response.start":
                self._status = message["status"]
                await send({**message, "headers": [*message.get("headers", ()), *self._headers]})
            else:
                await send(message)

        try:
            await self._app(scope, rewriting_receive, marking_send)
        except Exception:
            if self._answer is None:
                raise
        finally:
            self._count()
        if self._answer is not None:
            await self._send(send, self._answer)

    async def _receive(self, receive: Receive) -> Message:
        self._read = True
        try:
            with self._bodies.work(self._caller.whose) as work:
                body = await work.read(receive)
                found = None if body is None else await self._rewrite(body)
            if isinstance(found, Split):
                await self._split(receive, found)
            elif found is not None:
                return {"type": "http.request", "body": found, "more_body": False}
        except Refusal as refusal:
            self._refuse(refusal)
        except Exception:
            logger.exception("routing failed")
            self._refuse(Refusal(500, "routing failed; the server's log says why"))
        return {"type": "http.disconnect"}  # the client has gone, or is answered by us

    def _refuse(self, refusal: Refusal) -> None:
        self._adapters = self._adapters or ("",)
        answer = refused(refusal, self._path)
        self._answer = replace(answer, headers=[*answer.headers, *self._headers])

    async def _rewrite(self, body: bytes) -> "bytes | Split":
        """Return the body with the adapter's name as ``model``; as it is where another one is named."""
        found = await self._bodies.off_loop(len(body), lambda: self._look(body))
        if isinstance(found, bytes):
            return found
        payload, asked = found
        start, vectors = time.perf_counter(), dict[str, Array]()
        routing, other = self._routing, self._second.routing if self._second else None
        if self._second and self._second.answers(asked, self._caller):
            routing, other = self._second.routing, self._routing
        decisions = await route_conversations(routing, asked, self._caller, vectors)
        overload = "overload" if decisions[0] is OVERLOAD else None
        metrics.count_decisions(decisions, time.perf_counter() - start, overload)
        ms = ms_since(start)
        self._id = self._journal.note(self._caller, routing, asked, decisions, vectors, ms, other)
        self._headers = routing_headers(decisions, ms, self._id)
        models = [decision.model for decision in decisions]
        if REJECT in models:
            self._adapters = (REJECT,)
            raise Refusal(
                422, "no task cluster is near this prompt, and this server answers no others", code=NO_CLUSTER
            )
        adapters = tuple(dict.fromkeys(models))
        if len(adapters) > 1 and payload.get("stream"):
            names = ", ".join(adapters)
            raise Refusal(
                400, f"these prompts go to different adapters ({names}): stream them one by one", "stream"
            )
        self._adapters = adapters
        if len(adapters) > 1:
            return Split(payload, models)
        return await self._bodies.off_loop(len(body), lambda: _named(payload, models[0]))

    def _look(self, body: bytes) -> "bytes | tuple[dict[str, Any], list[list[str]]]":
        """Return the payload and the texts that decide; bytes to hand on where nothing is to be decided."""
        payload = parse(body)
        check_shapes(self._path, payload)
        model = self._model(payload)
        if model != VIRTUAL_NAME:
            if self._caller.tenant and model not in known_names(self._routing, self._caller, self._second):
                raise Refusal(404, f"The model `{model}` does not exist.", "model")
            return body
        if self._path in UNROUTED:
            raise Refusal(400, f"nothing is routed here: name an adapter, or {BASE_NAME}", "model")
        if self._path in AS_BASE:
            return _named(payload, BASE_NAME)
        asked = conversations(self._path, payload, self._routing.decode)
        most = self._routing.limits.max_queue
        if len(asked) > most:
            raise Refusal(400, f"{len(asked)} prompts: at most {most} are routed in one request", "prompt")
        return payload, asked

    def _model(self, payload: Mapping[str, Any]) -> str:
        if self._path != INVOCATIONS:
            return model_of(payload)
        named = header_values(self._scope, ADAPTER_HEADER)
        if named:  # and what the body names is nothing to vLLM
            return named[0] if len(set(named)) == 1 and named[0] else VIRTUAL_NAME
        if payload.get("model") != BASE_NAME:
            raise Refusal(400, f"name an adapter in {ADAPTER_HEADER}, or {BASE_NAME} as model", "model")
        return BASE_NAME

    async def _split(self, receive: Receive, found: "Split") -> None:
        answer = await split.complete(self._app, self._scope, receive, found.payload, found.models)
        if answer is None:
            self._count()  # before vLLM answers nobody
        else:
            self._answer = replace(answer, headers=[*answer.headers, *self._headers])

    def _count(self) -> None:
        """Count the request, once for each adapter that it asked."""
        status = self._answer.status if self._answer is not None else self._status
        for adapter in self._adapters:
            metrics.count_request(adapter, status)
        if self._adapters:
            self._journal.answered(self._id, status)
        self._adapters = ()

    async def _send(self, send: Send, answer: Answer) -> None:
        if not self._answered:
            self._answered = True
            await self._replies(self._scope, send, answer)


@dataclass(frozen=True, slots=True)
class Split:
    """A list of prompts for several adapters."""

    payload: Mapping[str, Any]
    models: Sequence[str]  # one a prompt


async def route_conversations(
    routing: Routing, asked: Sequence[Sequence[str]], caller: Caller, vectors: dict[str, Array] | None = None
) -> list[Decision]:
    """Decide for each conversation, among the task clusters of the caller; for all of them or none.

    ``vectors`` are those of texts that were embedded; more are put in.
    """
    check_client(routing, caller)
    try:
        return await conversation.decide(
            asked, lambda texts: routing.route(texts, caller.client, caller.whose, vectors)
        )
    except Overloaded:
        if REJECT in (routing.limits.overload, routing.fallback):
            raise Refusal(503, "too many requests wait to be routed: try again later", retry_s=1) from None
        return [OVERLOAD for _ in asked]


def check_client(routing: Routing, caller: Caller) -> None:
    """Refuse a client that no task cluster holds rows of."""
    if caller.client is not None and caller.client not in routing.clients:
        raise Refusal(
            404, f"no task cluster holds rows of client {caller.client}: see {CLIENT_HEADER}", CLIENT_HEADER
        )


def known_names(routing: Routing, caller: Caller, second: Second | None = None) -> set[str | None]:
    """Return the names that mean something to a tenant."""
    served = [routing, *([second.routing] if second and second.share else [])]
    adapters = {cluster.adapter for one in served for cluster in one.clusters(caller.client)}
    return adapters | {BASE_NAME, VIRTUAL_NAME, *(one.bundle.generalist for one in served)}


def _named(payload: dict[str, Any], model: str) -> bytes:
    return json.dumps({**payload, "model": model}).encode()


def routing_headers(decisions: Sequence[Decision], routing_ms: float, request_id: str = "") -> Headers:
    """Headers for an answer; of several decisions the names in order, and the figures of the worst."""

    def names(values: Sequence[str]) -> str:
        # a header takes no line breaks and no wide characters
        return ",".join(quote(value, safe=" /:@+") for value in dict.fromkeys(values))

    values = {
        "adapter": names([decision.model for decision in decisions]),
        "cluster": names([decision.cluster for decision in decisions]),
        "distance": f"{max(decision.distance for decision in decisions):.6g}",
        "margin": f"{min(decision.margin for decision in decisions):.6g}",
        "fallback": str(any(decision.fallback for decision in decisions)).lower(),
        "routing-ms": f"{routing_ms:.3f}",
        "id": request_id,
    }
    return [(f"x-fedrouter-{name}".encode(), value.encode()) for name, value in values.items()]


def ms_since(start: float) -> float:
    """Return the milliseconds since a ``time.perf_counter()``."""
    return round((time.perf_counter() - start) * 1000, 3)
