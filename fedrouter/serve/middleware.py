"""The request hook for vLLM's ``--middleware``: pure ASGI, rewrites ``model``, streams untouched.

The life of a request:

1. It reaches this hook before vLLM's own authentication. What is no POST to a routed path goes on untouched.
2. vLLM checks the API key. Without it the request ends there: its body is not read, nothing is embedded.
3. vLLM reads the body through our ``receive``. One that does not name the virtual model goes on as it is.
4. The prompt's text is embedded off the event loop, together with those of requests that wait at that moment.
5. The router picks the adapter; the body goes to vLLM with the adapter's name as ``model``.
6. vLLM answers; our ``send`` adds headers to the start of the answer and lets everything else through.

What to serve is read from the environment at lifespan start-up, once: see ``routing.load_routing``.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import quote

from fedrouter.errors import FedRouterError
from fedrouter.serve import engine, metrics
from fedrouter.serve.asgi import (
    App,
    Inner,
    Message,
    Receive,
    Scope,
    Send,
    read_body,
    send_json,
    send_refusal,
    whole,
)
from fedrouter.serve.bodies import CHAT, COMPLETIONS, Refusal, parse_routed, routed_texts
from fedrouter.serve.canary import READY, Readiness
from fedrouter.serve.reload import Reloader, is_admin
from fedrouter.serve.routing import OVERLOAD, Routing, load_routing
from fedrouter.types import Decision

CLUSTERS, DRY_RUN, MODELS = "/v1/fedrouter/clusters", "/v1/fedrouter/route", "/v1/models"
RELOAD = "/v1/fedrouter/reload"
logger = logging.getLogger("vllm.fedrouter")  # below vLLM's logger, so that it appears in its output


class FedRouterMiddleware:
    """Route requests for the virtual model ``fedrouter``; see the module's docstring."""

    def __init__(self, app: App, load: Callable[[], Routing] = load_routing):
        self.app = app
        self._load = load
        self._routing: Routing | None = None
        self._readiness, self._reloader = Readiness(), Reloader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope.get("method"), scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif is_admin(scope["path"]):
            await send_refusal(send, Refusal(404, "Not Found", kind="NotFoundError"))
        elif route in (("POST", CHAT), ("POST", COMPLETIONS)):
            with self.routing.in_use() as routing:
                await _RoutedRequest(self.app, routing, route[1])(scope, receive, send)
        elif route == ("GET", READY):
            await send_json(send, *self._readiness.answer())
        elif route == ("POST", RELOAD):
            await self._answer(scope, receive, send, partial(self._reload, scope))
        elif route == ("GET", CLUSTERS):
            await self._answer(scope, receive, send, self._clusters)
        elif route == ("POST", DRY_RUN):
            await self._answer(scope, receive, send, self._dry_run)
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
            self._routing = await asyncio.to_thread(self._load)
        except Exception as error:  # raised further, uvicorn would take it for "no lifespan" and serve
            if not isinstance(error, FedRouterError):
                logger.exception("FedRouter cannot start")
            return await send({"type": "lifespan.startup.failed", "message": f"FedRouter: {error}"})
        logger.info(
            "FedRouter routes to %d adapters of %s",
            len(self.routing.bundle.clusters),
            self.routing.bundle.path,
        )

        async def replay() -> Message:
            return startup.pop() if startup else await receive()

        async def watching_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                inner = Inner(self.app, scope, engine.own_authorization(scope))
                self._readiness.prove(inner, [cluster.adapter for cluster in self.routing.bundle.clusters])
            await send(message)

        try:
            await self.app(scope, replay, watching_send)
        finally:
            self._readiness.close()
            self.routing.close()

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, endpoint: Callable[[Receive], Awaitable[Any]]
    ) -> None:
        """Answer an endpoint of our own, for those only whom the server lets list its models."""
        path = scope.get("root_path", "") + MODELS
        verdict: list[Message] = []

        async def judge(message: Message) -> None:
            verdict.append(message)

        question = {**scope, "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        await self.app(question, whole(b""), judge)
        if verdict[0]["status"] != 200:
            for message in verdict:
                await send(message)
            return
        try:
            await send_json(send, 200, await endpoint(receive))
        except Refusal as refusal:
            await send_refusal(send, refusal)

    async def _clusters(self, _receive: Receive) -> Any:
        bundle = self.routing.bundle
        shown = ("name", "adapter", "num_examples", "task_counts", "clients", "radius")
        return {
            "bundle": {"name": bundle.path.name, "sha256": self.routing.digest},
            "base": asdict(bundle.base),
            "fallback": bundle.fallback,
            "clusters": [{name: getattr(cluster, name) for name in shown} for cluster in bundle.clusters],
        }

    async def _reload(self, scope: Scope, receive: Receive) -> Any:
        headers = dict(scope["headers"])
        if not headers.get(b"content-type", b"").startswith(b"application/json"):  # a web form must not do it
            raise Refusal(415, "send application/json", kind="UnsupportedMediaTypeError")
        payload = await self._payload(receive)
        inner = Inner(self.app, scope, headers.get(b"authorization"))
        return await self._reloader.reload(inner, self.routing, payload.get("bundle"), self._flip)

    def _flip(self, routing: Routing) -> None:
        self._routing = routing
        logger.info(
            "FedRouter routes to %d adapters of %s", len(routing.bundle.clusters), routing.bundle.path
        )

    async def _payload(self, receive: Receive) -> dict[str, Any]:
        body = await read_body(receive, self.routing.limits)
        try:
            payload = json.loads(body or b"")
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "the body is not valid JSON") from error
        if not isinstance(payload, dict):
            raise Refusal(400, "the body must be a JSON object")
        return payload

    async def _dry_run(self, receive: Receive) -> Any:
        payload = await self._payload(receive)
        texts = routed_texts(CHAT if "messages" in payload else COMPLETIONS, payload, self.routing.decode)
        if texts is None or len(texts) != 1:
            raise Refusal(400, 'send {"prompt": "one prompt"} or {"messages": [...]}', "prompt")
        start = time.perf_counter()
        with self.routing.in_use() as routing:
            [decision] = await routing.decide(texts)
        return {**asdict(decision), "routing_ms": _ms_since(start)}


