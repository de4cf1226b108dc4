"""The request hook for vLLM's ``--middleware``: pure ASGI, rewrites ``model``, streams untouched.

The life of a request:

1. It reaches this hook before vLLM's own authentication. Without a key that the path needs it ends here: its
   body is not read, nothing is embedded (``access.py``). What is no POST to a path of ours goes on untouched.
2. vLLM checks the API key as well.
3. vLLM reads the body through our ``receive``. One that does not name the virtual model goes on as it is.
4. The conversation's text is embedded off the event loop, together with those of requests that wait then.
5. The router picks the adapter; the body goes to vLLM with the adapter's name as ``model``. A list of prompts
   for several adapters goes there as several requests and comes back as one (``split.py``).
6. vLLM answers; our ``send`` adds headers to the start of the answer and lets everything else through.

What to serve is read from the environment at lifespan start-up: see ``routing.load_routing``. A reload
replaces it (``reload.py``), asked for or because a watched link points elsewhere (``watch.py``); a request
goes on with what it began with.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import quote

from fedrouter.errors import FedRouterError
from fedrouter.route import BASE_NAME, REJECT
from fedrouter.serve import conversation, engine, metrics, split
from fedrouter.serve.access import (
    CLIENT_HEADER,
    CLUSTERS,
    DRY_RUN,
    MODELS,
    READY,
    RELOAD,
    Access,
    Caller,
    load_access,
)
from fedrouter.serve.asgi import (
    Answer,
    App,
    Headers,
    Inner,
    Message,
    Receive,
    Scope,
    Send,
    collect,
    header_values,
    json_answer,
    path_of,
    read_body,
    refused,
    send_answer,
)
from fedrouter.serve.batch import Overloaded
from fedrouter.serve.bodies import (
    AS_BASE,
    CHAT,
    COMPLETIONS,
    ROUTED,
    UNROUTED,
    VIRTUAL_NAME,
    Refusal,
    conversations,
    parse,
    parse_routed,
)
from fedrouter.serve.canary import Readiness
from fedrouter.serve.reload import Reloader, is_admin
from fedrouter.serve.routing import OVERLOAD, Routing, load_routing
from fedrouter.serve.watch import Watch
from fedrouter.types import Decision

NO_CLUSTER = "no_task_cluster"  # the error's code where the fallback is to reject
logger = logging.getLogger("vllm.fedrouter")  # below vLLM's logger, so that it appears in its output

Endpoint = Callable[[Inner, Scope, Receive, Caller], Awaitable[Any]]


class FedRouterMiddleware:
    """Route requests for the virtual model ``fedrouter``; see the module's docstring."""

    def __init__(
        self,
        app: App,
        load: Callable[[], Routing] = load_routing,
        load_access: Callable[[], Access] = load_access,
    ):
        self.app = app
        self._load, self._load_access = load, load_access
        self._routing: Routing | None = None
        self._access = Access()
        self._readiness, self._reloader, self._watch = Readiness(), Reloader(), Watch.from_env()
        self._endpoints: dict[tuple[str, str], Endpoint] = {
            ("GET", CLUSTERS): self._clusters,
            ("POST", DRY_RUN): self._dry_run,
            ("POST", RELOAD): self._reload,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["method"], path_of(scope)
        try:
            caller, scope = self._access.admit(scope)
        except Refusal as refusal:
            await send_answer(send, refused(refusal, route[1]))
            return
        if is_admin(scope["path"]):
            await send_answer(send, refused(Refusal(404, "Not Found")))
        elif route[0] == "POST" and route[1] in (*ROUTED, *AS_BASE, *UNROUTED):
            with self.routing.in_use() as routing:
                await _RoutedRequest(self.app, routing, route[1], caller)(scope, receive, send)
        elif route == ("GET", READY):
            await send_answer(send, self._readiness.answer())
        elif route == ("GET", MODELS) and caller.tenant:
            await self._models(scope, receive, send, caller)
        elif route in self._endpoints:
            await self._answer(scope, receive, send, caller, self._endpoints[route])
        else:
            await self.app(scope, receive, send)

    @property
    def state(self) -> str:
        """Whether it can answer: "starting", "ready" or "failed"."""
        return self._readiness.state

    @property
    def routing(self) -> Routing:
        """The bundle in use."""
        assert self._routing is not None, "FedRouterMiddleware needs a server that runs the lifespan protocol"
        return self._routing

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Load the bundle before the application starts; a server that cannot route must not start."""
        startup: list[Message] = [await receive()]
        try:
            self._access = self._load_access()
            self._routing = await asyncio.to_thread(self._load)
        except Exception as error:  # raised further, uvicorn would take it for "no lifespan" and serve
            if not isinstance(error, FedRouterError):
                logger.exception("FedRouter cannot start")
            return await send({"type": "lifespan.startup.failed", "message": f"FedRouter: {error}"})
        self._flip(self.routing)

        async def replay() -> Message:
            return startup.pop() if startup else await receive()

        async def watching_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                inner = Inner(self.app, scope, engine.own_authorization(scope))
                self._readiness.prove(inner, list(self.routing.bundle.adapter_paths))
                self._follow(inner)
            await send(message)

        try:
            await self.app(scope, replay, watching_send)
        finally:
            self._readiness.close()
            if self._watch is not None:
                self._watch.close()
            self.routing.close()

    def _follow(self, inner: Inner) -> None:
        if self._watch is not None:
            self._watch.start(
                self.routing.bundle.path.resolve(),
                lambda: self.state == "ready" and not self._reloader.busy,
                lambda name: self._reloader.reload(inner, self.routing, name, self._flip),
            )

    def _flip(self, routing: Routing) -> None:
        self._routing = routing
        logger.info(
            "FedRouter routes to %d adapters of %s", len(routing.bundle.clusters), routing.bundle.path
        )

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, caller: Caller, endpoint: Endpoint
    ) -> None:
        """Answer an endpoint of our own, for those only whom the server lets list its models."""
        shown = next(iter(header_values(scope, "authorization")), None)
        inner = Inner(self.app, scope, shown.encode("latin-1") if shown is not None else None)
        verdict = await inner.ask("GET", MODELS)
        if verdict.status != 200:
            await send_answer(send, verdict)
            return
        try:
            await send_answer(send, json_answer(200, await endpoint(inner, scope, receive, caller)))
        except Refusal as refusal:
            await send_answer(send, refused(refusal))

    async def _models(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        """List those models only that a tenant may name."""
        answer = await collect(self.app, scope, receive)
        if answer.status == 200:
            listed, known = json.loads(answer.body), _names(self.routing, caller)
            listed["data"] = [model for model in listed["data"] if model["id"] in known]
            answer = json_answer(200, listed)
        await send_answer(send, answer)

    async def _clusters(self, _inner: Inner, _scope: Scope, _receive: Receive, caller: Caller) -> Any:
        _check_client(self.routing, caller)
        bundle = self.routing.bundle
        shown = ("name", "adapter", "num_examples", "task_counts", "clients", "radius")
        clusters = [
            {name: getattr(cluster, name) for name in shown}
            | ({"clients": [caller.client]} if caller.tenant else {})  # who else is there is not its business
            for cluster in self.routing.clusters(caller.client)
        ]
        return {
            "bundle": {"name": bundle.path.name, "sha256": self.routing.digest},
            "base": asdict(bundle.base),
            "fallback": self.routing.fallback,
            "clusters": clusters,
        }

    async def _dry_run(self, _inner: Inner, _scope: Scope, receive: Receive, caller: Caller) -> Any:
        payload = await self._payload(receive)
        path = CHAT if "messages" in payload else COMPLETIONS
        with self.routing.in_use() as routing:
            asked = conversations(path, payload, routing.decode)
            if asked is None or len(asked) != 1:
                raise Refusal(400, 'send {"prompt": "one prompt"} or {"messages": [...]}', "prompt")
            start = time.perf_counter()
            [decision] = await _decide(routing, asked, caller)
        return {**asdict(decision), "routing_ms": _ms_since(start)}

    async def _reload(self, inner: Inner, scope: Scope, receive: Receive, _caller: Caller) -> Any:
        kind = next(iter(header_values(scope, "content-type")), "")
        if not kind.startswith("application/json"):  # a web form must not do it
            raise Refusal(415, "send application/json")
        payload = await self._payload(receive)
        return await self._reloader.reload(inner, self.routing, payload.get("bundle"), self._flip)

    async def _payload(self, receive: Receive) -> dict[str, Any]:
        payload = parse(await read_body(receive, self.routing.limits.max_body_mib) or b"")
        if payload is None:
            raise Refusal(400, "the body must be a JSON object")
        return payload


class _RoutedRequest:
    """One request to a path of ours: reads its body when vLLM does, marks its answer."""

    def __init__(self, app: App, routing: Routing, path: str, caller: Caller):
        self._app, self._routing, self._path, self._caller = app, routing, path, caller
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
            body = await read_body(receive, self._routing.limits.max_body_mib)
            body = body if body is None else await self._rewrite(body, receive)
            if body is not None:
                return {"type": "http.request", "body": body, "more_body": False}
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

    async def _rewrite(self, body: bytes, receive: Receive) -> bytes | None:
        """Return the body with the adapter's name as ``model``; as it is where nothing is to be routed.

        None where vLLM is to see no body: the client has gone, or ``_answer`` holds the answer.
        """
        if self._caller.tenant:
            _check_name(self._routing, self._caller, body)
        payload = parse_routed(body)
        if payload is None:
            return body
        if self._path in UNROUTED:
            raise Refusal(
                400, f"{VIRTUAL_NAME} does not route here: name an adapter, or {BASE_NAME}", "model"
            )
        if self._path in AS_BASE:
            return _named(payload, BASE_NAME)
        asked = conversations(self._path, payload, self._routing.decode)
        if not asked:
            return body
        start = time.perf_counter()
        decisions = await _decide(self._routing, asked, self._caller)
        overload = "overload" if decisions[0] is OVERLOAD else None
        metrics.decided(decisions, time.perf_counter() - start, overload)
        self._headers = _headers(decisions, _ms_since(start))
        models = [decision.model for decision in decisions]
        if REJECT in models:
            self._adapters = (REJECT,)
            raise Refusal(
                422, "no task cluster is near this prompt, and this server answers no others", code=NO_CLUSTER
            )
        adapters = tuple(dict.fromkeys(models))
        if len(adapters) > 1 and payload.get("stream"):
            found = ", ".join(adapters)
            raise Refusal(
                400, f"these prompts go to different adapters ({found}): stream them one by one", "stream"
            )
        self._adapters = adapters
        if len(adapters) == 1:
            return _named(payload, models[0])
        answer = await split.complete(self._app, self._scope, receive, payload, models)
        if answer is None:
            self._count()  # before vLLM answers nobody
        else:
            self._answer = replace(answer, headers=[*answer.headers, *self._headers])
        return None

    def _count(self) -> None:
        """Count the request, once for each adapter that it asked."""
        status = self._answer.status if self._answer is not None else self._status
        for adapter in self._adapters:
            metrics.answered(adapter, status)
        self._adapters = ()

    async def _send(self, send: Send, answer: Answer) -> None:
        if not self._answered:
            self._answered = True
            await send_answer(send, answer)


async def _decide(routing: Routing, asked: Sequence[Sequence[str]], caller: Caller) -> list[Decision]:
    """Decide for each conversation, among the task clusters of the caller; for all of them or none."""
    _check_client(routing, caller)
    try:
        return await conversation.decide(asked, lambda texts: routing.decide(texts, caller.client))
    except Overloaded:
        if REJECT in (routing.limits.overload, routing.fallback):
            raise Refusal(503, "too many requests wait to be routed: try again later", retry_s=1) from None
        return [OVERLOAD for _ in asked]


def _check_client(routing: Routing, caller: Caller) -> None:
    if caller.client is not None and caller.client not in routing.clients:
        raise Refusal(
            404, f"no task cluster holds rows of client {caller.client}: see {CLIENT_HEADER}", CLIENT_HEADER
        )


def _check_name(routing: Routing, caller: Caller, body: bytes) -> None:
    """Refuse a tenant every adapter that is not of its own task clusters, as if it were not there."""
    payload = parse(body)
    if payload is None:
        raise Refusal(400, "the body must be a JSON object")
    model = payload.get("model")
    if isinstance(model, str) and model and model not in _names(routing, caller):
        raise Refusal(404, f"The model `{model}` does not exist.", "model")


def _names(routing: Routing, caller: Caller) -> set[str | None]:
    """Return the names that mean something to a tenant."""
    adapters = {cluster.adapter for cluster in routing.clusters(caller.client)}
    return adapters | {BASE_NAME, VIRTUAL_NAME, routing.bundle.generalist}


def _named(payload: dict[str, Any], model: str) -> bytes:
    return json.dumps({**payload, "model": model}).encode()


def _headers(decisions: Sequence[Decision], routing_ms: float) -> Headers:
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
    }
    return [(f"x-fedrouter-{name}".encode(), value.encode()) for name, value in values.items()]


def _ms_since(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 3)
