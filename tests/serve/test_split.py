"""Lists of prompts for several adapters: split, run concurrently, merged."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from echo import KEY, TASKS, EchoApp, Server

from fedrouter.serve.paths import COMPLETIONS
from fedrouter.serve.split import merge

A, B, FAR = TASKS["headline"], TASKS["summary"], "zebra " * 50
AdapterOf = Callable[[str], str]


class CompletionsApp(EchoApp):
    """Answers each prompt ``n`` times with the model's name; fails, raises or hangs on demand."""

    def __init__(self, **moods: str) -> None:
        super().__init__()
        self.moods = moods  # by prefix of the model's name
        self.running, self.most, self.left = 0, 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await super().__call__(scope, receive, send)
        if dict(scope["headers"]).get(b"authorization") != f"Bearer {KEY}".encode():
            return await self._answer(send, 401, [b"{}"])
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("client disconnected")
        body = json.loads(message["body"])
        self.scopes.append(scope)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            await self._complete(body, self.moods.get(body["model"].split("-")[0]), receive, send)
        finally:
            self.running -= 1
        return None

    async def _complete(self, body: Any, mood: str | None, receive: Any, send: Any) -> None:
        if mood == "hangs":
            assert (await receive())["type"] == "http.disconnect"
            self.left += 1
            return await self._answer(send, 200, [b"null"])  # as vLLM does once the client has left
        if mood == "breaks":
            raise RuntimeError("broken")
        if mood == "fails":
            return await self._answer(send, 400, [b'{"error": {"message": "max_tokens is too large"}}'])
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        answers = [(prompt, j) for prompt in prompts for j in range(body.get("n", 1))]
        payload = {
            "id": f"cmpl-{body.get('request_id', 'x')}",
            "model": body["model"],
            "choices": [
                {"index": i, "text": f"{body['model']}|{prompt}|{j}"} for i, (prompt, j) in enumerate(answers)
            ],
            "usage": {"prompt_tokens": len(prompts), "completion_tokens": 2, "prompt_tokens_details": None},
        }
        return await self._answer(send, 200, [json.dumps(payload).encode()])


def complete(server: Server, prompts: Any, **options: Any) -> Any:
    headers, leave = options.pop("headers", None), options.pop("leave", None)

    async def one() -> Any:
        async with server:
            body = {"model": "fedrouter", "prompt": prompts, **options}
            return await server.ask(COMPLETIONS, body, headers=headers, leave=leave)

    return asyncio.run(one())


@pytest.fixture
def app(request: pytest.FixtureRequest, server: Server) -> CompletionsApp:
    app = CompletionsApp(**getattr(request, "param", {}))
    server.app = server.hook.app = app
    return app


@pytest.mark.parametrize("n", [1, 3])
def test_choices_come_in_the_order_of_the_prompts(
    server: Server, app: CompletionsApp, adapter_of: AdapterOf, n: int
) -> None:
    prompts = [B, A, FAR, A, B]
    answer = complete(server, prompts, n=n)
    names = [
        adapter_of("summary"),
        adapter_of("headline"),
        "base",
        adapter_of("headline"),
        adapter_of("summary"),
    ]
    want = [f"{name}|{prompt}|{j}" for name, prompt in zip(names, prompts, strict=True) for j in range(n)]
    assert [choice["text"] for choice in answer.json["choices"]] == want
    assert [choice["index"] for choice in answer.json["choices"]] == list(range(5 * n))
    assert answer.json["model"] == ",".join(dict.fromkeys(names))
    assert answer.json["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "prompt_tokens_details": None,
    }
    assert answer.routing["adapter"] == answer.json["model"]
    assert answer.routing["fallback"] == "true"
    assert float(answer.routing["distance"]) > 3
    assert int(answer.headers["content-length"]) == len(answer.pieces[0])
    assert app.most == 3, "the sub-requests must run at once"


def test_token_ids_are_split_as_well(server: Server, app: CompletionsApp, adapter_of: AdapterOf) -> None:
    headline, other = [0, 1, 2, 3, 4, 5, 6], [6]
    answer = complete(server, [headline, other])
    assert [c["text"].split("|")[1] for c in answer.json["choices"]] == [str(headline), str(other)]


def test_every_sub_request_has_an_id_of_its_own(server: Server, app: CompletionsApp) -> None:
    answer = complete(server, [A, B, FAR], request_id="mine", headers={"X-Request-Id": "yours"})
    assert answer.json["id"] == "cmpl-mine"
    ids = [dict(scope["headers"])[b"X-Request-Id"] for scope in app.scopes]
    assert ids == [b"yours", b"yours-1", b"yours-2"]


@pytest.mark.parametrize(
    "app", [{"summary": "fails"}, {"summary": "fails", "headline": "hangs"}], indirect=True
)
def test_the_first_error_is_the_answer_and_ends_the_others(server: Server, app: CompletionsApp) -> None:
    answer = complete(server, [A, B])
    assert answer.status == 400
    assert answer.json == {"error": {"message": "max_tokens is too large"}}
    assert app.left == (app.moods.get("headline") == "hangs")
    assert app.running == 0


@pytest.mark.parametrize("app", [{"summary": "breaks", "headline": "hangs"}], indirect=True)
def test_a_sub_request_that_breaks_is_a_500(server: Server, app: CompletionsApp) -> None:
    answer = complete(server, [A, B])
    assert (answer.status, app.left, app.running) == (500, 1, 0)


@pytest.mark.parametrize("app", [{"summary": "hangs", "headline": "hangs"}], indirect=True)
def test_a_client_that_leaves_ends_them_all(server: Server, app: CompletionsApp) -> None:
    async def scenario() -> None:
        async with server:
            leave = asyncio.Event()
            body = {"model": "fedrouter", "prompt": [A, B]}
            asked = asyncio.create_task(server.ask(COMPLETIONS, body, leave=leave))
            while app.running < 2:
                await asyncio.sleep(0.01)
            leave.set()
            with pytest.raises(ConnectionError):
                await asked

    asyncio.run(scenario())
    assert (app.left, app.running) == (2, 0)


def test_usage_sums_the_values_present() -> None:
    def answer(model: str, details: Any) -> dict[str, Any]:
        usage = {"prompt_tokens": 3, "prompt_tokens_details": details}
        return {"id": model, "model": model, "choices": [{"index": 0}], "usage": usage}

    merged = merge([answer("a", None), answer("b", {"cached_tokens": 2})], [[1], [0]])
    assert merged["usage"] == {"prompt_tokens": 6, "prompt_tokens_details": {"cached_tokens": 2}}
    assert (merged["id"], merged["model"]) == ("a", "a,b")