class _RoutedRequest:
    """One request to a routed path: reads its body when vLLM does, marks its answer."""

    def __init__(self, app: App, routing: Routing, path: str):
        self._app, self._routing, self._path = app, routing, path
        self._read = self._answered = False
        self._adapter: str | None = None  # what answers, once that is decided
        self._status: int | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._refusal: Refusal | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def rewriting_receive() -> Message:
            return await receive() if self._read else await self._receive(receive)

        async def marking_send(message: Message) -> None:
            if self._refusal is not None:  # what vLLM says of the body that it did not get is of no interest
                await self._refuse(send)
            elif message["type"] == "http.response.start":
                self._status = message["status"]
                await send({**message, "headers": [*message.get("headers", ()), *self._headers]})
            else:
                await send(message)

        try:
            await self._app(scope, rewriting_receive, marking_send)
        except Exception:
            if self._refusal is None:
                raise
        finally:
            if self._adapter is not None and self._refusal is None:
                metrics.answered(self._adapter, self._status)
        if self._refusal is not None:
            await self._refuse(send)

    async def _receive(self, receive: Receive) -> Message:
        self._read = True
        try:
            body = await read_body(receive, self._routing.limits)
            if body is not None:
                return {"type": "http.request", "body": await self._rewrite(body), "more_body": False}
        except Refusal as refusal:
            self._refusal = refusal
        except Exception:
            logger.exception("routing failed")
            self._refusal = Refusal(500, "routing failed; the server's log says why")
        return {"type": "http.disconnect"}  # the client has gone, or is answered by us

    async def _rewrite(self, body: bytes) -> bytes:
        """Return the body with the adapter's name as ``model``; as it is where nothing is to be routed."""
        payload = parse_routed(body)
        texts = payload and routed_texts(self._path, payload, self._routing.decode)
        if not payload or not texts:
            return body
        start = time.perf_counter()
        decisions = await self._routing.decide(texts)
        overload = "overload" if decisions[0] is OVERLOAD else None
        metrics.decided(decisions, time.perf_counter() - start, overload)
        models = sorted({decision.model for decision in decisions})
        if len(models) > 1:
            found = ", ".join(models)
            raise Refusal(
                400, f"these prompts go to different adapters ({found}): send them one by one", "prompt"
            )
        self._adapter = models[0]
        self._headers = _headers(decisions[0], _ms_since(start))
        return json.dumps({**payload, "model": models[0]}).encode()

    async def _refuse(self, send: Send) -> None:
        if not self._answered:
            self._answered = True
            assert self._refusal is not None
            metrics.answered("", self._refusal.status)
            await send_refusal(send, self._refusal)


def _headers(decision: Decision, routing_ms: float) -> list[tuple[bytes, bytes]]:
    values = {
        "adapter": quote(
            decision.model, safe=" /:@+"
        ),  # a header takes no line breaks and no wide characters
        "cluster": quote(decision.cluster, safe=" /:@+"),
        "distance": f"{decision.distance:.6g}",
        "margin": f"{decision.margin:.6g}",
        "fallback": str(decision.fallback).lower(),
        "routing-ms": f"{routing_ms:.3f}",
    }
    return [(f"x-fedrouter-{name}".encode(), value.encode()) for name, value in values.items()]


def _ms_since(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 3)
