"""An embedder without a model, an application that stands in for vLLM, and a client for both."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedrouter.serve.access import Access
from fedrouter.serve.decision_log import LogOptions
from fedrouter.serve.middleware import FedRouterMiddleware
from fedrouter.serve.routing import Routing
from fedrouter.serve.settings import Settings
from fedrouter.types import Array, EmbedderSpec

DIM = 64
KEY = "sesame"
# Limits that hold on a busy machine: the first batch imports torch.
PATIENT: dict[str, Any] = {"routing_timeout_s": 60.0}
TASKS = {
    "headline": "write a headline for this news story",
    "summary": "summarise this chat between two friends",
    "tâche": "is the second question a paraphrase yes or no",
}


class WordEmbedder:
    """Embeds a text as counts of hashed words: common words bring texts close. Records its batches."""

    def __init__(self) -> None:
        self.spec = EmbedderSpec("base", "words", 1, 128, "float32", DIM, "words-1")
        self.batches: list[list[str]] = []
        self.broken = False

    def embed(self, texts: Sequence[str]) -> Array:
        if self.broken:
            raise RuntimeError("out of memory")
        self.batches.append(list(texts))
        vectors = np.zeros((len(texts), DIM), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                row[hashlib.md5(word.encode()).digest()[0] % DIM] += 1
        return vectors


class EchoApp:
    """Checks the API key before it reads the body, as vLLM does, then echoes the body in pieces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Any] = []
        self.lifespans = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            self.lifespans += 1
            await send({"type": "lifespan.startup.complete"})
            assert (await receive())["type"] == "lifespan.shutdown"
            await send({"type": "lifespan.shutdown.complete"})
            return
        if (
            scope["path"].startswith("/v1")
            and dict(scope["headers"]).get(b"authorization") != f"Bearer {KEY}".encode()
        ):
            await self._answer(send, 401, [b'{"error":', b'"Unauthorized"}'])
            return
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("client disconnected")  # as Starlette does
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        self.scopes.append(scope)
        await self._answer(send, 200, [body[:7], body[7:]])

    async def _answer(self, send: Any, status: int, pieces: Sequence[bytes]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"server", b"echo")]})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    num_reads: int = 0  # calls of ``receive``

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.pieces))

    @property
    def routing(self) -> Mapping[str, str]:
        prefix = "x-fedrouter-"
        return {
            name.removeprefix(prefix): value
            for name, value in self.headers.items()
            if name.startswith(prefix)
        }


class Server:
    """The hook around an application, ``EchoApp`` by default, started as an ASGI server does."""

    def __init__(
        self,
        load: Callable[[], Routing],
        app: Any = None,
        access: Access | None = None,
        log: LogOptions | None = None,
        **settings: Any,
    ):
        self.app: Any = app or EchoApp()
        given = Settings(bundle=Path("not read"), log=log, **settings)
        self.hook = FedRouterMiddleware(
            self.app, lambda: given, lambda _: load(), lambda _: access or Access()
        )
        self.lifespan: list[Any] = []
        self.lifespan_scope: Any = {"type": "lifespan"}

    async def __aenter__(self) -> "Server":
        started, self._shutdown = asyncio.Event(), asyncio.Event()
        first = iter([{"type": "lifespan.startup"}])

        async def receive() -> Any:
            for message in first:
                return message
            await self._shutdown.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Any) -> None:
            self.lifespan.append(message)
            started.set()

        self._task = asyncio.create_task(self.hook(self.lifespan_scope, receive, send))
        await started.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._shutdown.set()
        await self._task

    async def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        key: str | None = KEY,
        chunk: int = 1000,
        root: str = "",
        headers: Mapping[str, str] | None = None,
        leave: asyncio.Event | None = None,
        query: str = "",
    ) -> Answer:
        """Send a request in pieces of ``chunk`` bytes; ``body`` is bytes or becomes JSON.

        The client disconnects after the response, or when ``leave`` is set.
        """
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        pieces = [raw[i : i + chunk] for i in range(0, len(raw), chunk)] or [b""]
        answer, gone = Answer(), leave or asyncio.Event()

        async def receive() -> Any:
            answer.num_reads += 1
            if answer.num_reads > len(pieces):
                await gone.wait()
                return {"type": "http.disconnect"}
            more = answer.num_reads < len(pieces)
            return {"type": "http.request", "body": pieces[answer.num_reads - 1], "more_body": more}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not answer.status, "two responses to one request"
                answer.status = message["status"]
                answer.headers = {
                    name.decode(): value.decode("latin-1") for name, value in message["headers"]
                }
            elif message["body"]:
                answer.pieces.append(message["body"])
            if message["type"] == "http.response.body" and not message.get("more_body"):
                gone.set()

        given = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        raw_headers = [
            (name.encode(), value.encode()) for name, value in (given | dict(headers or {})).items()
        ]
        scope = {
            "type": "http",
            "method": method,
            "path": root + path,
            "root_path": root,
            "query_string": query.encode(),
            "headers": raw_headers,
        }
        await self.hook(scope, receive, send)
        return answer
