"""The real hook with a real bundle on a port, before an application that stands in for vLLM."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fedrouter.serve.access import Access
from fedrouter.serve.checks import free_port
from fedrouter.serve.middleware import FedRouterMiddleware
from fedrouter.serve.routing import Routing
from fedrouter.serve.second import Second
from fedrouter.serve.settings import Settings


class StubApp:
    """Lists models, answers canary prompts, and streams the prompt's words back under the adapter's name."""

    def __init__(self, adapters: list[str], key: str | None = None, pause_s: float = 0.0):
        self.adapters, self.key, self.pause_s = adapters, key, pause_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return None
        if self.key and dict(scope["headers"]).get(b"authorization") != f"Bearer {self.key}".encode():
            return await self._send(send, 401, {"error": "Unauthorized"})
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        payload = json.loads(body or b"{}")
        if scope["path"] == "/v1/models":
            cards = [{"id": name} for name in ("base", "fedrouter")]
            cards += [{"id": name, "parent": "base"} for name in self.adapters]
            return await self._send(send, 200, {"data": cards})
        if scope["path"] in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            change = self.adapters.append if "un" not in scope["path"] else self.adapters.remove
            change(payload["lora_name"])
            return await self._send(send, 200, {})
        if scope["path"] == "/v1/completions":
            likelihood = -1.0 if payload["model"] == "base" else -2.0
            choice = {"logprobs": {"tokens": ["a"], "token_logprobs": [likelihood]}}
            return await self._send(send, 200, {"choices": [choice]})
        if scope["path"] != "/v1/chat/completions":
            return await self._send(send, 404, {"detail": "Not Found"})
        return await self._stream(send, payload)

    async def _stream(self, send: Any, payload: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        prompt = payload["messages"][-1]["content"]
        words = [f"{payload['model']}", " says: ", *(f"{word} " for word in prompt.split())]
        for word in words:
            if word == "ENGINE-DIES ":
                error = "EngineCore encountered an issue. See stack trace (above) for the root cause."
                data = f"data: {json.dumps({'error': {'message': error, 'code': 500}})}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                break
            piece = {"choices": [{"delta": {"content": word}}]}
            data = f"data: {json.dumps(piece)}\n\n".encode()
            half = len(data) // 2  # a line arrives in two pieces
            for part in (data[:half], data[half:]):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(self.pause_s)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send(self, send: Any, status: int, payload: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(payload).encode()})


@contextmanager
def serving(
    make: Callable[[], Routing],
    access: Access | None = None,
    key: str | None = None,
    second: Callable[[Routing], Second | None] = lambda _: None,
    pause_s: float = 0.0,
    **settings: Any,
) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1 while the block runs; yield the address."""
    routing = make()
    other = second(routing)
    adapters = [*routing.bundle.adapter_paths, *(other.adapters if other else ())]
    app = StubApp(adapters, key, pause_s)
    given = Settings(bundle=routing.bundle.path, **settings)
    hook = FedRouterMiddleware(
        app, lambda: given, lambda _: routing, lambda _: access or Access(), lambda *_: other
    )
    port = free_port()
    config = uvicorn.Config(hook, "127.0.0.1", port, log_level="error", lifespan="on", http="h11", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
