"""Four APIs of a real vLLM, as their clients use them; lists of prompts; tenants."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.types import Decision

PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 2, seed=6)]
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
]
HTTP = httpx.Client(timeout=120)
Offline = Callable[[str], Decision]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def post(server: Any, path: str, body: Any, key: str | None = None, **headers: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key or server.key}", **headers}
    return HTTP.post(f"{server.url}{path}", json=body, headers=headers)


@pytest.mark.parametrize(
    "options",
    [
        {"tools": TOOLS, "tool_choice": "none"},
        {"n": 3, "temperature": 0.8, "seed": 1},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["e", " "]},
        {"response_format": {"type": "json_object"}, "max_tokens": 24},
        {"max_tokens": 4, "extra_body": {"ignore_eos": True}},
    ],
    ids=["tools", "n", "logprobs", "stop", "json", "extra"],
)
def test_chat_options_mean_what_they_mean_for_the_adapter(
    server: Any, offline: Offline, options: Any
) -> None:
    asked = {"messages": user(PROMPTS[0]), **GREEDY, **options}
    routed = server.client.chat.completions.create(model="fedrouter", **asked)
    named = server.client.chat.completions.create(model=offline(PROMPTS[0]).model, **asked)
    assert routed.model == named.model
    assert routed.choices == named.choices
    assert routed.usage == named.usage


def test_async_streaming_with_usage(server: Any, offline: Offline) -> None:
    async def stream(prompt: str) -> tuple[set[str], int]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=120) as client:
            asked = {"messages": user(prompt), **GREEDY, "stream_options": {"include_usage": True}}
            pieces = await client.chat.completions.create(model="fedrouter", stream=True, **asked)
            found = [piece async for piece in pieces]
            return {piece.model for piece in found}, found[-1].usage.completion_tokens

    async def both() -> list[Any]:
        return await asyncio.gather(*map(stream, PROMPTS))

    for prompt, (models, tokens) in zip(PROMPTS, asyncio.run(both()), strict=True):
        assert models == {offline(prompt).model}
        assert 1 <= tokens <= 8


@pytest.mark.parametrize("parts", [False, True])
def test_responses(server: Any, offline: Offline, parts: bool) -> None:
    for prompt in PROMPTS[::2]:
        given = user([{"type": "input_text", "text": prompt}]) if parts else prompt
        asked = {"input": given, "max_output_tokens": 8, "temperature": 0}
        answer = server.client.responses.with_raw_response.create(model="fedrouter", **asked)
        assert answer.headers["x-fedrouter-adapter"] == answer.parse().model == offline(prompt).model
        events = list(server.client.responses.create(model="fedrouter", stream=True, **asked))
        assert events[-1].type == "response.completed" or events[-1].type == "response.incomplete"
        assert events[-1].response.model == offline(prompt).model
        assert events[-1].response.output_text == answer.parse().output_text


def test_messages(server: Any, offline: Offline) -> None:
    for prompt in PROMPTS[::2]:
        content = [{"type": "text", "text": prompt}]
        asked = {"model": "fedrouter", "messages": user(content), "system": PROMPTS[1], **GREEDY}
        answer = post(server, "/v1/messages", asked)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-fedrouter-adapter"] == answer.json()["model"] == offline(prompt).model
        stream = post(server, "/v1/messages", {**asked, "stream": True})
        assert stream.headers["x-fedrouter-adapter"] == offline(prompt).model
        assert "message_stop" in stream.text
    counted = post(server, "/v1/messages/count_tokens", {"model": "fedrouter", "messages": user("hello")})
    assert counted.json()["input_tokens"] > 0
    assert "x-fedrouter-adapter" not in counted.headers


def test_a_list_of_prompts_for_different_adapters_is_answered_as_one(server: Any, offline: Offline) -> None:
    assert len({offline(prompt).model for prompt in PROMPTS}) >= 2
    asked = {"n": 2, "logprobs": 1, "seed": 3, "max_tokens": 8, "temperature": 0.7}
    together = server.client.completions.create(model="fedrouter", prompt=PROMPTS, **asked)
    alone = [server.client.completions.create(model="fedrouter", prompt=p, **asked) for p in PROMPTS]
    assert [choice.index for choice in together.choices] == list(range(2 * len(PROMPTS)))
    assert [c.text for c in together.choices] == [c.text for one in alone for c in one.choices]
    assert together.model.split(",") == list(dict.fromkeys(one.model for one in alone))
    assert together.usage.total_tokens == sum(one.usage.total_tokens for one in alone)
    headers = {"X-Request-Id": "mine"}
    named = server.client.completions.create(
        model="fedrouter", prompt=PROMPTS, extra_headers=headers, **GREEDY
    )
    assert named.id == "cmpl-mine"


def test_errors_of_a_list_are_vllms(server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="different adapters"):
        server.client.completions.create(model="fedrouter", prompt=PROMPTS, stream=True)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        server.client.completions.create(model="fedrouter", prompt=PROMPTS, max_tokens=10**6)
    with pytest.raises(openai.BadRequestError, match="prompt_embeds"):
        server.client.completions.create(model="fedrouter", prompt="x", extra_body={"prompt_embeds": "AAAA"})


def test_a_client_that_leaves_a_list_ends_it(server: Any) -> None:
    body = {"model": "fedrouter", "prompt": PROMPTS, "max_tokens": 200, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(
            f"{server.url}/v1/completions",
            json=body,
            headers={"authorization": f"Bearer {server.key}"},
            timeout=0.2,
        )
    assert server.client.completions.create(model="fedrouter", prompt=PROMPTS[0], **GREEDY).choices


def test_tokenize_answers_as_the_base(server: Any) -> None:
    base = post(server, "/tokenize", {"model": "base", "prompt": PROMPTS[0]})
    routed = post(server, "/tokenize", {"model": "fedrouter", "prompt": PROMPTS[0]})
    assert routed.json() == base.json()
    tokens = {"model": "fedrouter", "tokens": base.json()["tokens"]}
    assert PROMPTS[0] in post(server, "/detokenize", tokens).json()["prompt"]


def test_a_follow_up_keeps_the_adapter(server: Any, offline: Offline) -> None:
    prompt = next(prompt for prompt in PROMPTS if not offline(prompt).fallback)
    messages = [*user(prompt), {"role": "assistant", "content": "Yes"}, *user("yes please")]
    answer = server.client.chat.completions.create(model="fedrouter", messages=messages, **GREEDY)
    assert answer.model == offline(prompt).model


def test_what_vllm_leaves_open_is_closed(server: Any) -> None:
    body = {"model": "base", "prompt": "hello", "messages": user("hello"), "max_tokens": 1}
    adapter = {"X-Amzn-SageMaker-Adapter-Identifier": "mine"}
    for path in ("/invocations", "/tokenize", "/detokenize", "/adapters", "/load", "/openapi.json"):
        for method in ("GET", "POST"):
            answer = HTTP.request(method, f"{server.url}{path}", json=body, headers=adapter)
            assert answer.status_code == 401, (method, path)
    assert {HTTP.get(f"{server.url}{path}").status_code for path in ("/health", "/metrics", "/version")} == {
        200
    }
    assert post(server, "/invocations", {**body, "model": "fedrouter"}).status_code == 400


def test_tenants_are_who_their_keys_say(server: Any, offline: Offline) -> None:
    for client, key in server.tenants.items():
        own = {c.adapter for c in server.bundle.clusters if client in c.clients}
        for prompt in PROMPTS:
            with_key = server.client.with_options(api_key=key)
            answer = with_key.chat.completions.create(model="fedrouter", messages=user(prompt), **GREEDY)
            assert answer.model in {*own, "base"}
            if offline(prompt).model in own:
                assert answer.model == offline(prompt).model
        for adapter in {c.adapter for c in server.bundle.clusters} - own:
            with pytest.raises(openai.NotFoundError):
                with_key.chat.completions.create(model=adapter, messages=user("hello"))
        with pytest.raises(openai.NotFoundError):
            with_key.chat.completions.create(model="mine", messages=user("hello"))
        other = {"x-fedrouter-client": "somebody else"}
        with pytest.raises(openai.PermissionDeniedError):
            with_key.chat.completions.create(model="base", messages=user("hello"), extra_headers=other)
        assert post(server, "/invocations", {"model": "base"}, key=key).status_code == 403
        shown = HTTP.get(
            f"{server.url}/v1/fedrouter/clusters", headers={"authorization": f"Bearer {key}"}
        ).json()
        assert {cluster["adapter"] for cluster in shown["clusters"]} == own
        general = {server.bundle.generalist} - {None}
        assert {model.id for model in with_key.models.list()} == {"base", "fedrouter", *own, *general}


NESTED = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize(
    ("body", "statuses"),
    [
        (b'{"model": "fedrouter", "messages": ' + NESTED + b"}", {400}),
        (NESTED, {400, 500}),  # names us nowhere, so it is vLLM's to refuse, which calls it its own failure
        (b'{"model": "fedrouter", "messages": [{"role": "user", "content": "\xff"}]}', {400, 422}),
        (b'{"model": ["fedrouter"], "messages": [{"role": "user", "content": "x"}]}', {400, 422}),
        (
            b'{"model": "fedrouter", "model": "no-such-model", '
            b'"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "max_tokens": 4}',
            {400, 404, 422},
        ),
    ],
    ids=["nested", "nested, not ours", "no utf-8", "model is a list", "two models"],
)
def test_strange_bodies_are_refused_and_harm_nobody(server: Any, body: bytes, statuses: set[int]) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
        answer = HTTP.post(f"{server.url}{path}", content=body, headers=headers)
        assert answer.status_code in statuses, answer.text
        assert "x-fedrouter-adapter" not in answer.headers
    assert json.loads(HTTP.get(f"{server.url}/version").text)
