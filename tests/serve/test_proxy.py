"""The proxy before HTTP servers that stand in for vLLM: forwarding, streaming, failover, keys."""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from echo import KEY, PATIENT, TASKS, Answer, Server, WordEmbedder
from holder import HolderApp

from fedrouter.bundle import Bundle
from fedrouter.serve import canary, proxy
from fedrouter.serve.access import Access
from fedrouter.serve.checks import free_port
from fedrouter.serve.limits import Limits
from fedrouter.serve.proxy import Proxy
from fedrouter.serve.routing import Routing

COMPLETIONS, READY = "/v1/completions", "/v1/fedrouter/ready"


class UpstreamApp(HolderApp):
    """Also can be unhealthy, streams, and records the connections of requests."""

    def __init__(self, adapters: list[str]):
        super().__init__(adapters)
        self.status = 200
        self.asked: list[str] = []
        self.connections: set[Any] = set()
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await super().__call__(scope, receive, send)
        if scope["path"] == "/health":
            return await self._send(send, self.status, {})
        if scope["path"] == COMPLETIONS:
            self.asked.append(scope["path"])
            self.connections.add(scope["client"])
            if self.status != 200:
                return await self._send(send, self.status, {"error": "not now"})
        if scope["path"] == "/v1/stream":
            return await self._stream(receive, send)
        return await super().__call__(scope, receive, send)

    async def _stream(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-kind", b"stream")]})
        while (await receive()).get("more_body"):
            pass
        leaving = asyncio.create_task(receive())
        for number in range(100):
            piece = b"data: %d\n\n" % number
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            done, _ = await asyncio.wait({leaving}, timeout=0.05)
            if done:
                self.left.set()
                return
        await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application over HTTP while the block runs; yield its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(canary, "RETRY_S", 0.02)
    monkeypatch.setattr(proxy, "CHECK_S", 0.05)


@pytest.fixture
def apps(word_bundle: Bundle) -> list[UpstreamApp]:
    return [UpstreamApp(list(word_bundle.adapter_paths)) for _ in range(2)]


def front(
    bundle: Bundle, urls: list[str], fallback: str | None = None, access: Access | None = None
) -> Server:
    routing = Routing(bundle, WordEmbedder(), str, fallback, Limits(**PATIENT))
    proxy = Proxy(urls, ["base", *bundle.adapter_paths], KEY, Limits(max_body_mib=0.01))
    return Server(lambda: routing, proxy, access)


async def ready(server: Server) -> None:
    async with asyncio.timeout(20):
        while (await server.ask(READY, method="GET")).status != 200:
            await asyncio.sleep(0.02)


def ask(server: Server, prompt: Any, **options: Any) -> Any:
    return server.ask(COMPLETIONS, {"model": "fedrouter", "prompt": prompt}, **options)


def test_routes_to_an_upstream_over_kept_connections(
    word_bundle: Bundle, apps: list[UpstreamApp], adapter_of: Callable[[str], str]
) -> None:
    async def scenario(url: str) -> list[Answer]:
        async with front(word_bundle, [url]) as server:
            await ready(server)
            apps[0].connections.clear()
            dry = await server.ask("/v1/fedrouter/route", {"prompt": TASKS["summary"]})
            assert dry.json["model"] == adapter_of("summary")
            return [await ask(server, TASKS["summary"]) for _ in range(20)]

    with serving(apps[0]) as url:
        answers = asyncio.run(scenario(url))
    assert {answer.json["model"] for answer in answers} == {adapter_of("summary")}
    assert {answer.routing["adapter"] for answer in answers} == {adapter_of("summary")}
    assert len(apps[0].connections) <= 4


def test_an_upstream_that_dies_is_left_out_and_comes_back(
    word_bundle: Bundle, apps: list[UpstreamApp]
) -> None:
    async def scenario(urls: list[str]) -> list[Answer]:
        async with front(word_bundle, urls) as server:
            await ready(server)
            await asyncio.sleep(0.3)  # until both are healthy
            apps[0].status = 503
            answers = [await ask(server, TASKS["summary"]) for _ in range(10)]
            apps[1].asked.clear()
            apps[0].status, apps[1].status = 200, 503
            await asyncio.sleep(0.5)
            return answers + [await ask(server, TASKS["summary"]) for _ in range(10)]

    with serving(apps[0]) as one, serving(apps[1]) as two:
        answers = asyncio.run(scenario([one, two]))
    assert [answer.status for answer in answers] == [200] * 20
    assert not apps[1].asked


def test_requests_move_on_when_a_connection_breaks(word_bundle: Bundle, apps: list[UpstreamApp]) -> None:
    async def scenario(urls: list[str], stop: Callable[[], None]) -> list[Answer]:
        async with front(word_bundle, urls) as server:
            await ready(server)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(stop)
            return [await ask(server, TASKS["summary"]) for _ in range(10)]

    with contextlib.ExitStack() as stack, serving(apps[1]) as two:
        one = stack.enter_context(serving(apps[0]))
        answers = asyncio.run(scenario([one, two], stack.close))
    assert [answer.status for answer in answers] == [200] * 10


def test_without_healthy_upstreams_it_is_a_503(word_bundle: Bundle) -> None:
    async def scenario() -> list[Answer]:
        async with front(word_bundle, [f"http://127.0.0.1:{free_port()}"]) as server:
            await asyncio.sleep(0.1)
            return [
                await ask(server, TASKS["summary"]),
                await server.ask("/health", method="GET"),
                await server.ask(READY, method="GET"),
            ]

    answer, health, state = asyncio.run(scenario())
    assert (answer.status, health.status, state.status) == (503, 503, 503)
    assert answer.json["error"]["type"] == "ServiceUnavailableError"
    assert "retry-after" in answer.headers


def test_an_upstream_without_an_adapter_is_not_asked(
    word_bundle: Bundle, apps: list[UpstreamApp], caplog: pytest.LogCaptureFixture
) -> None:
    gone = word_bundle.clusters[0].adapter
    del apps[0].adapters[gone]

    async def scenario(urls: list[str]) -> list[Answer]:
        async with front(word_bundle, urls) as server:
            await ready(server)
            return [await ask(server, prompt) for prompt in TASKS.values()]

    with serving(apps[0]) as one, serving(apps[1]) as two:
        answers = asyncio.run(scenario([one, two]))
    assert [answer.status for answer in answers] == [200] * 3
    assert not apps[0].asked
    assert f"does not serve {gone}" in caplog.text


def test_the_key_is_asked_for_before_anything_is_read(word_bundle: Bundle, apps: list[UpstreamApp]) -> None:
    async def scenario(url: str) -> list[Answer]:
        async with front(word_bundle, [url]) as server:
            await ready(server)
            return [
                await ask(server, TASKS["summary"], key="wrong"),
                await ask(server, TASKS["summary"], key=None),
                await server.ask("/v1/models", method="GET", key=None),
                await server.ask("/v1/other", b"x" * 20_000),
                await server.ask("/metrics", method="GET", key=None),
            ]

    with serving(apps[0]) as url:
        wrong, none, models, large, metrics = asyncio.run(scenario(url))
    assert (wrong.status, none.status, models.status) == (401, 401, 401)
    assert (wrong.num_reads, none.num_reads) == (0, 0)
    assert large.status == 413
    assert b"fedrouter_requests_total" in b"".join(metrics.pieces)


def test_a_proxy_with_a_fallback_and_clients_keys(word_bundle: Bundle, apps: list[UpstreamApp]) -> None:
    access = Access(KEY, {hashlib.sha256(b"ann").hexdigest(): "a"})

    async def scenario(url: str) -> list[Answer]:
        async with front(word_bundle, [url], "generalist", access) as server:
            await ready(server)
            far = "zebra " * 50
            return [
                await ask(server, far, key="ann"),
                await ask(server, [far, TASKS["summary"]], key="ann"),
                await server.ask("/tokenize", {}, key="bob"),
                await server.ask("/v1/fedrouter/reload", {"bundle": "x"}, key="ann"),
                await server.ask("/v1/fedrouter/reload", {"bundle": "x"}),
                await server.ask("/v1/load_lora_adapter", {}),
                await server.ask("/v1/models", method="GET", key="ann"),
            ]

    with serving(apps[0]) as url:
        far, split, *others, models = asyncio.run(scenario(url))
    assert far.json["model"] == word_bundle.generalist
    assert split.json["model"].split(",") == [word_bundle.generalist, word_bundle.clusters[1].adapter]
    assert [answer.status for answer in others] == [401, 403, 409, 404]
    assert {card["id"] for card in models.json["data"]} == {"base", "fedrouter", *word_bundle.adapter_paths}


def test_streams_and_ends_upstream_when_the_client_leaves(
    word_bundle: Bundle, apps: list[UpstreamApp]
) -> None:
    pieces: list[bytes] = []

    async def scenario(url: str) -> None:
        async with front(word_bundle, [url]) as server:
            await ready(server)
            left = asyncio.Event()
            body = iter([{"type": "http.request", "body": b"", "more_body": False}])

            async def receive() -> Any:
                for message in body:
                    return message
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    assert (b"x-kind", b"stream") in message["headers"]
                else:
                    pieces.append(message["body"])
                if len(pieces) == 3:
                    left.set()

            headers = [(b"authorization", f"Bearer {KEY}".encode())]
            scope = {"type": "http", "method": "POST", "path": "/v1/stream", "headers": headers}
            await server.hook(scope, receive, send)
            assert await asyncio.to_thread(apps[0].left.wait, 10), (
                "the upstream must notice that the client has left"
            )

    with serving(apps[0]) as url:
        asyncio.run(scenario(url))
    assert pieces[:2] == [b"data: 0\n\n", b"data: 1\n\n"]
    assert len(pieces) < 50
