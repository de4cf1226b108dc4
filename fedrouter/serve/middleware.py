"""The request hook for vLLM's ``--middleware``: pure ASGI, rewrites ``model``, streams untouched.

The life of a request:

1. It reaches this hook before vLLM's own authentication. Without a key that the path needs it ends here: its
   body is not read, nothing is embedded (``access.py``). What is no POST to a path of ours goes on untouched.
2. vLLM checks the API key as well.
3. vLLM reads the body through our ``receive``. One that names another model goes on as it is; one that
   names none asks to be routed.
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
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fedrouter.errors import FedRouterError
from fedrouter.serve import engine
from fedrouter.serve.access import Access, Caller, load_access
from fedrouter.serve.asgi import (
    Answer,
    App,
    Inner,
    Message,
    Receive,
    Scope,
    Send,
    collect,
    header_values,
    json_answer,
    path_of,
    reason,
    refused,
    upgrades,
)
from fedrouter.serve.bodies import Bodies, parse
from fedrouter.serve.canary import Readiness
from fedrouter.serve.cors import Replies
from fedrouter.serve.paths import (
    AS_BASE,
    CHAT,
    CLUSTERS,
    COMPLETIONS,
    DRY_RUN,
    MODELS,
    OWN_METHODS,
    READY,
    RELOAD,
    ROUTED,
    UNROUTED,
    is_admin,
    is_own,
)
from fedrouter.serve.prompts import conversations
from fedrouter.serve.refusal import Refusal
from fedrouter.serve.reload import Reloader
from fedrouter.serve.request import RoutedRequest, check_client, decide, known_names, ms_since
from fedrouter.serve.routing import Routing, load_routing
from fedrouter.serve.watch import Watch

logger = logging.getLogger("vllm.fedrouter")  # below vLLM's logger, so that it appears in its output

Endpoint = Callable[[Inner, Scope, Receive, Caller], Awaitable[Any]]
Read = TypeVar("Read")


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
        self._access, self._replies = Access(), Replies()
        self._readiness, self._reloader, self._watch = Readiness(), Reloader(), Watch.from_env()
        self._endpoints: dict[str, Endpoint] = {
            CLUSTERS: self._clusters,
            DRY_RUN: self._dry_run,
            RELOAD: self._reload,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], path_of(scope)
        if upgrades(scope):
            send = _closing(send)
        try:
            caller, scope = self._access.admit(scope)
            if is_admin(scope["path"]):
                raise Refusal(404, "Not Found")
            if method == "POST" and path in (*ROUTED, *AS_BASE, *UNROUTED):
                with self.routing.in_use() as routing:
                    request = RoutedRequest(self.app, routing, self._bodies, self._replies, path, caller)
                    await request(scope, receive, send)
            elif is_own(path) and method != "OPTIONS":
                await self._replies(scope, send, await self._own(scope, receive, caller))
            elif (method, path) == ("GET", MODELS) and caller.tenant:
                await self._replies(scope, send, await self._models(scope, receive, caller))
            else:
                await self.app(scope, receive, send)
        except Refusal as refusal:
            await self._replies(scope, send, refused(refusal, path))

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
        self._bodies = Bodies(self.routing.limits)
        self._flip(self.routing)

        async def replay() -> Message:
            return startup.pop() if startup else await receive()

        async def watching_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                inner = Inner(self.app, scope, engine.own_authorization(scope))
                self._replies = Replies(engine.cors_options(scope))
                self._readiness.prove(inner, self.routing)
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

    async def _own(self, scope: Scope, receive: Receive, caller: Caller) -> Answer:
        """Answer an endpoint of our own; all but one for those only whom the server lets list its models."""
        path = path_of(scope)
        if path not in OWN_METHODS:
            raise Refusal(404, f"{path}: not found; there are {', '.join(OWN_METHODS)}")
        if scope["method"] != OWN_METHODS[path]:
            allowed = ((b"allow", OWN_METHODS[path].encode()),)
            raise Refusal(405, f"{path} takes {OWN_METHODS[path]} only", headers=allowed)
        if path == READY:
            return self._readiness.answer()
        shown = next(iter(header_values(scope, "authorization")), None)
        inner = Inner(self.app, scope, shown.encode("latin-1") if shown is not None else None)
        verdict = await inner.ask("GET", MODELS)
        if verdict.status != 200:
            raise Refusal(verdict.status, reason(verdict.payload))
        return json_answer(200, await self._endpoints[path](inner, scope, receive, caller))

    async def _models(self, scope: Scope, receive: Receive, caller: Caller) -> Answer:
        """List those models only that a tenant may name."""
        answer = await collect(self.app, scope, receive)
        if answer.status != 200:
            return answer
        listed, known = json.loads(answer.body), known_names(self.routing, caller)
        listed["data"] = [model for model in listed["data"] if model["id"] in known]
        return json_answer(200, listed)

    async def _clusters(self, _inner: Inner, _scope: Scope, _receive: Receive, caller: Caller) -> Any:
        check_client(self.routing, caller)
        bundle = self.routing.bundle
        shown = ["name", "adapter", "radius"]
        if not caller.tenant:  # who else is there, and with how much, is not a tenant's business
            shown += ["num_examples", "task_counts", "clients"]
        clusters = [
            {name: getattr(cluster, name) for name in shown}
            | ({"clients": [caller.client]} if caller.tenant else {})
            for cluster in self.routing.clusters(caller.client)
        ]
        return {
            "bundle": {"name": bundle.path.name, "sha256": self.routing.digest},
            "base": asdict(bundle.base),
            "fallback": self.routing.fallback,
            "clusters": clusters,
        }

    async def _dry_run(self, _inner: Inner, _scope: Scope, receive: Receive, caller: Caller) -> Any:
        with self.routing.in_use() as routing:

            def look(body: bytes) -> list[list[str]]:
                payload = parse(body)
                path = CHAT if "messages" in payload else COMPLETIONS
                return conversations(path, payload, routing.decode)

            asked = await self._read(receive, caller, look)
            if len(asked) != 1:
                raise Refusal(400, 'send {"prompt": "one prompt"} or {"messages": [...]}', "prompt")
            start = time.perf_counter()
            [decision] = await decide(routing, asked, caller)
        return {**asdict(decision), "routing_ms": ms_since(start)}

    async def _reload(self, inner: Inner, scope: Scope, receive: Receive, caller: Caller) -> Any:
        kind = next(iter(header_values(scope, "content-type")), "")
        if not kind.startswith("application/json"):  # a web form must not do it
            raise Refusal(415, "send application/json")
        payload = await self._read(receive, caller, parse)
        return await self._reloader.reload(inner, self.routing, payload.get("bundle"), self._flip)

    async def _read(self, receive: Receive, caller: Caller, look: Callable[[bytes], Read]) -> Read:
        """Return what ``look`` sees in the request's body."""
        with self._bodies.work(caller.whose) as work:
            body = await work.read(receive) or b""
            return await self._bodies.off_loop(len(body), lambda: look(body))


def _closing(send: Send) -> Send:
    """Close the connection behind the answer: an upgrade offered and not taken may leave it stuck."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return closing
