"""Readiness: what a server must prove before it is ready."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from echo import KEY, Answer, Server, WordEmbedder
from holder import HolderApp

from fedrouter.bundle import Bundle
from fedrouter.errors import BundleError, ServingError
from fedrouter.serve import canary, engine
from fedrouter.serve.asgi import Inner
from fedrouter.serve.canary import check_adapters
from fedrouter.serve.process import START
from fedrouter.serve.routing import Routing

READY = "/v1/fedrouter/ready"


@pytest.fixture
def app(word_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> HolderApp:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(canary, "RETRY_S", 0.01)
    return HolderApp(list(word_bundle.adapter_paths))


@pytest.fixture
def server(app: HolderApp, word_bundle: Bundle) -> Server:
    return Server(lambda: Routing(word_bundle, WordEmbedder(), str), app)


async def becomes(server: Server, state: str) -> Answer:
    """Ask until the server is in this state, 5 s at most."""
    async with asyncio.timeout(5):
        while (answer := await server.ask(READY, method="GET", key=None)).json["state"] != state:
            await asyncio.sleep(0.01)
    return answer


def within(server: Server, scenario: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with server:
            return await scenario()

    return asyncio.run(main())


def test_ready_when_every_adapter_has_answered(server: Server) -> None:
    async def scenario() -> list[Answer]:
        first = await server.ask(READY, method="GET", key=None)
        return [first, await becomes(server, "ready")]

    first, second = within(server, scenario)
    assert (first.status, first.json) == (503, {"state": "starting"})
    assert (second.status, second.json) == (200, {"state": "ready"})


def test_not_ready_while_one_is_missing(server: Server, app: HolderApp, word_bundle: Bundle) -> None:
    last = word_bundle.clusters[2].adapter
    del app.adapters[last]

    async def scenario() -> int:
        await asyncio.sleep(0.1)
        answer = await server.ask(READY, method="GET", key=None)
        app.adapters[last] = "late"
        await becomes(server, "ready")
        return answer.status

    assert within(server, scenario) == 503


def test_an_adapter_without_effect_is_a_failure(
    server: Server, app: HolderApp, word_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    app.idle.add(word_bundle.clusters[1].adapter)
    answer = within(server, lambda: becomes(server, "failed"))
    assert answer.status == 503
    assert word_bundle.clusters[1].adapter in caplog.text
    assert word_bundle.clusters[1].adapter not in str(answer.json), "everybody can read this response"


def test_one_text_without_a_difference_is_not_a_failure() -> None:
    """An adapter may answer one text as the base does and still work."""
    asked: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"].decode()
        asked.append(body)
        same = "brown fox" in body or '"base"' in body
        answer = '{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [%s]}}]}' % (
            "-1" if same else "-2"
        )
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer.encode()})

    asyncio.run(check_adapters(Inner(app, {}, None), ["one", "two"]))
    assert len(asked) == 6


def test_an_adapter_that_does_not_answer_is_named(app: HolderApp) -> None:
    inner = Inner(app, {}, f"Bearer {KEY}".encode())
    with pytest.raises(ServingError, match="nobody does not answer a canary prompt: 404 The model `nobody`"):
        asyncio.run(check_adapters(inner, ["nobody"]))
    app.idle |= set(app.adapters)
    with pytest.raises(BundleError, match="no effect"):
        asyncio.run(check_adapters(inner, list(app.adapters)))


def test_the_hooks_own_requests_use_vllms_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert engine.own_authorization({}) is None
    monkeypatch.setenv("VLLM_API_KEY", "variable")
    state = SimpleNamespace(args=SimpleNamespace(api_key=None))
    assert engine.own_authorization({"app": SimpleNamespace(state=state)}) == b"Bearer variable"
    state.args.api_key = ["option", "another"]
    assert engine.own_authorization({"app": SimpleNamespace(state=state)}) == b"Bearer option"


@pytest.mark.parametrize("damage", [{"radius": "12"}, {"name": 7}])
def test_a_server_whose_routed_prompts_would_fail_is_not_ready(
    app: HolderApp, word_bundle: Bundle, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    clusters = tuple(replace(cluster, **damage) for cluster in word_bundle.clusters)
    server = Server(lambda: Routing(replace(word_bundle, clusters=clusters), WordEmbedder(), str), app)
    assert within(server, lambda: becomes(server, "failed")).status == 503
    assert "routing a prompt fails" in caplog.text


def test_the_response_repeats_the_nonce(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START, "mark")
    assert within(server, lambda: becomes(server, "ready")).json == {"state": "ready", "start": "mark"}
