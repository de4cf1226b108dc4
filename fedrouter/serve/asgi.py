"""What the hook needs of ASGI: its types, whole bodies, JSON answers."""

import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    headers: Headers = ()


def json_answer(status: int, payload: Any, headers: Headers = ()) -> Answer:
    """Return an answer in JSON; infinite numbers become null."""
    body = json.dumps(_finite(payload), allow_nan=False).encode()
    return Answer(status, body, [(b"content-type", b"application/json"), *headers])


async def send_answer(send: Send, answer: Answer) -> None:
    """Send a whole answer."""
    length = (b"content-length", str(len(answer.body)).encode())
    headers = [*((name, value) for name, value in answer.headers if name.lower() != length[0]), length]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body, or None when the client has gone."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def collect(app: App, scope: Scope, receive: Receive) -> Answer:
    """Ask an application and return its whole answer."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, send)
    start = next((message for message in messages if message["type"] == "http.response.start"), None)
    if start is None:
        raise RuntimeError("the application ended without an answer")
    return Answer(
        start["status"], b"".join(message.get("body", b"") for message in messages), start.get("headers", ())
    )


def header_values(scope: Scope, name: str) -> list[str]:
    """Return the values of a request header, in their order; ``name`` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name.encode()]


def path_of(scope: Scope) -> str:
    """Return the path below the root path, as vLLM's own authentication sees it."""
    return str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))


def _finite(value: Any) -> Any:
    """JSON has no infinity (the margin of the only cluster, the distance of no text): null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
