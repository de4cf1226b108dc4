"""Edge cases: no model, other methods, upgrades, other origins, large lists."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo import KEY, TASKS, Answer, EchoApp, Server, WordEmbedder

from fedrouter.bundle import Bundle
from fedrouter.decide import route_texts
from fedrouter.route import Router
from fedrouter.serve.access import METRICS_KEY, Access, load_access
from fedrouter.serve.paths import (
    ADAPTER_HEADER,
    AS_BASE,
    CLUSTERS,
    COMPLETIONS,
    DRY_RUN,
    INVOCATIONS,
    MESSAGES,
    OWN_METHODS,
    READY,
    ROUTED,
    UNROUTED,
)
from fedrouter.serve.settings import Settings

MakeServer = Callable[..., Server]
AdapterOf = Callable[[str], str]
MISSING = object()


def body(model: Any = MISSING, text: str = TASKS["summary"], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    given = {"messages": messages, "prompt": text, "input": text, "max_tokens": 8, **more}
    return given if model is MISSING else {"model": model, **given}


def ask(server: Server, path: str, given: Any = None, **options: Any) -> Answer:
    async def one() -> Answer:
        async with server:
            return await server.ask(path, given, **options)

    return asyncio.run(one())


@pytest.mark.parametrize("model", [MISSING, None, "", "fedrouter"])
@pytest.mark.parametrize("path", ROUTED)
def test_a_request_without_a_model_is_routed(
    make_server: MakeServer, adapter_of: AdapterOf, path: str, model: Any
) -> None:
    answer = ask(make_server(), path, body(model))
    assert answer.json["model"] == answer.routing["adapter"] == adapter_of("summary")
    refused = ask(make_server(fallback="reject"), path, body(model, "zebra " * 50))
    assert (refused.status, refused.json["error"]["code"]) == (422, "no_task_cluster")


@pytest.mark.parametrize("model", [0, False, 1.5, [], {}, ["base"]])
@pytest.mark.parametrize("path", [*ROUTED, *AS_BASE, *UNROUTED])
def test_a_model_that_is_no_string_is_a_400(server: Server, path: str, model: Any) -> None:
    answer = ask(server, path, body(model))
    assert (answer.status, answer.json["error"]["param"]) == (400, "model")
    assert not server.app.bodies


@pytest.mark.parametrize("model", [MISSING, None, "", "fedrouter"])
@pytest.mark.parametrize("path", UNROUTED)
def test_where_nothing_is_routed_a_model_must_be_named(server: Server, path: str, model: Any) -> None:
    answer = ask(server, path, body(model))
    assert (answer.status, answer.json["error"]["param"]) == (400, "model")
    assert not server.app.bodies


@pytest.mark.parametrize(
    ("header", "model", "status"),
    [
        ("mine", "fedrouter", 200),
        ("mine", MISSING, 200),
        ("fedrouter", "base", 400),
        ("", "base", 400),
        (None, "base", 200),
        (None, "mine", 400),  # vLLM ignores the name in the body there: the base would answer
    ],
)
def test_invocations_are_named_by_their_header(
    server: Server, header: str | None, model: Any, status: int
) -> None:
    headers = {} if header is None else {ADAPTER_HEADER: header}
    assert ask(server, INVOCATIONS, body(model), headers=headers).status == status


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_other_encodings_are_routed_too(server: Server, adapter_of: AdapterOf, encoding: str) -> None:
    answer = ask(server, COMPLETIONS, json.dumps(body("fedrouter")).encode(encoding))
    assert answer.json["model"] == answer.routing["adapter"] == adapter_of("summary")


def test_a_payload_that_fails_in_vllm_is_a_400_for_every_model(server: Server) -> None:
    for model in ("fedrouter", "base"):
        answer = ask(server, COMPLETIONS, body(model, structured_outputs=-1))
        assert (answer.status, answer.json["error"]["param"]) == (400, "structured_outputs")
    assert not server.app.bodies


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize("path", [*ROUTED, *AS_BASE, *UNROUTED, *OWN_METHODS, "/v1/fedrouter", "/v1/x", "/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH"])
def test_every_refusal_is_in_openais_shape(
    make_server: MakeServer, method: str, path: str, key: str | None
) -> None:
    answer = ask(make_server(access=Access(KEY)), path, body(), method=method, key=key)
    if answer.status == 503:  # READY is open to everybody
        assert (method, path) == ("GET", READY)
        return
    assert answer.status in ((401, 405) if path == READY else (401,))
    in_openais_shape(answer, path)


def in_openais_shape(answer: Answer, path: str) -> None:
    assert set(answer.json) == {"error"} | ({"type"} if path.startswith(MESSAGES) else set())
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["code"] == answer.status
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", CLUSTERS, 405),
        ("GET", DRY_RUN, 405),
        ("PUT", READY, 405),
        ("GET", "/v1/fedrouter", 404),
        ("GET", "/v1/fedrouter/", 404),
        ("POST", "/v1/fedrouter/route/", 404),
        ("POST", "/v1/fedrouter/nothing", 404),
    ],
)
def test_also_below_our_own_path(server: Server, method: str, path: str, status: int) -> None:
    answer = ask(server, path, body(), method=method)
    assert answer.status == status
    in_openais_shape(answer, path)
    assert ("allow" in answer.headers) == (status == 405)
    assert not server.app.bodies


@pytest.mark.parametrize("value", ["h2c", "websocket"])
def test_an_upgrade_is_answered_and_closed(server: Server, value: str) -> None:
    headers = {"Connection": "keep-alive, Upgrade", "Upgrade": value}
    for path, method in (
        (COMPLETIONS, "POST"),
        (CLUSTERS, "GET"),
        ("/v1/fedrouter/x", "GET"),
        ("/load", "GET"),
    ):
        answer = ask(server, path, body(), method=method, headers=headers)
        assert answer.status in (200, 404)
        assert answer.headers["connection"] == "close"
    assert "connection" not in ask(server, COMPLETIONS, body()).headers


class Pages(EchoApp):
    """Has CORS options in its state, as vLLM does."""

    def __init__(self, *origins: str) -> None:
        super().__init__()
        args = SimpleNamespace(
            allowed_origins=list(origins),
            allow_credentials=False,
            allowed_methods=["*"],
            allowed_headers=["*"],
        )
        self.state = SimpleNamespace(args=args)


def ask_from(server: Server, origin: str, path: str, given: Any) -> Answer:
    server.lifespan_scope = {"type": "lifespan", "app": server.app}
    return ask(server, path, given, headers={"origin": origin})


def test_our_own_answers_have_cors_headers_as_vllms_have(make_server: MakeServer) -> None:
    allowed, other = "https://page.example", "https://evil.example"
    for path, given in ((DRY_RUN, body()), (COMPLETIONS, body(7)), (COMPLETIONS, b"{")):
        answer = ask_from(make_server(Pages(allowed)), allowed, path, given)
        assert answer.headers["access-control-allow-origin"] == allowed
        assert answer.headers["vary"] == "Origin"
        answer = ask_from(make_server(Pages(allowed)), other, path, given)
        assert "access-control-allow-origin" not in answer.headers
        assert (
            ask_from(make_server(Pages("*")), other, path, given).headers["access-control-allow-origin"]
            == "*"
        )
        assert "access-control-allow-origin" not in ask(make_server(), path, given).headers


def test_one_request_does_not_switch_routing_off_for_the_others(
    make_server: MakeServer, adapter_of: AdapterOf, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = embedder.embed

    def slow(texts: Any) -> Any:
        time.sleep(0.01)
        return embed(texts)

    monkeypatch.setattr(embedder, "embed", slow)
    server = make_server(max_queue=64)

    async def scenario() -> tuple[list[Answer], list[Answer]]:
        async with server:
            huge = [body(prompt=[TASKS["headline"]] * number) for number in (20_000, 65)]
            large = [body(prompt=[TASKS["headline"]] * 64) for _ in range(5)]
            attack = [asyncio.create_task(server.ask(COMPLETIONS, one, chunk=10**7)) for one in huge + large]
            await asyncio.sleep(0)
            others = await asyncio.gather(*(server.ask(COMPLETIONS, body()) for _ in range(20)))
            return others, await asyncio.gather(*attack)

    others, attack = asyncio.run(scenario())
    assert {answer.json["model"] for answer in others} == {adapter_of("summary")}
    assert [answer.status for answer in attack[:2]] == [400, 400]
    assert "at most 64" in attack[0].json["error"]["message"]


def test_the_numbers_may_have_a_key_of_their_own(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for access, keys in (
        (Access(KEY, None, "numbers"), {None: 401, "wrong": 401, KEY: 200, "numbers": 200}),
        (Access(None, None, "numbers"), {None: 401, "numbers": 200}),
        (Access(KEY), {None: 200}),
    ):
        for key, status in keys.items():
            for path in ("/metrics", "/metrics/"):
                assert ask(make_server(access=access), path, method="GET", key=key).status == status
    server = make_server(access=Access(KEY, None, "numbers"))
    assert ask(server, COMPLETIONS, body(), key="numbers").status == 401
    assert ask(server, "/health", method="GET", key=None).status == 200
    monkeypatch.setenv(METRICS_KEY, "numbers")
    access = load_access(Settings(bundle=Path("not read")))
    assert ask(make_server(access=access), "/metrics", method="GET", key=None).status == 401


def test_a_tenant_is_not_told_what_all_clients_have_together(
    serve: MakeServer, tenants_bundle: Bundle
) -> None:
    access = Access(KEY, {hashlib.sha256(b"ann").hexdigest(): "ann"})
    shown = ask(serve(access=access), CLUSTERS, method="GET", key="ann").json["clusters"]
    fields = {"name", "adapter", "radius", "clients", "at"}
    assert {frozenset(cluster) for cluster in shown} == {frozenset(fields)}
    everything = ask(serve(access=access), CLUSTERS, method="GET").json["clusters"]
    assert all({"num_examples", "task_counts"} <= set(cluster) for cluster in everything)


@pytest.mark.parametrize("fallback", ["base", "nearest", "generalist", "reject"])
def test_a_blank_prompt_gives_one_answer_offline_and_served(
    make_server: MakeServer, word_bundle: Bundle, embedder: WordEmbedder, fallback: str
) -> None:
    offline, far = route_texts(Router(word_bundle, fallback), embedder, [" \n", "zebra " * 50])
    assert offline.fallback
    assert far.cluster
    served = ask(make_server(fallback=fallback), DRY_RUN, {"prompt": " \n"}).json
    assert (served["model"], served["cluster"]) == (offline.model, offline.cluster)
    assert route_texts(Router(word_bundle), embedder, []) == []
