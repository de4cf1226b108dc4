"""The hook between a client and a stand-in for vLLM."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import pytest
from echo import TASKS, Server, WordEmbedder

from fedrouter.bundle import Bundle
from fedrouter.embed import routing_text
from fedrouter.errors import BundleError
from fedrouter.route import Router
from fedrouter.serve.paths import AS_BASE, CHAT, COMPLETIONS, DRY_RUN, MESSAGES, RESPONSES, ROUTED, UNROUTED
from fedrouter.serve.routing import LOCAL_BATCH
from fedrouter.types import Turn

AdapterOf = Callable[[str], str]


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "fedrouter", "messages": [{"role": "user", "content": content}], **more}


def completion(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "fedrouter", "prompt": prompt, **more}


def response(given: Any, **more: Any) -> dict[str, Any]:
    return {"model": "fedrouter", "input": given, **more}


def ask(server: Server, path: str, body: Any = None, **options: Any) -> Any:
    async def one() -> Any:
        async with server:
            return await server.ask(path, body, **options)

    return asyncio.run(one())


@pytest.mark.parametrize("chunk", [1, 10, 10_000])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(TASKS["summary"], temperature=0.1, seed=12345678901234567890, stop=["é\n"])),
        (
            CHAT,
            chat(
                [
                    {"type": "text", "text": "summarise this chat"},
                    {"type": "image_url", "image_url": {"url": "x"}},
                ]
            ),
        ),
        (COMPLETIONS, completion(TASKS["summary"], logprobs=1e-9)),
        (COMPLETIONS, completion([TASKS["summary"]])),
        (RESPONSES, response(TASKS["summary"], instructions=TASKS["headline"], stream=True)),
        (
            RESPONSES,
            response([{"role": "user", "content": [{"type": "input_text", "text": TASKS["summary"]}]}]),
        ),
        (MESSAGES, chat(TASKS["summary"], system=TASKS["headline"], max_tokens=8)),
        (MESSAGES, chat([{"type": "text", "text": TASKS["summary"]}], max_tokens=8, stream=True)),
    ],
)
def test_rewrites_the_model_and_nothing_else(
    server: Server, adapter_of: AdapterOf, path: str, body: Any, chunk: int
) -> None:
    answer = ask(server, path, body, chunk=chunk)
    assert answer.status == 200
    assert answer.json == {**body, "model": adapter_of("summary")}
    assert answer.routing["adapter"] == adapter_of("summary")
    assert answer.routing["cluster"] == "summary"
    assert answer.routing["fallback"] == "false"
    assert float(answer.routing["distance"]) >= 0
    assert float(answer.routing["margin"]) > 0
    assert float(answer.routing["routing-ms"]) > 0
    assert answer.headers["server"] == "echo"


def test_decides_as_the_router_does_offline(server: Server, word_bundle: Bundle) -> None:
    texts = [
        " ".join(f"{a} {b}".split()[:n]) for a in TASKS.values() for b in TASKS.values() for n in range(1, 14)
    ]
    texts.append("zebra " * 50)
    offline = Router(word_bundle).route(
        WordEmbedder().embed([routing_text([Turn("user", text)]) for text in texts])
    )

    async def online() -> list[Any]:
        async with server:
            return await asyncio.gather(*(server.ask(CHAT, chat(text)) for text in texts))

    for decision, answer in zip(offline, asyncio.run(online()), strict=True):
        assert unquote(answer.routing["adapter"]) == answer.json["model"] == decision.model
        assert float(answer.routing["distance"]) == pytest.approx(decision.distance, rel=1e-4)
        assert answer.routing["fallback"] == str(decision.fallback).lower()
    assert len({decision.model for decision in offline}) == len(TASKS) + 1  # every adapter and the base


def test_requests_that_wait_are_embedded_together(server: Server, embedder: WordEmbedder) -> None:
    texts = [*TASKS.values()] * 20

    async def burst() -> list[Any]:
        async with server:
            return await asyncio.gather(*(server.ask(CHAT, chat(text)) for text in texts))

    answers = asyncio.run(burst())
    for text, answer in zip(texts, answers, strict=True):
        assert answer.json["messages"][0]["content"] == text
        assert (
            TASKS[{"t%C3%A2che": "tâche"}.get(answer.routing["cluster"], answer.routing["cluster"])] == text
        )
    assert sorted(text for batch in embedder.batches for text in batch) == sorted(texts)
    assert len(embedder.batches) <= len(texts) // LOCAL_BATCH + 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":   "base", "messages": [{"role": "user", "content": "fedrouter"}], "messages": 1}',
        b'{"model": "fedrouter", "model": "no-such-model"}',
        '{"model": "base", "prompt": "é"}'.encode("utf-16"),
    ],
)
@pytest.mark.parametrize("path", ROUTED)
def test_a_body_that_names_another_model_passes_byte_for_byte(
    server: Server, embedder: WordEmbedder, path: str, body: bytes
) -> None:
    answer = ask(server, path, body, chunk=64 * 1024)
    assert server.app.bodies == [body]
    assert b"".join(answer.pieces) == body
    assert not answer.routing
    assert not embedder.batches


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b'{"model": "fedrouter", "messages": [',
        b'{"model": "fedrouter", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'["fedrouter"]',
        b'"fedrouter"',
        b'{"model": ["fedrouter"]}',
        b'{"model": 0}',
        b"{}",
        b'{"model": "fedrouter"}',
        b'{"model": "fedrouter", "messages": "hi", "prompt": {}}',
        b'{"model": "fedrouter", "messages": ["hi"], "prompt": ["a", 1]}',
        b'{"model": "fedrouter", "messages": [1], "prompt": []}',
        b'{"model": "fedrouter", "messages": null, "prompt": [true, false]}',
        b'{"model": "fedrouter", "n": ' + b"1" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("path", ROUTED)
def test_an_invalid_body_is_refused(server: Server, embedder: WordEmbedder, path: str, body: bytes) -> None:
    answer = ask(server, path, body, chunk=64 * 1024)
    assert (answer.status, answer.json["error"]["type"]) == (400, "BadRequestError")
    assert not server.app.bodies
    assert not answer.routing
    assert not embedder.batches


@pytest.mark.parametrize("path", [*ROUTED, *AS_BASE, *UNROUTED, DRY_RUN])
def test_a_body_nested_too_deep_is_refused(server: Server, embedder: WordEmbedder, path: str) -> None:
    body = b'{"model": "fedrouter", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    answer = ask(server, path, body, chunk=64 * 1024)
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith("the body is nested too deep")
    assert not embedder.batches


@pytest.mark.parametrize("path", [*ROUTED, *AS_BASE, *UNROUTED, "/v1/audio/transcriptions"])
@pytest.mark.parametrize("chunk", [3, 10_000])
def test_other_models_pass_byte_for_byte_piece_by_piece(
    server: Server, embedder: WordEmbedder, path: str, chunk: int
) -> None:
    body = b'{ "model":"base",  "stream": true, "prompt": "model fedrouter \\u00e9", "messages": [] }\n'
    answer = ask(server, path, body, chunk=chunk)
    assert server.app.bodies == [body]
    assert answer.pieces == [body[:7], body[7:]]
    assert not answer.routing
    assert not embedder.batches


@pytest.mark.parametrize("path", AS_BASE)
def test_paths_that_no_adapter_changes_use_the_base(
    server: Server, embedder: WordEmbedder, path: str
) -> None:
    for body in (
        chat(TASKS["headline"]),
        completion(TASKS["headline"]),
        {"model": "fedrouter", "tokens": [1]},
    ):
        answer = ask(server, path, body)
        assert answer.json == {**body, "model": "base"}
        assert not answer.routing
    other = b'{"model":   "headline", "prompt": "fedrouter"}'
    ask(server, path, other)
    assert server.app.bodies[-1] == other
    assert not embedder.batches


@pytest.mark.parametrize("path", UNROUTED)
def test_the_virtual_name_is_refused_where_it_would_mean_the_base(server: Server, path: str) -> None:
    answer = ask(server, path, chat(TASKS["headline"]))
    assert (answer.status, answer.json["error"]["param"]) == (400, "model")
    assert not server.app.bodies
    assert ask(server, path, chat("hello") | {"model": "base"}).status == 200


def test_anthropics_clients_see_an_error_of_their_kind(server: Server, embedder: WordEmbedder) -> None:
    embedder.broken = True
    answer = ask(server, MESSAGES, chat(TASKS["headline"], max_tokens=8))
    assert (answer.status, answer.json["type"]) == (500, "error")
    assert answer.json["error"]["type"] == "InternalServerError"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/audio/speech"), ("PUT", CHAT), ("GET", "/v1/models")]
)
def test_other_endpoints_are_left_alone(
    server: Server, embedder: WordEmbedder, method: str, path: str
) -> None:
    answer = ask(server, path, chat("write a headline"), method=method)
    assert answer.status == 200
    assert not answer.routing
    assert not embedder.batches


def test_an_escaped_name_is_the_same_name(server: Server, adapter_of: AdapterOf) -> None:
    body = json.dumps(completion(TASKS["headline"])).replace("fedrouter", "fed\\u0072outer").encode()
    assert ask(server, COMPLETIONS, body).json["model"] == adapter_of("headline")


def test_works_below_a_root_path(server: Server, adapter_of: AdapterOf) -> None:
    answer = ask(server, COMPLETIONS, completion(TASKS["headline"]), root="/llm")
    assert answer.json["model"] == adapter_of("headline")


def test_without_the_key_nothing_is_read_or_embedded(server: Server, embedder: WordEmbedder) -> None:
    answer = ask(server, CHAT, chat("write a headline"), key="wrong")
    assert answer.status == 401
    assert answer.num_reads == 0
    assert not answer.routing
    assert not embedder.batches


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("  ")),
        (CHAT, chat(None)),
        (CHAT, chat([{"type": "image_url", "image_url": {"url": "x"}}])),
        (CHAT, {"model": "fedrouter", "messages": []}),
        (COMPLETIONS, completion("")),
    ],
)
def test_without_text_the_base_answers(server: Server, embedder: WordEmbedder, path: str, body: Any) -> None:
    answer = ask(server, path, body)
    assert answer.json["model"] == answer.routing["adapter"] == "base"
    assert answer.routing["fallback"] == "true"
    assert not embedder.batches


def test_beyond_the_radius_the_base_answers(server: Server) -> None:
    answer = ask(server, COMPLETIONS, completion("zebra " * 50))
    assert answer.json["model"] == answer.routing["adapter"] == "base"
    assert answer.routing["fallback"] == "true"
    assert float(answer.routing["distance"]) > 3


@pytest.mark.parametrize("prompt", ["zebra " * 50, " "])
def test_fallbacks(serve: Callable[..., Server], tenants_bundle: Bundle, prompt: str) -> None:
    bundle = tenants_bundle
    nearest = {cluster.adapter for cluster in bundle.clusters} if prompt.strip() else {"base"}
    for fallback, models in (("base", {"base"}), ("generalist", {bundle.generalist}), ("nearest", nearest)):
        answer = ask(serve(fallback=fallback), COMPLETIONS, completion(prompt))
        assert answer.json["model"] == answer.routing["adapter"]
        assert answer.json["model"] in models
        assert answer.routing["fallback"] == "true"
        assert (
            ask(serve(fallback=fallback), "/v1/fedrouter/clusters", method="GET").json["fallback"] == fallback
        )
    server = serve(fallback="reject")
    refused = ask(server, COMPLETIONS, completion(prompt))
    assert (refused.status, refused.json["error"]["code"]) == (422, "no_task_cluster")
    assert refused.routing["fallback"] == "true"
    assert not server.app.bodies
    assert ask(serve(fallback="reject"), COMPLETIONS, completion(TASKS["headline"])).status == 200


def test_a_follow_up_inherits(server: Server, adapter_of: AdapterOf) -> None:
    turns = [("user", TASKS["summary"]), ("assistant", "x"), ("user", "zebra " * 50), ("user", "yes please")]
    for path in (CHAT, MESSAGES, RESPONSES):
        messages = [{"role": role, "content": text} for role, text in turns]
        body = {"model": "fedrouter", "messages": messages, "input": messages, "max_tokens": 8}
        answer = ask(server, path, body)
        assert answer.json["model"] == adapter_of("summary")
        assert answer.routing["fallback"] == "false"


def test_the_last_user_turn_decides(server: Server, adapter_of: AdapterOf) -> None:
    turns = [
        ("system", TASKS["headline"]),
        ("user", TASKS["headline"]),
        ("assistant", "x"),
        ("user", TASKS["summary"]),
    ]
    body = {"model": "fedrouter", "messages": [{"role": role, "content": text} for role, text in turns]}
    assert ask(server, CHAT, body).json["model"] == adapter_of("summary")


def test_half_a_surrogate_pair_harms_nobody(server: Server, embedder: WordEmbedder) -> None:
    body = b'{"model": "fedrouter", "prompt": "write a headline \\ud800"}'
    answer = ask(server, COMPLETIONS, body)
    assert answer.json["prompt"] == "write a headline \ud800"
    assert embedder.batches == [["write a headline ?"]]


def test_token_ids_are_decoded(server: Server, embedder: WordEmbedder, adapter_of: AdapterOf) -> None:
    answer = ask(server, COMPLETIONS, completion([0, 1, 2, 3, 4, 5, 6]))
    assert answer.json == completion([0, 1, 2, 3, 4, 5, 6]) | {"model": adapter_of("headline")}
    assert embedder.batches == [[TASKS["headline"]]]


def test_a_list_for_one_adapter_is_served(server: Server, adapter_of: AdapterOf) -> None:
    answer = ask(server, COMPLETIONS, completion([TASKS["summary"], "summarise this chat"]))
    assert answer.json["model"] == adapter_of("summary")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (completion([TASKS["summary"], TASKS["headline"]], stream=True), "stream", "different adapters"),
        (completion(None, prompt_embeds="AAAA"), "prompt_embeds", "cannot be routed"),
    ],
)
def test_unroutable_payloads_are_refused_in_openai_shape(
    server: Server, body: Any, param: str, says: str
) -> None:
    answer = ask(server, COMPLETIONS, body)
    assert answer.status == 400
    assert says in answer.json["error"]["message"]
    assert answer.json["error"]["param"] == param
    assert answer.json["error"]["code"] == 400
    assert not server.app.bodies


def test_a_failing_embedder_is_a_500_and_not_the_end(
    server: Server, embedder: WordEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> list[Any]:
        async with server:
            embedder.broken = True
            failed = await server.ask(CHAT, chat("write a headline"))
            embedder.broken = False
            return [failed, await server.ask(CHAT, chat(TASKS["headline"]))]

    failed, fine = asyncio.run(scenario())
    assert failed.status == 500
    assert failed.json["error"]["type"] == "InternalServerError"
    assert "out of memory" in caplog.text
    assert fine.status == 200


def test_a_client_that_leaves_while_sending_costs_nothing(server: Server, embedder: WordEmbedder) -> None:
    async def leave() -> None:
        async with server:
            messages = iter(
                [{"type": "http.request", "body": b'{"mod', "more_body": True}, {"type": "http.disconnect"}]
            )

            async def receive() -> Any:
                return next(messages)

            async def send(_message: Any) -> None:
                pytest.fail("an answer to nobody")

            headers = [(b"authorization", b"Bearer sesame")]
            with pytest.raises(ConnectionError):
                await server.hook(
                    {"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, send
                )

    asyncio.run(leave())
    assert not embedder.batches


def test_lists_the_clusters(server: Server, word_bundle: Bundle) -> None:
    answer = ask(server, "/v1/fedrouter/clusters", method="GET")
    assert answer.status == 200
    assert answer.json["base"]["model"] == "words"
    assert [cluster["adapter"] for cluster in answer.json["clusters"]] == [
        c.adapter for c in word_bundle.clusters
    ]
    assert answer.json["clusters"][0]["task_counts"] == {"headline": 10}
    assert len(answer.json["bundle"]["sha256"]) == 64


def test_dry_run_decides_as_the_real_request(server: Server, adapter_of: AdapterOf) -> None:
    answer = ask(server, "/v1/fedrouter/route", {"prompt": TASKS["summary"]}, chunk=5)
    assert answer.json["model"] == adapter_of("summary")
    assert set(answer.json["distances"]) == set(TASKS)
    assert min(answer.json["distances"].values()) == answer.json["distance"]
    by_chat = ask(server, "/v1/fedrouter/route", {"messages": chat(TASKS["summary"])["messages"]})
    assert by_chat.json | {"routing_ms": 0} == answer.json | {"routing_ms": 0}


def test_a_dry_run_without_text_has_no_distance(server: Server) -> None:
    answer = ask(server, "/v1/fedrouter/route", {"prompt": " "})
    assert (answer.json["model"], answer.json["distance"]) == ("base", None)


@pytest.mark.parametrize("body", [b"", b"{", [], {}, {"prompt": ["a", "b"]}, {"messages": 3}])
def test_dry_run_refuses_what_it_cannot_read(server: Server, body: Any) -> None:
    answer = ask(server, "/v1/fedrouter/route", body)
    assert answer.status == 400
    assert answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/fedrouter/clusters"), ("POST", "/v1/fedrouter/route")]
)
def test_own_endpoints_need_the_servers_key(
    server: Server, embedder: WordEmbedder, method: str, path: str
) -> None:
    answer = ask(server, path, {"prompt": "write a headline"}, method=method, key=None)
    assert (answer.status, answer.json["error"]["type"]) == (401, "AuthenticationError")
    assert answer.json["error"]["message"] == "Unauthorized"
    assert not embedder.batches


@pytest.mark.parametrize("error", [BundleError("bundle/manifest.json: gone"), ZeroDivisionError("gone")])
def test_a_server_that_cannot_route_does_not_start(error: Exception) -> None:
    def load() -> Any:
        raise error

    async def start() -> Server:
        async with Server(load) as server:
            return server

    server = asyncio.run(start())
    assert [message["type"] for message in server.lifespan] == ["lifespan.startup.failed"]
    assert "gone" in server.lifespan[0]["message"]
    assert server.app.lifespans == 0


def test_starts_and_stops_with_the_application(server: Server) -> None:
    ask(server, CHAT, chat("write a headline"))
    assert [message["type"] for message in server.lifespan] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert server.app.lifespans == 1
