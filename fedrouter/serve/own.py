"""The hook's own endpoints, below ``/v1/fedrouter``."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs

from fedrouter.serve import metrics
from fedrouter.serve.access import Caller
from fedrouter.serve.asgi import (
    Answer,
    App,
    Inner,
    Receive,
    Refusal,
    Scope,
    header_values,
    json_answer,
    path_of,
    reason,
)
from fedrouter.serve.bodies import Bodies, parse
from fedrouter.serve.paths import (
    BUNDLES,
    CHAT,
    CLUSTERS,
    COMPLETIONS,
    DECISIONS,
    DRY_RUN,
    FEEDBACK,
    MODELS,
    NUMBERS,
    OWN_METHODS,
    READY,
    RELOAD,
)
from fedrouter.serve.prompts import conversations
from fedrouter.serve.request import check_client, ms_since, route_conversations
from fedrouter.types import Array

if TYPE_CHECKING:
    from fedrouter.serve.middleware import FedRouterMiddleware

Endpoint = Callable[[Inner, Scope, Receive, Caller], Awaitable[Any]]
Read = TypeVar("Read")


class OwnEndpoints:
    """Handles the hook's own paths; all but READY need a key with which vLLM lists its models."""

    def __init__(self, app: App, hook: "FedRouterMiddleware", bodies: Bodies):
        self._app, self._hook, self._bodies = app, hook, bodies
        self._endpoints: dict[str, Endpoint] = {
            CLUSTERS: self._clusters,
            DRY_RUN: self._dry_run,
            RELOAD: self._reload,
            FEEDBACK: self._feedback,
            DECISIONS: self._decisions,
            NUMBERS: self._numbers,
            BUNDLES: self._bundles,
        }

    async def __call__(self, scope: Scope, receive: Receive, caller: Caller) -> Answer:
        """Return the response to a request below ``/v1/fedrouter``.

        Raises
        ------
        Refusal
            For an unknown path, a wrong method, or a key that vLLM refuses.
        """
        path = path_of(scope)
        if path not in OWN_METHODS:
            raise Refusal(404, f"{path}: not found; the paths are {', '.join(OWN_METHODS)}")
        if scope["method"] != OWN_METHODS[path]:
            allowed = ((b"allow", OWN_METHODS[path].encode()),)
            raise Refusal(405, f"{path} allows {OWN_METHODS[path]} only", headers=allowed)
        if path == READY:
            return self._hook.readiness.answer()
        given = next(iter(header_values(scope, "authorization")), None)
        inner = Inner(self._app, scope, given.encode("latin-1") if given is not None else None)
        models = await inner.ask("GET", MODELS)
        if models.status != 200:
            raise Refusal(models.status, reason(models.payload))
        return json_answer(200, await self._endpoints[path](inner, scope, receive, caller))

    async def _clusters(self, _inner: Inner, _scope: Scope, _receive: Receive, caller: Caller) -> Any:
        routing, second = self._hook.routing, self._hook.second
        check_client(routing, caller)
        bundle = routing.bundle
        fields = ["name", "adapter", "radius"]
        if not caller.tenant:  # tenants must not learn of other clients and the size of their data
            fields += ["num_examples", "task_counts", "clients"]
        clusters = [
            {name: getattr(cluster, name) for name in fields}
            | ({"clients": [caller.client]} if caller.tenant else {})
            | {"at": routing.centroids_at(cluster)}
            for cluster in routing.clusters(caller.client)
        ]
        payload: dict[str, Any] = {
            "bundle": {"name": bundle.path.name, "sha256": routing.digest},
            "base": asdict(bundle.base),
            "fallback": routing.fallback,
            "generalist": bundle.generalist,
            "clusters": clusters,
            "operator": not caller.tenant,
        }
        if not caller.tenant:
            payload |= {
                "embedder": asdict(bundle.embedder),
                "rank": bundle.rank,
                "versions": dict(bundle.versions),
                "num_probes": len(bundle.probes),
                "second": second
                and {
                    "name": second.routing.bundle.path.name,
                    "sha256": second.routing.digest,
                    "share": second.share,
                },
            }
        return payload

    async def _dry_run(self, _inner: Inner, _scope: Scope, receive: Receive, caller: Caller) -> Any:
        with self._hook.routing.in_use() as routing:

            def extract(body: bytes) -> list[list[str]]:
                payload = parse(body)
                path = CHAT if "messages" in payload else COMPLETIONS
                return conversations(path, payload, routing.decode)

            user_turns = await self._read(receive, caller, extract)
            if len(user_turns) != 1:
                raise Refusal(400, 'send {"prompt": "one prompt"} or {"messages": [...]}', "prompt")
            second = self._hook.second
            used = second.routing if second and second.answers(user_turns, caller) else routing
            start, vectors = time.perf_counter(), dict[str, Array]()
            [decision] = await route_conversations(used, user_turns, caller, vectors)
            turns = user_turns[0]
            vector = vectors.get(turns[decision.turn]) if turns else None
        # The map is of the first bundle; a decision of the second has no place on it.
        at = routing.place(vector) if vector is not None and used.digest == routing.digest else None
        return {
            **asdict(decision),
            "bundle": used.digest[:12],
            "radii": {one.name: one.radius for one in used.bundle.clusters if one.name in decision.distances},
            "turns": len(turns),
            "at": at,
            "routing_ms": ms_since(start),
        }

    async def _reload(self, inner: Inner, scope: Scope, receive: Receive, caller: Caller) -> Any:
        kind = next(iter(header_values(scope, "content-type")), "")
        if not kind.startswith("application/json"):  # a web form on another site must not cause a reload
            raise Refusal(415, "send application/json")
        payload = await self._read(receive, caller, parse)
        if payload.get("check"):
            return await self._hook.reloader.check(
                inner, self._hook.routing, payload.get("bundle"), self._hook.pinned
            )
        return await self._hook.reload(inner, payload.get("bundle"))

    async def _feedback(self, _inner: Inner, _scope: Scope, receive: Receive, caller: Caller) -> Any:
        return await self._hook.journal.feedback(caller, await self._read(receive, caller, parse))

    async def _decisions(self, _inner: Inner, scope: Scope, _receive: Receive, caller: Caller) -> Any:
        limit = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("limit", ["100"])[0]
        if not (limit.isascii() and limit.isdigit()):
            raise Refusal(400, "limit must be a whole number", "limit")
        return {"decisions": self._hook.journal.recent(caller, int(limit[:9]))}

    async def _numbers(self, _inner: Inner, _scope: Scope, _receive: Receive, _caller: Caller) -> Any:
        return {"state": self._hook.state, "samples": metrics.samples()}

    async def _bundles(self, _inner: Inner, _scope: Scope, _receive: Receive, _caller: Caller) -> Any:
        return {"served": self._hook.routing.bundle.path.name, "bundles": self._hook.reloader.bundle_names()}

    async def _read(self, receive: Receive, caller: Caller, extract: Callable[[bytes], Read]) -> Read:
        """Read the request's body; return what ``extract`` returns for it."""
        with self._bodies.work(caller.tenant_name) as work:
            body = await work.read(receive) or b""
            return await self._bodies.off_loop(len(body), lambda: extract(body))
