"""A small reverse proxy between the hook and vLLM servers that hold the adapters.

The life of a request, after the hook has chosen the adapter:

1. If the server has an API key and the request does not, it is refused before its body is read.
2. It goes to the healthy upstream with the fewest requests in flight, over a kept-alive connection.
3. An upstream that fails before its response begins is left out until it is healthy; the next one is tried.
4. The response is streamed to the client. If the client leaves, the request to the upstream is cancelled.
"""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client import make_asgi_app

from fedrouter.serve.asgi import (
    App,
    Receive,
    Refusal,
    Scope,
    Send,
    disconnected,
    header_values,
    json_answer,
    path_of,
    refused,
    send_answer,
)
from fedrouter.serve.bodies import Bodies
from fedrouter.serve.limits import Limits
from fedrouter.serve.paths import HEALTH, METRICS, MODELS, OPEN

CHECK_S = 2.0
CONNECT_S = 5.0
RETRIED = (404, 502, 503, 504)  # try another upstream; 404: adapters have changed since the last check
HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"content-length",
}  # fmt: skip
logger = logging.getLogger("vllm.fedrouter.proxy")


@dataclass(eq=False)
class Upstream:
    """One vLLM server."""

    url: str
    healthy: bool = False
    num_in_flight: int = 0
    problem: str = ""  # last logged


class Proxy:
    """An ASGI application that forwards requests to upstream servers.

    Parameters
    ----------
    urls : addresses of the upstream servers, ``http://HOST:PORT``.
    models : names that an upstream must list to be healthy.
    api_key : required of clients and sent to the upstreams; None: clients' headers are forwarded unchecked.
    """

    def __init__(self, urls: Sequence[str], models: Sequence[str], api_key: str | None, limits: Limits):
        self.upstreams = [Upstream(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self._models, self._bodies = frozenset(models), Bodies(limits)
        self._authorization = f"Bearer {api_key}".encode() if api_key else None
        self._metrics: App = make_asgi_app()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),  # generation may take any time
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            trust_env=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} connections are not forwarded")
        elif scope["path"] == METRICS:
            await self._metrics(scope, receive, send)
        elif scope["path"] == HEALTH:
            healthy = any(upstream.healthy for upstream in self.upstreams)
            await send_answer(send, json_answer(200 if healthy else 503, {}))
        elif not self._is_authorized(scope):
            refusal = Refusal(401, "this path needs the server's API key: send Authorization: Bearer KEY")
            await send_answer(send, refused(refusal, path_of(scope)))
        else:
            await self._forward(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        if self._authorization is None or scope["path"] in OPEN:
            return True
        given = next(iter(header_values(scope, "authorization")), "").encode("latin-1")
        return hmac.compare_digest(given, self._authorization)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        checks = [asyncio.create_task(self._watch(upstream)) for upstream in self.upstreams]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for check in checks:
            check.cancel()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._bodies.work() as work:
                body = await work.read(receive)
        except Refusal as refusal:
            return await send_answer(send, refused(refusal, path_of(scope)))
        if body is None:
            return None
        answering = asyncio.create_task(self._answer(scope, body, send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        return None

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        tried: set[Upstream] = set()
        while upstream := self._pick(tried):
            tried.add(upstream)
            async with self._ask(upstream, scope, body) as answer:
                if answer is None or (answer.status_code in RETRIED and self._pick(tried)):
                    continue
                headers = [(name.lower(), value) for name, value in answer.headers.raw]
                length = [(name, value) for name, value in headers if name == b"content-length"]
                headers = [*_end_to_end(headers), *length]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
                try:
                    async for piece in answer.aiter_raw():
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except httpx.TransportError as error:  # too late for another upstream
                    self._leave_out(upstream, f"{error or type(error).__name__}")
                    raise ConnectionError(f"{upstream.url} broke off its response") from error
                return await send({"type": "http.response.body", "body": b""})
        unavailable = Refusal(503, "no upstream server is available: try again later", retry_s=2)
        return await send_answer(send, refused(unavailable, path_of(scope)))

    def _pick(self, tried: set[Upstream]) -> Upstream | None:
        candidates = [upstream for upstream in self.upstreams if upstream.healthy and upstream not in tried]
        return min(candidates, key=lambda upstream: upstream.num_in_flight, default=None)

    @contextlib.asynccontextmanager
    async def _ask(
        self, upstream: Upstream, scope: Scope, body: bytes
    ) -> AsyncIterator[httpx.Response | None]:
        """Yield the begun response; None if the connection fails."""
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
        request = self._client.build_request(
            scope["method"],
            f"{upstream.url}{path}{'?' if query else ''}{query}",
            content=body,
            headers=_end_to_end(scope["headers"]),
        )
        upstream.num_in_flight += 1
        try:
            try:
                answer = await self._client.send(request, stream=True)
            except httpx.TransportError as error:
                self._leave_out(upstream, f"{error or type(error).__name__}")
                yield None
                return
            try:
                yield answer
            finally:
                await answer.aclose()
        finally:
            upstream.num_in_flight -= 1

    def _leave_out(self, upstream: Upstream, problem: str) -> None:
        if upstream.healthy or problem != upstream.problem:
            logger.warning("upstream %s is left out: %s", upstream.url, problem)
        upstream.healthy, upstream.problem = False, problem

    async def _watch(self, upstream: Upstream) -> None:
        """Check at intervals that an upstream is alive and lists the adapters."""
        headers = {"authorization": self._authorization.decode()} if self._authorization else {}
        while True:
            try:
                health = await self._client.get(f"{upstream.url}{HEALTH}", timeout=CONNECT_S)
                answer = await self._client.get(f"{upstream.url}{MODELS}", headers=headers, timeout=CONNECT_S)
                problem = _problem(health, answer, self._models)
            except httpx.TransportError as error:
                problem = f"{error or type(error).__name__}"
            if problem:
                self._leave_out(upstream, problem)
            elif not upstream.healthy:
                logger.info("upstream %s is healthy", upstream.url)
                upstream.healthy, upstream.problem = True, ""
            await asyncio.sleep(CHECK_S)


def _problem(health: httpx.Response, models: httpx.Response, wanted: frozenset[str]) -> str:
    """Return why an upstream is not healthy; empty if it is."""
    if health.status_code != 200 or models.status_code != 200:
        return f"{HEALTH} returns {health.status_code}, {MODELS} {models.status_code}"
    try:
        listed: set[Any] = {card["id"] for card in models.json()["data"]}
    except (ValueError, KeyError, TypeError):
        return f"{MODELS} returns no list of models"
    missing = sorted(wanted - listed)
    return f"it does not serve {', '.join(missing)}" if missing else ""


def _end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]
