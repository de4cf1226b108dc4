"""One request to a path that accepts the virtual model: route it, rewrite it, mark the response, count it."""

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

NO_CLUSTER = "no_task_cluster"  # error code if the fallback is "reject"
logger = logging.getLogger("vllm.fedrouter")  # a child of vLLM's logger, so that it appears in vLLM's output


class RoutedRequest:
    """One such request: reads the body when vLLM asks for it, and adds headers to the response."""

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
        self._id = ""  # empty until routed
        self._read = self._sent = False
        self._headers: Headers = ()
        self._answer: Answer | None = None  # replaces vLLM's response
        self._adapters: tuple[str, ...] = ()  # who answers, once routed; "" if refused before
        self._status: int | None = None  # None until the response starts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = dict(scope)  # before any application changes it

        async def rewriting_receive() -> Message:
            return await receive() if self._read else await self._receive(receive)

        async def marking_send(message: Message) -> None:
            if self._answer is not None:  # instead of vLLM's complaint about the missing body
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
            with self._bodies.work(self._caller.tenant_name) as work:
                body = await work.read(receive)
                rewritten = None if body is None else await self._rewrite(body)
            if isinstance(rewritten, Split):
                await self._split(receive, rewritten)
            elif rewritten is not None:
                return {"type": "http.request", "body": rewritten, "more_body": False}
        except Refusal as refusal:
            self._refuse(refusal)
        except Exception:
            logger.exception("routing failed")
            self._refuse(Refusal(500, "routing failed; the server's log says why"))
        return {"type": "http.disconnect"}  # the client has left, or gets the hook's response

    def _refuse(self, refusal: Refusal) -> None:
        self._adapters = self._adapters or ("",)
        answer = refused(refusal, self._path)
        self._answer = replace(answer, headers=[*answer.headers, *self._headers])

    async def _rewrite(self, body: bytes) -> "bytes | Split":
        """Route the request; return its body with the adapter's name as ``model``.

        A body that names an adapter or the base is returned unchanged.
        """
        parsed = await self._bodies.off_loop(len(body), lambda: self._parse(body))
        if isinstance(parsed, bytes):
            return parsed
        payload, user_turns = parsed
        start, vectors = time.perf_counter(), dict[str, Array]()
        routing, other = self._routing, self._second.routing if self._second else None
        if self._second and self._second.answers(user_turns, self._caller):
            routing, other = self._second.routing, self._routing
        decisions = await route_conversations(routing, user_turns, self._caller, vectors)
        overload = "overload" if decisions[0] is OVERLOAD else None
        metrics.count_decisions(decisions, time.perf_counter() - start, overload)
        ms = ms_since(start)
        self._id = self._journal.note(self._caller, routing, user_turns, decisions, vectors, ms, other)
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

    def _parse(self, body: bytes) -> "bytes | tuple[dict[str, Any], list[list[str]]]":
        """Return the payload and the user turns to route by; a body to pass on if nothing is to be routed."""
        payload = parse(body)
        check_shapes(self._path, payload)
        model = self._model(payload)
        if model != VIRTUAL_NAME:
            if self._caller.tenant and model not in known_names(self._routing, self._caller, self._second):
                raise Refusal(404, f"The model `{model}` does not exist.", "model")
            return body
        if self._path in UNROUTED:
            raise Refusal(400, f"this path is not routed: name an adapter, or {BASE_NAME}", "model")
        if self._path in AS_BASE:
            return _named(payload, BASE_NAME)
        user_turns = conversations(self._path, payload, self._routing.decode)
        limit = self._routing.limits.max_queue
        if len(user_turns) > limit:
            raise Refusal(
                400, f"{len(user_turns)} prompts: at most {limit} are routed in one request", "prompt"
            )
        return payload, user_turns

    def _model(self, payload: Mapping[str, Any]) -> str:
        if self._path != INVOCATIONS:
            return model_of(payload)
        named = header_values(self._scope, ADAPTER_HEADER)
        if named:  # vLLM ignores the model in the body
            return named[0] if len(set(named)) == 1 and named[0] else VIRTUAL_NAME
        if payload.get("model") != BASE_NAME:
            raise Refusal(400, f"name an adapter in {ADAPTER_HEADER}, or {BASE_NAME} as model", "model")
        return BASE_NAME

    async def _split(self, receive: Receive, parts: "Split") -> None:
        answer = await split.complete(self._app, self._scope, receive, parts.payload, parts.models)
        if answer is None:
            self._count()  # now, or it would be counted with vLLM's status
        else:
            self._answer = replace(answer, headers=[*answer.headers, *self._headers])

    def _count(self) -> None:
        """Count the request once for each adapter that answers it."""
        status = self._answer.status if self._answer is not None else self._status
        for adapter in self._adapters:
            metrics.count_request(adapter, status)
        if self._adapters:
            self._journal.answered(self._id, status)
        self._adapters = ()

    async def _send(self, send: Send, answer: Answer) -> None:
        if not self._sent:
            self._sent = True
            await self._replies(self._scope, send, answer)


@dataclass(frozen=True, slots=True)
class Split:
    """A list of prompts for several adapters."""

    payload: Mapping[str, Any]
    models: Sequence[str]  # one per prompt


async def route_conversations(
    routing: Routing,
    user_turns: Sequence[Sequence[str]],
    caller: Caller,
    vectors: dict[str, Array] | None = None,
) -> list[Decision]:
    """Route each conversation among the caller's task clusters; under overload all get ``OVERLOAD``.

    Parameters
    ----------
    user_turns : for each conversation, the texts of its user turns.
    vectors : text → embedding; missing ones are added.

    Raises
    ------
    Refusal
        404 for an unknown client; 503 under overload, if that or the fallback is "reject".
    """
    check_client(routing, caller)
    try:
        return await conversation.route_by_turns(
            user_turns, lambda texts: routing.route(texts, caller.client, caller.tenant_name, vectors)
        )
    except Overloaded:
        if REJECT in (routing.limits.overload, routing.fallback):
            raise Refusal(503, "too many requests wait to be routed: try again later", retry_s=1) from None
        return [OVERLOAD for _ in user_turns]


def check_client(routing: Routing, caller: Caller) -> None:
    """Raise ``Refusal`` if no task cluster holds rows of the client."""
    if caller.client is not None and caller.client not in routing.clients:
        raise Refusal(
            404, f"no task cluster holds rows of client {caller.client}: see {CLIENT_HEADER}", CLIENT_HEADER
        )


def known_names(routing: Routing, caller: Caller, second: Second | None = None) -> set[str | None]:
    """Return the model names that a tenant may use."""
    served = [routing, *([second.routing] if second and second.share else [])]
    adapters = {cluster.adapter for one in served for cluster in one.clusters(caller.client)}
    return adapters | {BASE_NAME, VIRTUAL_NAME, *(one.bundle.generalist for one in served)}


def _named(payload: dict[str, Any], model: str) -> bytes:
    return json.dumps({**payload, "model": model}).encode()


def routing_headers(decisions: Sequence[Decision], routing_ms: float, request_id: str = "") -> Headers:
    """Return headers for a response; of several decisions all names, and the numbers of the worst."""

    def names(values: Sequence[str]) -> str:
        # headers allow no line breaks and no characters beyond Latin-1
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
    """Return the milliseconds since a value of ``time.perf_counter()``."""
    return round((time.perf_counter() - start) * 1000, 3)
