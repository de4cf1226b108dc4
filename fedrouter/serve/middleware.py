"""The request hook for vLLM's ``--middleware``: pure ASGI; rewrites ``model`` and streams the rest untouched.

The life of a request:

1. The hook sees it before vLLM's own authentication. A request without the API key that its path needs is
   refused before its body is read (``access.py``). All but POSTs to the paths in ``paths.py`` pass untouched.
2. vLLM checks the API key again.
3. vLLM reads the body through the hook's ``receive``. A body that names an adapter or the base passes
   unchanged; one that names ``fedrouter`` or no model is routed.
4. The conversation's text is embedded off the event loop, in one batch with other waiting requests.
5. The router picks the adapter, and its name replaces ``model`` in the body. A list of prompts for several
   adapters becomes one request per adapter, and the responses are merged (``split.py``).
6. vLLM responds; the hook's ``send`` adds headers to the response and passes the rest on.

The settings are read at lifespan start-up (``settings.py``). A reload (``reload.py``) replaces the bundle, on
request or when a watched link changes (``watch.py``); requests in flight keep the bundle they began with.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from fedrouter.errors import FedRouterError
from fedrouter.serve import engine, metrics
from fedrouter.serve.access import Access, Caller, load_access
from fedrouter.serve.asgi import (
    Answer,
    App,
    Inner,
    Message,
    Receive,
    Refusal,
    Scope,
    Send,
    collect,
    json_answer,
    path_of,
    refused,
    send_answer,
    upgrades,
)
from fedrouter.serve.bodies import Bodies
from fedrouter.serve.canary import Readiness
from fedrouter.serve.console import Console
from fedrouter.serve.cors import Replies
from fedrouter.serve.decision_log import DecisionLog
from fedrouter.serve.journal import Journal
from fedrouter.serve.own import OwnEndpoints
from fedrouter.serve.paths import AS_BASE, MODELS, ROUTED, UNROUTED, is_admin, is_own
from fedrouter.serve.reload import Reloader
from fedrouter.serve.request import RoutedRequest, known_names
from fedrouter.serve.routing import Routing, load_routing
from fedrouter.serve.second import Second, load_second
from fedrouter.serve.settings import Settings, read_settings
from fedrouter.serve.watch import Watch

logger = logging.getLogger("vllm.fedrouter")  # a child of vLLM's logger, so that it appears in vLLM's output


class FedRouterMiddleware:
    """Routes requests for the virtual model ``fedrouter``; see the module's docstring."""

    def __init__(
        self,
        app: App,
        settings: Callable[[], Settings] = read_settings,
        load: Callable[[Settings], Routing] = load_routing,
        load_access: Callable[[Settings], Access] = load_access,
        load_second: Callable[[Settings, Routing], Second | None] = load_second,
    ):
        self.app = app
        self._read_settings, self._load = settings, load
        self._load_access, self._load_second = load_access, load_second
        self._routing: Routing | None = None
        self.second: Second | None = None
        self._access, self._replies, self.journal = Access(), Replies(), Journal()
        self._console = Console(False)
        self._watch: Watch | None = None
        self.readiness, self.reloader = Readiness(), Reloader()

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
        if (page := self._console.answer(method, path)) is not None:
            return await send_answer(send, page)
        try:
            caller, scope = self._access.admit(scope)
            if is_admin(scope["path"]):
                raise Refusal(404, "Not Found")
            if method == "POST" and path in (*ROUTED, *AS_BASE, *UNROUTED):
                with self.routing.in_use() as routing:
                    request = RoutedRequest(
                        self.app,
                        routing,
                        self.second,
                        self._bodies,
                        self._replies,
                        self.journal,
                        path,
                        caller,
                    )
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
        """State of readiness: "starting", "ready" or "failed"."""
        return self.readiness.state

    @property
    def routing(self) -> Routing:
        """The bundle in use."""
        assert self._routing is not None, "FedRouterMiddleware needs a server that runs the lifespan protocol"
        return self._routing

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters of the second bundle, which a reload must not unload."""
        return frozenset(self.second.adapters if self.second else ())

    async def reload(self, inner: Inner, name: Any) -> dict[str, Any]:
        """Serve another bundle; see ``Reloader.reload``."""
        return await self.reloader.reload(inner, self.routing, name, self._switch, self.pinned)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start up before the application does: a server that cannot route must not start."""
        startup: list[Message] = [await receive()]
        try:
            settings = self._read_settings()
            self._access = self._load_access(settings)
            self._console = Console(settings.console)
            self._watch = Watch(settings.watch) if settings.watch else None
            self.reloader = Reloader(settings.bundle_root)
            self.journal = Journal(DecisionLog(settings.log, metrics.LOG_LOST.inc) if settings.log else None)
            self._routing = await asyncio.to_thread(self._load, settings)
            self.second = await asyncio.to_thread(self._load_second, settings, self._routing)
        except Exception as error:  # if it propagated, uvicorn would assume "no lifespan" and serve
            if not isinstance(error, FedRouterError):
                logger.exception("FedRouter cannot start")
            return await send({"type": "lifespan.startup.failed", "message": f"FedRouter: {error}"})
        self._bodies = Bodies(self.routing.limits)
        self._own = OwnEndpoints(self.app, self, self._bodies)
        self._switch(self.routing)

        async def replay() -> Message:
            return startup.pop() if startup else await receive()

        async def watching_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                inner = Inner(self.app, scope, engine.own_authorization(scope))
                self._replies = Replies(engine.cors_options(scope))
                self.readiness.prove(inner, self.routing, self.pinned)
                self._follow(inner)
            await send(message)

        try:
            await self.app(scope, replay, watching_send)
        finally:
            self.readiness.close()
            if self._watch is not None:
                self._watch.close()
            self.routing.close()
            if self.second is not None:
                self.second.routing.close()
            self.journal.close()

    def _follow(self, inner: Inner) -> None:
        if self._watch is not None:
            self._watch.start(
                self.routing.bundle.path.resolve(),
                lambda: self.state == "ready" and not self.reloader.busy,
                lambda name: self.reload(inner, name),
            )

    def _switch(self, routing: Routing) -> None:
        self._routing = routing
        logger.info(
            "FedRouter routes to %d adapters of %s", len(routing.bundle.clusters), routing.bundle.path
        )

    async def _models(self, scope: Scope, receive: Receive, caller: Caller) -> Answer:
        """Return vLLM's list of models, without those that the tenant may not name."""
        answer = await collect(self.app, scope, receive)
        if answer.status != 200:
            return answer
        listed, known = json.loads(answer.body), known_names(self.routing, caller, self.second)
        listed["data"] = [model for model in listed["data"] if model["id"] in known]
        return json_answer(200, listed)


def _closing(send: Send) -> Send:
    """Close the connection after the response: a declined upgrade may leave it stuck."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return closing
