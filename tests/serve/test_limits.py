"""Overload: full queues, long waits, large bodies."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch  # noqa: F401 - import it before the timed waits below
from echo import TASKS, Answer, Server, WordEmbedder

from fedrouter.errors import ServingError
from fedrouter.serve.limits import Limits
from fedrouter.serve.paths import CHAT, COMPLETIONS, MESSAGES, RESPONSES

MakeServer = Callable[..., Server]


def body(prompt: Any) -> dict[str, Any]:
    return {"model": "fedrouter", "prompt": prompt}


@pytest.fixture
def gate(embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that the embedder waits for."""
    gate, embed = threading.Event(), embedder.embed

    def held_up(texts: Any) -> Any:
        assert gate.wait(5)
        return embed(texts)

    monkeypatch.setattr(embedder, "embed", held_up)
    return gate


def overloaded(server: Server, gate: threading.Event) -> tuple[Answer, list[Answer]]:
    """Return the response under overload, and those of the two requests before it."""

    async def scenario() -> tuple[Answer, list[Answer]]:
        async with server:
            first = asyncio.create_task(server.ask(COMPLETIONS, body(TASKS["headline"])))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(server.ask(COMPLETIONS, body(TASKS["summary"])))
            await asyncio.sleep(0.05)
            third = await server.ask(COMPLETIONS, body(TASKS["summary"]))
            gate.set()
            return third, [await first, await second]

    return asyncio.run(scenario())


def test_a_full_queue_falls_back_to_the_base(
    make_server: MakeServer, gate: threading.Event, adapter_of: Callable[[str], str]
) -> None:
    third, others = overloaded(make_server(max_queue=1), gate)
    assert third.json["model"] == third.routing["adapter"] == "base"
    assert third.routing["fallback"] == "true"
    assert [one.json["model"] for one in others] == [adapter_of("headline"), adapter_of("summary")]


def test_a_full_queue_rejects_by_option(make_server: MakeServer, gate: threading.Event) -> None:
    server = make_server(max_queue=1, overload="reject")
    third, others = overloaded(server, gate)
    assert third.status == 503
    assert int(third.headers["retry-after"]) > 0
    assert third.json["error"] == {
        "message": "too many requests wait to be routed: try again later",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert [one.status for one in others] == [200, 200]
    assert len(server.app.bodies) == 2


@pytest.mark.parametrize(("overload", "status"), [("base", 200), ("reject", 503)])
def test_a_long_wait_is_overload(
    make_server: MakeServer, gate: threading.Event, overload: str, status: int
) -> None:
    server = make_server(routing_timeout_s=0.1, overload=overload)

    async def scenario() -> Answer:
        async with server:
            answer = await server.ask(COMPLETIONS, body(TASKS["headline"]))
            gate.set()
            return answer

    answer = asyncio.run(scenario())
    assert answer.status == status
    assert status == 503 or answer.json["model"] == "base"


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/v1/fedrouter/route"])
def test_a_body_too_large_is_refused_while_it_is_read(
    make_server: MakeServer, embedder: WordEmbedder, path: str
) -> None:
    server = make_server(max_body_mib=0.001)

    async def scenario() -> list[Answer]:
        async with server:
            small, large = body("write a headline"), b'{"model": "base", "prompt": "' + b"x" * 5000
            return [await server.ask(path, small), await server.ask(path, large, chunk=100)]

    fits, refused = asyncio.run(scenario())
    assert refused.status == 413
    assert refused.num_reads == 11  # reads 1,049 bytes in pieces of 100 and leaves the rest unread
    assert refused.json["error"]["code"] == 413
    assert "0.001 MiB" in refused.json["error"]["message"]
    assert fits.status == (200 if path != "/v1/chat/completions" else fits.status)
    assert len(server.app.bodies) <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overload": "drop"}, "overload must be .*not 'drop'"),
        ({"max_queue": 0}, "max_queue"),
        ({"routing_timeout_s": -1}, "routing_timeout_s"),
        ({"max_body_mib": float("nan")}, "max_body_mib"),
    ],
)
def test_invalid_limits_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ServingError, match=says):
        Limits(**options)


@pytest.mark.parametrize(
    ("path", "given"),
    [
        (COMPLETIONS, {"prompt": [TASKS["headline"], TASKS["summary"]]}),  # would be split
        (
            CHAT,
            {"messages": [{"role": "user", "content": text} for text in (TASKS["summary"], "zebra " * 9)]},
        ),
        (RESPONSES, {"input": TASKS["headline"]}),
        (MESSAGES, {"messages": [{"role": "user", "content": TASKS["headline"]}], "max_tokens": 8}),
    ],
)
def test_overload_is_the_same_on_every_path(make_server: MakeServer, path: str, given: Any) -> None:
    async def one(server: Server) -> Answer:
        async with server:
            return await server.ask(path, {"model": "fedrouter", **given})

    answer = asyncio.run(one(make_server(routing_timeout_s=1e-9, fallback="generalist")))
    assert (answer.status, answer.json) == (200, {"model": "base", **given})
    assert answer.routing["adapter"] == "base"
    for options in ({"overload": "reject"}, {"fallback": "reject"}):
        server = make_server(routing_timeout_s=1e-9, **options)
        answer = asyncio.run(one(server))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert not server.app.bodies


def test_a_conversation_whose_earlier_turns_wait_too_long_is_overload(
    make_server: MakeServer, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [TASKS["summary"], "zebra " * 50]
    body = {"model": "fedrouter", "messages": [{"role": "user", "content": text} for text in turns]}
    gate, embed = threading.Event(), embedder.embed
    monkeypatch.setattr(
        embedder, "embed", lambda texts: embed(texts) if turns[1] in texts or gate.wait(5) else None
    )
    server = make_server(routing_timeout_s=1.0)

    async def scenario() -> Answer:
        async with server:
            answer = await server.ask(CHAT, body)
            gate.set()
            return answer

    answer = asyncio.run(scenario())
    assert embedder.batches[0] == turns[1:]
    assert (answer.json["model"], answer.routing["fallback"]) == ("base", "true")
    assert answer.routing["cluster"] == "", "the reason is overload, not the distance of the last turn"
