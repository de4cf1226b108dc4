"""Which requests are admitted, as which client, and what a refused request costs."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from echo import KEY, TASKS, EchoApp, Server, WordEmbedder

from fedrouter.bundle import Bundle
from fedrouter.errors import ServingError
from fedrouter.serve.access import Access, load_access, load_keys
from fedrouter.serve.paths import (
    AS_BASE,
    CHAT,
    COMPLETIONS,
    MESSAGES,
    MODELS,
    OPEN,
    READY,
    RELOAD,
    ROUTED,
    UNROUTED,
)
from fedrouter.serve.settings import Settings

Serve = Callable[..., Server]
KEYS = {hashlib.sha256(name.encode()).hexdigest(): name for name in ("ann", "bob", "carl")}  # key = name
CLUSTERS, DRY_RUN = "/v1/fedrouter/clusters", "/v1/fedrouter/route"


def body(text: str, model: str = "fedrouter") -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "prompt": text, "input": text, "max_tokens": 8}


def ask(server: Server, path: str, given: Any = None, *, client: str | None = None, **options: Any) -> Any:
    if client is not None:
        options["headers"] = {"X-FedRouter-Client": client}

    async def one() -> Any:
        async with server:
            return await server.ask(path, given, **options)

    return asyncio.run(one())


def adapter(bundle: Bundle, name: str) -> str:
    return next(cluster.adapter for cluster in bundle.clusters if cluster.name == name)


# Without a keys file: a header names the client.


@pytest.mark.parametrize("path", ROUTED)
def test_the_client_header_restricts_to_the_clients_task_clusters(
    serve: Serve, tenants_bundle: Bundle, path: str
) -> None:
    headline = adapter(tenants_bundle, "headline")
    assert ask(serve(), path, body(TASKS["headline"])).json["model"] == headline
    assert ask(serve(), path, body(TASKS["headline"]), client="ann").json["model"] == headline
    answer = ask(serve(), path, body(TASKS["headline"]), client="bob")
    assert answer.json["model"] == "base"
    assert answer.routing["cluster"] in ("summary", "t%C3%A2che")
    assert float(answer.routing["distance"]) > 3


def test_requests_of_many_clients_are_embedded_together(
    serve: Serve, tenants_bundle: Bundle, embedder: WordEmbedder
) -> None:
    async def burst() -> list[Any]:
        async with serve(fallback="nearest") as server:
            asked = [
                server.ask(
                    CHAT, body(TASKS["headline"]), headers={"x-fedrouter-client": client} if client else None
                )
                for client in ("ann", "bob", None) * 5
            ]
            return await asyncio.gather(*asked)

    models = [answer.json["model"] for answer in asyncio.run(burst())]
    assert models[0::3] == models[2::3] == [adapter(tenants_bundle, "headline")] * 5
    assert len(set(models[1::3])) == 1
    assert adapter(tenants_bundle, "headline") not in models[1::3]
    assert len(embedder.batches) <= 3


@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("POST", DRY_RUN), ("GET", CLUSTERS)])
def test_an_unknown_client_is_a_404(serve: Serve, embedder: WordEmbedder, method: str, path: str) -> None:
    answer = ask(serve(), path, body(TASKS["headline"]), client="zoe", method=method)
    assert (answer.status, answer.json["error"]["type"]) == (404, "NotFoundError")
    assert "zoe" in answer.json["error"]["message"]
    assert not embedder.batches


def test_two_client_headers_are_refused(serve: Serve) -> None:
    headers = {"X-FedRouter-Client": "ann", "x-fedrouter-client": "bob"}
    assert ask(serve(), CHAT, body("hello"), headers=headers).status == 400


def test_the_client_header_is_ignored_for_named_models(serve: Serve) -> None:
    assert ask(serve(), CHAT, body("hello", "base"), client="zoe").status == 200


# With a keys file: the API key identifies the client.


@pytest.fixture
def tenants(serve: Serve) -> Serve:
    return lambda **options: serve(access=Access(KEY, KEYS), **options)


def test_the_key_identifies_the_tenant(tenants: Serve, tenants_bundle: Bundle) -> None:
    for name, task in (("ann", "headline"), ("bob", "summary")):
        for client in (None, name):
            answer = ask(tenants(), CHAT, body(TASKS[task]), key=name, client=client)
            assert answer.json["model"] == adapter(tenants_bundle, task)
        other = {"ann": "bob", "bob": "ann"}[name]
        assert ask(tenants(), CHAT, body(TASKS[task]), key=other).json["model"] == "base"


def test_vllm_sees_its_own_key_and_never_a_tenants(tenants: Serve) -> None:
    server = tenants()
    assert ask(server, CHAT, body("hello", "base"), key="ann").status == 200
    sent = [value for name, value in server.app.scopes[0]["headers"] if name.lower() == b"authorization"]
    assert sent == [f"Bearer {KEY}".encode()]


@pytest.mark.parametrize("client", ["bob", "carl", "zoe", ""])
def test_a_tenant_cannot_act_as_another(tenants: Serve, embedder: WordEmbedder, client: str) -> None:
    answer = ask(tenants(), CHAT, body(TASKS["summary"]), key="ann", client=client)
    assert (answer.status, answer.json["error"]["type"]) == (403, "PermissionDeniedError")
    assert not embedder.batches


@pytest.mark.parametrize("path", [*ROUTED, *AS_BASE])
def test_a_tenant_cannot_name_anothers_adapter(tenants: Serve, tenants_bundle: Bundle, path: str) -> None:
    own, others = adapter(tenants_bundle, "headline"), adapter(tenants_bundle, "summary")
    for given in (
        body("hello", others),
        json.dumps(body("hello", others)).encode("utf-16"),
        f'{{"model": "base", "model": "{others}"}}'.encode(),
        json.dumps(body("hello", "mine")).encode(),
    ):
        server = tenants()
        answer = ask(server, path, given, key="ann")
        assert (answer.status, answer.json["error"]["param"]) == (404, "model")
        assert not server.app.bodies
    for model in (own, "base", "", None, tenants_bundle.generalist):
        assert ask(tenants(), path, body("hello") | {"model": model}, key="ann").status == 200


def test_a_tenants_invalid_body_never_reaches_vllm(tenants: Serve) -> None:
    for given in (b"{", b"\xff", b"[" * 100_000, b'["fedrouter"]'):
        server = tenants()
        assert ask(server, CHAT, given, key="ann", chunk=10**6).status == 400
        assert not server.app.bodies


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in UNROUTED),
        ("POST", RELOAD),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/x"),
        ("POST", "/pooling"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "//v1/chat/completions"),
    ],
)
def test_all_other_paths_are_closed_to_tenants(tenants: Serve, method: str, path: str) -> None:
    server = tenants()
    assert ask(server, path, body("hello"), method=method, key="ann").status == 403
    assert not server.app.bodies


def test_a_tenant_sees_its_own_task_clusters_and_nobody_else(tenants: Serve) -> None:
    shown = ask(tenants(), CLUSTERS, method="GET", key="ann").json["clusters"]
    assert {cluster["name"]: cluster["clients"] for cluster in shown} == {
        "headline": ["ann"],
        "tâche": ["ann"],
    }
    assert set(ask(tenants(), DRY_RUN, body("hello"), key="ann").json["distances"]) == {"headline", "tâche"}


def test_a_tenant_sees_only_the_models_that_it_may_name(tenants: Serve, tenants_bundle: Bundle) -> None:
    class Models(EchoApp):
        async def _answer(self, send: Any, status: int, pieces: Any) -> None:
            names = ["base", "fedrouter", "mine", *tenants_bundle.adapter_paths]
            listed = {"object": "list", "data": [{"id": name} for name in names]}
            await super()._answer(send, status, [json.dumps(listed).encode()])

    def shown(key: str) -> set[str]:
        server = tenants()
        server.app = server.hook.app = Models()
        return {model["id"] for model in ask(server, MODELS, method="GET", key=key).json["data"]}

    everything = {"base", "fedrouter", "mine", *tenants_bundle.adapter_paths}
    assert shown(KEY) == everything
    assert shown("ann") == everything - {"mine", adapter(tenants_bundle, "summary")}
    assert shown("carl") == {"base", "fedrouter", tenants_bundle.generalist}


def test_a_key_of_a_client_that_the_bundle_does_not_know(tenants: Serve) -> None:
    assert ask(tenants(), CHAT, body("hello"), key="carl").status == 404


def test_the_operators_key_is_not_restricted(tenants: Serve, tenants_bundle: Bundle) -> None:
    headline = adapter(tenants_bundle, "headline")
    assert ask(tenants(), CHAT, body(TASKS["headline"])).json["model"] == headline
    assert ask(tenants(), CHAT, body("hello", headline), client="bob").status == 200
    assert ask(tenants(), "/pooling", {"model": "base"}).status == 200
    assert ask(tenants(), "/load", method="GET").status == 200
    assert ask(tenants(), "/v1/load_lora_adapter", {}).status == 404  # closed to everybody


# Without a key.


@pytest.mark.parametrize("access", [Access(KEY), Access(KEY, KEYS)], ids=["key", "tenants"])
@pytest.mark.parametrize("key", [None, "", "wrong", KEY + " ", KEY.upper(), "é"])
def test_without_a_known_key_nothing_is_read_or_embedded(
    serve: Serve, embedder: WordEmbedder, access: Access, key: str | None
) -> None:
    paths = (
        *ROUTED,
        *AS_BASE,
        *UNROUTED,
        DRY_RUN,
        RELOAD,
        "/adapters",
        "/v1/load_lora_adapter",
        "/pooling",
        "/load",
        "/",
    )
    for path in paths:
        server = serve(access=access)
        answer = ask(server, path, body(TASKS["headline"]), key=key, client="ann")
        assert (answer.status, answer.num_reads) == (401, 0), path
        assert answer.json["error"]["type"] == "AuthenticationError"
        assert not server.app.bodies
    assert not embedder.batches


def test_the_sagemaker_header_opens_nothing(serve: Serve) -> None:
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "headline"}
    answer = ask(serve(access=Access(KEY)), "/invocations", body("hello", "base"), key=None, headers=headers)
    assert answer.status == 401


def test_monitoring_needs_no_key(serve: Serve) -> None:
    for path in (*OPEN, "/metrics/"):
        answer = ask(serve(access=Access(KEY, KEYS)), path, method="GET", key=None)
        assert answer.json == {"state": "starting"} if path == READY else answer.status == 200
    assert ask(serve(access=Access(KEY)), "/tokenize", method="OPTIONS", key=None).status == 200


def test_without_a_key_of_its_own_a_server_leaves_it_to_vllm(serve: Serve) -> None:
    assert ask(serve(), "/tokenize", body("hello"), key=None).status == 200
    assert ask(serve(), CHAT, body("hello"), key=None).json == {
        "error": "Unauthorized"
    }  # the application's response


def test_anthropics_clients_see_a_refusal_of_their_kind(serve: Serve) -> None:
    assert ask(serve(access=Access(KEY)), MESSAGES, body("hello"), key=None).json["type"] == "error"


# Spoofing.


def test_routing_headers_of_a_request_are_ignored(serve: Serve, tenants_bundle: Bundle) -> None:
    spoofed = {f"x-fedrouter-{name}": "spoofed" for name in ("adapter", "cluster", "distance", "fallback")}
    server = serve(access=Access(KEY))
    answer = ask(server, COMPLETIONS, body(TASKS["headline"]), headers=spoofed)
    assert answer.routing["adapter"] == answer.json["model"] == adapter(tenants_bundle, "headline")
    assert "spoofed" not in str(answer.headers)
    assert not ask(server, COMPLETIONS, body("hello", "base"), headers=spoofed).routing


# The keys file.


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"secret-key": "ann"}',
        '{"%s": 3}' % ("0" * 64),
        '{"%s": ""}' % ("0" * 64),
        '{"%s": "a"}' % ("A" * 64),
    ],
)
def test_a_wrong_keys_file_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(ServingError, match=r"keys\.json") as error:
        load_keys(file)
    assert "secret" not in str(error.value)


def test_access_comes_from_the_settings_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(KEYS))
    settings = Settings(bundle=tmp_path, keys_file=file)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ServingError, match="VLLM_API_KEY"):
        load_access(settings)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert ask(serve(access=load_access(settings)), CHAT, body("hello"), key="ann").status == 200
    with pytest.raises(ServingError, match="gone"):
        load_keys(tmp_path / "gone")
